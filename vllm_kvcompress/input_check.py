"""The check of what requests ask for, in the process that takes them in.

Requests without a ``kvcompress_`` key pass untouched. Those of a server that does not
compress are refused if they have one: they would be answered with a whole cache, and nobody
would know. Beam searches are not checked: vLLM drops such keys before.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.bands import group_layout, plan_bands
from vllm_kvcompress.request import own_keys
from vllm_kvcompress.scheduler.requests import RequestSchedules
from vllm_kvcompress.settings import CONFIG_KEY, Settings, SettingsError, parse_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def wrap_process_inputs() -> None:
    """Check every request before the engine core sees it. Idempotent.

    Target: ``InputProcessor.process_inputs``. Why: chat, completions, responses and offline
    use all pass it with the finished prompt, and no plugin hook exists there
    (``validate_params`` of custom logits processors would be one, but stops the V2 model
    runner). How: wrapped on the class; the check looks at what vLLM's own checks let through.
    Upstream plan: a list of request validators that plugins can add to.
    """
    from vllm.utils import length_from_prompt_token_ids_or_embeds
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, CONFIG_KEY):
        return

    @functools.wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request = original(self, *args, **kwargs)
        if keys := _keys(request.sampling_params):
            length = length_from_prompt_token_ids_or_embeds(
                request.prompt_token_ids, request.prompt_embeds
            )
            check(keys, length, request.sampling_params.max_tokens, self.vllm_config)
        return request

    setattr(process_inputs, CONFIG_KEY, True)
    InputProcessor.process_inputs = process_inputs


def wrap_streams() -> None:
    """Check requests for streamed answers before the answer begins. Idempotent.

    Targets: ``AsyncLLM.generate`` and ``OpenAIServingResponses._generate_with_builtin_tools``.
    Why: they are generators, so that inputs are processed when a streamed answer has begun
    with status 200; a refusal would come as an event inside it. How: wrapped by functions
    that check and then call. Upstream plan: process inputs before the response is made.
    """
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.generate
    if hasattr(original, CONFIG_KEY):
        return

    @functools.wraps(original)
    def generate(
        self: AsyncLLM, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        _check_rendered(prompt, sampling_params, self.vllm_config)
        return original(self, prompt, sampling_params, *args, **kwargs)

    with_tools = OpenAIServingResponses._generate_with_builtin_tools

    @functools.wraps(with_tools)
    def generate_with_tools(
        self: OpenAIServingResponses, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        config = self.engine_client.vllm_config
        _check_rendered(kwargs.get("engine_input"), kwargs.get("sampling_params"), config)
        return with_tools(self, *args, **kwargs)

    setattr(generate, CONFIG_KEY, True)
    AsyncLLM.generate = generate
    OpenAIServingResponses._generate_with_builtin_tools = generate_with_tools


def _check_rendered(prompt: Any, params: Any, config: VllmConfig) -> None:
    """Check a request whose prompt is rendered; others are checked with their inputs."""
    keys = _keys(params)
    if keys and isinstance(prompt, dict) and "prompt_token_ids" in prompt:
        check(keys, len(prompt["prompt_token_ids"]), params.max_tokens, config)


def _keys(params: Any) -> dict[str, Any]:
    # Pooling and beam search have no such arguments.
    return own_keys(getattr(params, "extra_args", None))


def check(
    keys: dict[str, Any], prompt_tokens: int, max_tokens: int | None, config: VllmConfig
) -> None:
    """Refuse a request whose ``kvcompress_`` keys cannot be used.

    Parameters
    ----------
    keys : dict
        The request's.
    prompt_tokens : int
    max_tokens : int or None
        Tokens that it may generate; ``None`` for as many as the model has room for.
    config : VllmConfig

    Raises
    ------
    VLLMValidationError
        One sentence; over HTTP a 400.
    """
    from vllm.exceptions import VLLMValidationError

    if max_tokens is None:
        max_tokens = config.model_config.max_model_len - prompt_tokens
    try:
        _check(keys, prompt_tokens, max_tokens, config)
    except SettingsError as error:
        message = str(error)
        named = [key for key in keys if key in message]
        # The first that the sentence names; of two that begin alike, the longer one.
        first = min(named, key=lambda key: (message.index(key), -len(key)), default=None)
        raise VLLMValidationError(message, parameter=first) from None


def _check(keys: dict[str, Any], prompt_tokens: int, max_tokens: int, config: VllmConfig) -> None:
    additional = config.additional_config
    raw = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    if not raw or not parse_settings(raw).enabled:
        raise SettingsError(
            f"{next(iter(keys))} is not allowed: this server does not compress KV caches "
            "(it was started without kvcompress settings or with method=none)."
        )
    settings = parse_settings(raw)
    schedules = _schedules(
        settings,
        config.model_config.get_num_layers(config.parallel_config),
        config.cache_config.block_size,
        config.model_config.max_model_len,
        config.model_config.get_total_num_kv_heads(),
    )
    trajectory = schedules.trajectory(prompt_tokens, keys)
    # Elsewhere the pool holds the longest request whole, or the engine would not have started.
    pool = blocks_of_an_engine(config)
    if settings.phase != "during_prefill" or pool is None:
        return
    most = schedules.most_blocks(trajectory, prompt_tokens + max_tokens)
    if most > pool:
        raise SettingsError(
            f"{', '.join(f'{key}={value}' for key, value in keys.items())} cannot be served: a "
            f"prompt of {prompt_tokens} tokens with up to {max_tokens} generated ones would hold "
            f"{most} blocks at once, and the pool has {pool}; allowed is what holds fewer, by a "
            "smaller budget, keep_ratio or prune_after, a longer context or fewer max_tokens."
        )


def blocks_of_an_engine(config: VllmConfig) -> int | None:
    """Blocks that requests of one engine can have, ``None`` before the engine has said.

    The engine core reports its blocks at start-up, and vLLM sums them over the engines of
    data parallelism.
    """
    blocks, parallel = config.cache_config.num_gpu_blocks, config.parallel_config
    if not blocks:
        return None
    local = parallel.local_engines_only
    engines = parallel.data_parallel_size_local if local else parallel.data_parallel_size
    return blocks // max(1, engines) - 1  # The null block is nobody's.


@functools.lru_cache(maxsize=8)
def _schedules(
    settings: Settings, num_layers: int, block_size: int, max_model_len: int, kv_heads: int
) -> RequestSchedules:
    bands = plan_bands(settings, num_layers, block_size, longest=max_model_len, kv_heads=kv_heads)
    width, _, _ = group_layout([len(band.layers) for band in bands])
    of_groups = [band.index for band in bands for _ in range(-(-len(band.layers) // width))]
    return RequestSchedules(settings, of_groups, num_layers, block_size, max_model_len, kv_heads)
