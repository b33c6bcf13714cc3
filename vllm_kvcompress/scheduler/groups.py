"""The check that vLLM made the KV cache groups we meant, and the start-up message."""

from __future__ import annotations

from collections import defaultdict

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_kvcompress.limits import Limits
from vllm_kvcompress.scheduler.schedule import NEVER, Schedule
from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec
from vllm_kvcompress.scheduler.trajectory import Trajectory
from vllm_kvcompress.settings import Settings, SettingsError

logger = init_logger("vllm.kvcompress")


def check_groups(
    config: KVCacheConfig, vllm_config: VllmConfig, settings: Settings
) -> tuple[Limits | None, ...]:
    """Compare the scheduler's groups with the bands, log them, and return their limits.

    Parameters
    ----------
    config : KVCacheConfig
        What vLLM made.
    vllm_config : VllmConfig
    settings : Settings

    Returns
    -------
    tuple of (Limits or None)
        One entry per group.

    Raises
    ------
    SettingsError
        If no group is compressed, or layers of different bands share a group: compression
        would silently do nothing, or less than was asked for.
    """
    limits: list[Limits | None] = []
    bands: dict[int, list[int]] = defaultdict(list)
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, CompressedAttentionSpec):
            limits.append(spec.limits)
            bands[spec.band] += [extract_layer_index(name) for name in group.layer_names]
        else:
            limits.append(None)
    compressed = {index: sorted(layers) for index, layers in bands.items() if index >= 0}
    if not compressed:
        raise SettingsError(
            "kvcompress: vLLM made no KV cache group that can be compressed; "
            f"its groups are {[type(g.kv_cache_spec).__name__ for g in config.kv_cache_groups]}."
        )
    intended = settings.bands
    if intended is not None and sorted(compressed) != list(range(intended)):
        raise SettingsError(
            f"kvcompress: bands={intended} was asked for, but vLLM made groups for bands "
            f"{sorted(compressed)} only."
        )
    total = sum(len(group.layer_names) for group in config.kv_cache_groups)
    by_band = {
        group.kv_cache_spec.band: group.kv_cache_spec.limits
        for group in config.kv_cache_groups
        if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
    }
    boosted = max(compressed) if settings.boost_heads else None
    for index, layers in sorted(compressed.items()):
        limit = by_band[index]
        assert limit is not None
        kept = f"{limit.budget} tokens" if limit.budget else f"{float(limit.ratio or 0):.1%}"
        logger.info(
            "kvcompress: band %d: %s keep %s per request (%.0f%% of the cache).",
            index,
            "boosted KV heads" if index == boosted else f"layers {layers[0]} to {layers[-1]}",
            kept,
            100 * len(layers) / total,
        )
    whole = total - sum(len(layers) for layers in compressed.values())
    logger.info(
        "kvcompress: %s, %s, every %d tokens; %d of %d layers are compressed, %d keep every "
        "token; %d KV cache groups of %d blocks of %d tokens.",
        settings.method,
        settings.phase,
        settings.interval,
        total - whole,
        total,
        whole,
        len(config.kv_cache_groups),
        config.num_blocks,
        vllm_config.cache_config.block_size,
    )
    if boosted is not None:
        logger.info(
            "kvcompress: %d KV heads keep %g times as many tokens as the others; they lie in the "
            "pages of layers %s, and those layers' other heads elsewhere.",
            len(settings.boost_heads),
            settings.boost,
            ", ".join(map(str, compressed[boosted])),
        )
    if settings.skip_heads:
        held = ", ".join(map(str, sorted(set(bands[-1]) - set(settings.skip_layers))))
        logger.info(
            "kvcompress: %d KV heads keep every token; they lie in the pages of layers %s, and "
            "those layers' other heads elsewhere.",
            len(settings.skip_heads),
            held,
        )
    longest = vllm_config.model_config.max_model_len - 1
    schedule = Schedule.of(settings, limits, vllm_config.cache_config.block_size, longest)
    # The longest prompt compresses soonest, except in the decode phase.
    prompt = 1 if settings.phase == "decode" else longest
    if Trajectory(schedule, prompt).due == NEVER:
        logger.warning(
            "kvcompress: nothing will ever be compressed: no request of at most %d tokens "
            "(max_model_len) reaches a threshold.",
            vllm_config.model_config.max_model_len,
        )
    unbounded = whole + sum(
        len(compressed[index]) for index, limit in by_band.items() if limit and limit.ratio == 1
    )
    if unbounded and settings.phase == "during_prefill":
        logger.warning(
            "kvcompress: phase=during_prefill bounds the peak only in compressed layers; "
            "the pages of %d layers hold every token of a request.",
            unbounded,
        )
    return tuple(limits)
