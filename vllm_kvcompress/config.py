"""Filling in vLLM's engine settings, and refusing by name what is not supported."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_kvcompress.bands import largest_limits, plan_bands
from vllm_kvcompress.settings import CONFIG_KEY, Settings, SettingsError, parse_settings

logger = init_logger("vllm.kvcompress")

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_kvcompress.worker.worker.KVCompressCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_kvcompress.worker.worker.KVCompressGPUWorker",
}
"""vLLM's worker classes and the subclasses that take their place."""

SCHEDULERS = {
    False: "vllm_kvcompress.scheduler.scheduler.KVCompressScheduler",
    True: "vllm_kvcompress.scheduler.scheduler.KVCompressAsyncScheduler",
}
"""Scheduler class by whether scheduling is asynchronous."""

CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")
"""KV cache types whose pages hold plain elements, with one scale per layer at the most."""

CPU_BLOCK_SIZE = 32
"""Block size on CPU where the user names none: vLLM's default of 128 is coarse."""


def settings_of(additional_config: object) -> Settings | None:
    """Settings in an ``additional_config``, ``None`` if compression is not asked for.

    Raises
    ------
    SettingsError
        If they are there but not valid.
    """
    if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
        return None
    settings = parse_settings(additional_config[CONFIG_KEY])
    return settings if settings.enabled else None


def fill_in(config: VllmConfig, settings: Settings) -> None:
    """Make an engine use our scheduler and worker. Idempotent.

    Parameters
    ----------
    config : VllmConfig
        Finished configuration: platform and async choices are made.
    settings : Settings

    Raises
    ------
    SettingsError
        For anything that is not supported.
    """
    _refuse(config)
    if settings.places_heads:
        _refuse_heads(config)
    if settings.phase == "during_prefill" and not config.scheduler_config.enable_chunked_prefill:
        raise SettingsError(
            "kvcompress: phase=during_prefill needs chunked prefill, which is off for this "
            "model or by your choice; use phase=after_prefill."
        )
    _check_bands(config, settings)
    parallel, scheduler = config.parallel_config, config.scheduler_config
    if parallel.worker_cls not in WORKERS.values():
        if parallel.worker_cls not in WORKERS:
            raise SettingsError(
                f"kvcompress: worker_cls={parallel.worker_cls!r} is not supported; it brings "
                f"its own worker, for {', '.join(WORKERS)}."
            )
        parallel.worker_cls = WORKERS[parallel.worker_cls]
    ours = SCHEDULERS[bool(scheduler.async_scheduling)]
    if scheduler.scheduler_cls not in (None, ours):
        raise SettingsError(
            f"kvcompress: scheduler_cls={scheduler.scheduler_cls!r} is not supported; it "
            "brings its own scheduler."
        )
    scheduler.scheduler_cls = ours


def _refuse(config: VllmConfig) -> None:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    unsupported = {
        "speculative decoding": config.speculative_config is not None,
        "KV connectors (kv_transfer_config)": config.kv_transfer_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "micro-batching (DBO)": parallel.use_ubatching,
        "KV sharing fast prefill": cache.kv_sharing_fast_prefill,
        f"kv_cache_dtype={cache.cache_dtype!r} (allowed are {', '.join(CACHE_DTYPES)})": (
            cache.cache_dtype not in CACHE_DTYPES
        ),
        "kv_cache_dtype_skip_layers": bool(cache.kv_cache_dtype_skip_layers),
        "pooling models": model.runner_type == "pooling",
        "encoder-decoder models": model.is_encoder_decoder,
        "models with Mamba or linear-attention layers": model.is_hybrid,
        "models without attention": model.is_attention_free,
        "multi-head latent attention (MLA)": model.use_mla,
        "prefix-LM masks": model.is_mm_prefix_lm,
        "diffusion models": model.is_diffusion,
    }
    for name, found in unsupported.items():
        if found:
            raise SettingsError(f"kvcompress: {name} cannot be combined with compression yet.")


def _refuse_heads(config: VllmConfig) -> None:
    """Refuse what ``skip_heads`` and ``boost_heads`` in particular do not work with."""
    if config.parallel_config.tensor_parallel_size > 1:
        raise SettingsError(
            "kvcompress: skip_heads and boost_heads cannot be combined with tensor parallelism "
            "yet: heads change places, and those of other ranks are out of reach; use skip_layers."
        )
    if config.compilation_config.pass_config.fuse_attn_quant:
        raise SettingsError(
            "kvcompress: skip_heads and boost_heads cannot be combined with attention outputs that "
            "are quantized within attention (fuse_attn_quant); use skip_layers."
        )


def _check_bands(config: VllmConfig, settings: Settings) -> None:
    """Refuse a model or a choice of bands that cannot work before any weight is loaded."""
    kinds = set(getattr(config.model_config.hf_text_config, "layer_types", None) or ())
    if "full_attention" in kinds and len(kinds) > 1:
        raise SettingsError(
            "kvcompress: models that mix full attention with other kinds of layers "
            f"({', '.join(sorted(kinds - {'full_attention'}))}) cannot be compressed yet."
        )
    if kinds - {"full_attention"}:
        return  # The worker refuses, once it has seen the layers themselves.
    block_size = config.cache_config.block_size
    num_layers = config.model_config.get_num_layers(config.parallel_config)
    longest = config.model_config.max_model_len
    kv_heads = config.model_config.get_total_num_kv_heads()
    bands = plan_bands(settings, num_layers, block_size, longest=longest, kv_heads=kv_heads)
    largest_limits(settings, num_layers, block_size, longest, kv_heads)
    if len(bands) > 1 and config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise SettingsError(
            f"kvcompress: {len(bands)} bands need a KV cache group each, which "
            "disable_hybrid_kv_cache_manager forbids; use bands=1 without skip_layers, skip_heads "
            "and boost_heads, or leave it on."
        )


def default_block_size(block_size: int | None) -> int | None:
    """Block size to ask vLLM for: finer than its default on CPU, else the user's choice."""
    if block_size is None and current_platform.is_cpu():
        return CPU_BLOCK_SIZE
    return block_size
