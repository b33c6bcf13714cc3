"""A real scheduler whose worker is simulated: steps take no time and sample the same token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from bench.harness.engines import BLOCK_SIZE, Geometry, model_or_bundled


class Refused(RuntimeError):
    """vLLM does not start with such a pool, or refuses the request."""


@dataclass(frozen=True)
class Served:
    """What became of a batch.

    Attributes
    ----------
    finished, preemptions, steps : int
    peak : int
        Most requests that ran at once.
    """

    finished: int
    preemptions: int
    steps: int
    peak: int


def simulated_scheduler(
    settings: dict[str, Any] | None,
    kv_bytes: int,
    max_model_len: int,
    model: str = "",
    cache: str = "auto",
    max_num_seqs: int = 4096,
) -> Any:
    """The scheduler that an engine would have, with the blocks that vLLM makes of the bytes.

    Parameters
    ----------
    settings : dict or None
        Compression; ``None`` for stock vLLM.
    kv_bytes : int
    max_model_len : int
        May be more than the model was made for.
    model : str
        Only its configuration is read; the bundled one if empty.
    cache : str
        vLLM's ``kv_cache_dtype``.
    max_num_seqs : int

    Raises
    ------
    Refused
        If vLLM would not start.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.core.kv_cache_utils import (
        generate_scheduler_kv_cache_config,
        get_kv_cache_configs,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

    from vllm_kvcompress import plugin
    from vllm_kvcompress.worker.setup import compressed_specs

    plugin.register()
    geometry = Geometry.of(model)
    config = EngineArgs(
        model=model_or_bundled(model),
        hf_overrides={"max_position_embeddings": max(geometry.max_tokens, max_model_len)},
        dtype="bfloat16",
        kv_cache_dtype=cache,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=4096,
        enforce_eager=True,
        enable_prefix_caching=False,
        additional_config={"kvcompress": settings} if settings else {},
    ).create_engine_config()
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=geometry.kv_heads,
        head_size=geometry.head_dim,
        dtype=kv_cache_dtype_str_to_dtype(cache, config.model_config),
    )
    specs: dict[str, KVCacheSpec] = {
        f"model.layers.{index}.self_attn.attn": spec for index in range(geometry.layers)
    }
    if settings:
        layers = config.compilation_config.static_forward_context
        layers |= {name: SimpleNamespace(impl=None) for name in specs}
        specs = compressed_specs(specs, config)
    # What workers of the CPU build report; it has no part in what follows.
    config.cache_config.kv_cache_layout = "LBHNC"
    try:
        made = generate_scheduler_kv_cache_config(get_kv_cache_configs(config, [specs], [kv_bytes]))
    except ValueError as error:
        if "at least one request" not in str(error):
            raise
        raise Refused(str(error)) from None
    config.cache_config.num_gpu_blocks = made.num_blocks
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=made,
        structured_output_manager=SimpleNamespace(accept_tokens=lambda request, tokens: True),
        block_size=BLOCK_SIZE,
    )


def serve(scheduler: Any, requests: int, prompt: int, output: int, give_up: bool = True) -> Served:
    """Run requests that all arrive at once.

    Parameters
    ----------
    scheduler : Scheduler
        Without requests.
    requests, prompt, output : int
    give_up : bool
        Stop at the first preemption.
    """
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    for index in range(requests):
        scheduler.add_request(
            Request(
                request_id=str(index),
                prompt_token_ids=[1] * prompt,
                sampling_params=SamplingParams(max_tokens=output, ignore_eos=True),
                pooling_params=None,
                arrival_time=time.time(),
            )
        )
    preemptions = steps = peak = 0
    while scheduler.has_unfinished_requests():
        step = scheduler.schedule()
        steps += 1
        peak = max(peak, len(scheduler.running))
        preemptions += len(step.preempted_req_ids or ())
        if not step.num_scheduled_tokens or (preemptions and give_up):
            break
        names = list(step.num_scheduled_tokens)
        rows = (scheduler.requests[name] for name in names)
        scheduler.update_from_output(
            step,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[
                    [1] if row.num_computed_tokens >= row.num_tokens else [] for row in rows
                ],
            ),
        )
    return Served(requests - len(scheduler.requests), preemptions, steps, peak)
