"""vLLM's real scheduler, stock or ours, with a worker that computes nothing.

Block pool, managers, scheduler and requests are the true ones, and KV cache groups are made by
vLLM's own planning from a memory size. The worker answers at once with the same token for every
request whose prompt is computed. What is measured or counted is the scheduler's side only.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvcompress import plugin
from vllm_kvcompress.bands import plan_bands
from vllm_kvcompress.scheduler.scheduler import KVCompressScheduler
from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec
from vllm_kvcompress.settings import CONFIG_KEY, parse_settings

TOKEN = 5
"""What the worker always answers."""


@dataclass(frozen=True)
class Model:
    """What of a model the scheduler's side depends on.

    Attributes
    ----------
    layers, kv_heads, head_size : int
    """

    layers: int
    kv_heads: int
    head_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all layers, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True)
class Engine:
    """An engine to be simulated.

    Attributes
    ----------
    model : Model
    settings : dict or None
        Of our plugin; ``None`` is stock vLLM.
    tensor_parallel : int
    kv_bytes : int
        KV cache of one rank.
    block_size, max_requests, tokens_per_step, max_model_len : int
    caching : bool
        Prefix cache.
    stock_groups : int
        KV cache groups of stock vLLM, which would make one.
    """

    model: Model
    settings: dict[str, Any] | None = None
    tensor_parallel: int = 1
    kv_bytes: int = 8 << 30
    block_size: int = 16
    max_requests: int = 256
    tokens_per_step: int = 8192
    max_model_len: int = 16384
    caching: bool = True
    stock_groups: int = 1


@functools.cache
def _model_config(model: Model, tensor_parallel: int, max_model_len: int) -> ModelConfig:
    from transformers import LlamaConfig

    logging.getLogger("vllm").setLevel(logging.ERROR)
    plugin.register()
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as path:
        LlamaConfig(
            # Only what the cache depends on is true; weights are never made.
            hidden_size=model.kv_heads * model.head_size,
            intermediate_size=256,
            num_hidden_layers=model.layers,
            num_attention_heads=model.kv_heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_size,
            vocab_size=64,
            max_position_embeddings=max_model_len,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(path)
        return ModelConfig(
            model=path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max_model_len
        )


def vllm_config(engine: Engine) -> VllmConfig:
    """Configuration of an engine that schedules synchronously."""
    config = VllmConfig(
        model_config=_model_config(engine.model, engine.tensor_parallel, engine.max_model_len),
        cache_config=CacheConfig(
            block_size=engine.block_size, enable_prefix_caching=engine.caching
        ),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=engine.max_requests,
            max_num_batched_tokens=engine.tokens_per_step,
            max_model_len=engine.max_model_len,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
    )
    # This machine's limits are not those of the engine that is simulated.
    config.parallel_config.tensor_parallel_size = engine.tensor_parallel
    config.cache_config.block_size = engine.block_size
    config.cache_config.enable_prefix_caching = engine.caching
    config.cache_config.kv_cache_layout = "LBNHC"  # What workers with GPUs would report.
    if engine.settings is not None:
        config.additional_config = {CONFIG_KEY: engine.settings}
    return config


def layer_specs(engine: Engine) -> dict[str, KVCacheSpec]:
    """KV cache specs of the layers of one rank, as a worker would make them."""
    full = FullAttentionSpec(
        block_size=engine.block_size,
        num_kv_heads=max(1, engine.model.kv_heads // engine.tensor_parallel),
        head_size=engine.model.head_size,
        dtype=torch.bfloat16,
    )
    names = [f"model.layers.{index}.self_attn.attn" for index in range(engine.model.layers)]
    if engine.settings is None:
        return dict.fromkeys(names, full)
    settings = parse_settings(engine.settings)
    bands = plan_bands(
        settings,
        engine.model.layers,
        engine.block_size,
        longest=engine.max_model_len,
        kv_heads=engine.model.kv_heads,
    )
    return {
        names[layer]: CompressedAttentionSpec.from_full(
            full,
            band=band.index,
            limits=band.limits,
            phase=settings.phase,
            interval=settings.interval,
            prune_after=settings.prune_after,
        )
        for band in bands
        for layer in band.layers
    }


def kv_cache_config(engine: Engine, config: VllmConfig) -> KVCacheConfig:
    """KV cache groups and blocks that vLLM makes of an engine's memory."""
    specs = layer_specs(engine)
    made = get_kv_cache_configs(config, [specs], [engine.kv_bytes])[0]
    if engine.settings is not None or engine.stock_groups == 1:
        return made
    # The same layers and the same memory, cut into groups that stock vLLM does not make.
    size = engine.model.layers // engine.stock_groups
    names = list(specs)
    groups = [
        KVCacheGroupSpec(names[first : first + size], specs[names[first]])
        for first in range(0, len(names), size)
    ]
    return KVCacheConfig(made.num_blocks * engine.stock_groups, [], groups)


def build_scheduler(engine: Engine) -> Scheduler:
    """Stock vLLM's scheduler or ours."""
    config = vllm_config(engine)
    caches = kv_cache_config(engine, config)
    config.cache_config.num_gpu_blocks = caches.num_blocks
    cls = Scheduler if engine.settings is None else KVCompressScheduler
    return cls(
        vllm_config=config,
        kv_cache_config=caches,
        structured_output_manager=SimpleNamespace(accept_tokens=lambda request, tokens: True),
        block_size=engine.block_size,
        log_stats=False,
    )


def make_request(engine: Engine, name: str, prompt: Sequence[int], output_tokens: int) -> Request:
    """A request that generates a fixed number of tokens."""
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=params,
        pooling_params=None,
        block_hasher=get_request_block_hasher(engine.block_size, sha256)
        if engine.caching
        else None,
    )


def answer(output: SchedulerOutput, requests: Mapping[str, Request]) -> ModelRunnerOutput:
    """What a worker would return: a token for each request whose prompt is computed.

    Parameters
    ----------
    output : SchedulerOutput
    requests : mapping of str to Request
        The scheduler's.
    """
    names = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[sampled(requests[name]) for name in names],
    )


def sampled(request: Request) -> list[int]:
    """Tokens sampled for a request in the step that was just scheduled."""
    return [TOKEN] if request.num_computed_tokens >= request.num_tokens else []
