"""What compression will do, in plain words: printed by ``serve.py`` before it starts."""

from __future__ import annotations

from vllm_kvcompress.bands import Band, plan_bands
from vllm_kvcompress.heads import heads_as_text
from vllm_kvcompress.scheduler.schedule import Schedule
from vllm_kvcompress.scheduler.trajectory import blocks_after
from vllm_kvcompress.settings import Settings

LENGTHS = (2048, 4096, 8192)
"""Prompt lengths for which the freed share is stated, in tokens."""


def share_freed(bands: list[Band], settings: Settings, block_size: int, tokens: int) -> float:
    """Share of a prompt's cache that is free once the prompt has been compressed.

    Parameters
    ----------
    bands : list of Band
    settings : Settings
    block_size : int
        Tokens per block.
    tokens : int
        Length of the prompt.

    Returns
    -------
    float
        0 where nothing is freed, close to 1 where almost everything is.
    """
    schedule = Schedule.of(settings, (band.limits for band in bands), block_size, tokens)
    whole = -(-tokens // block_size) * sum(len(band.layers) for band in bands)
    held = sum(
        blocks * len(band.layers)
        for blocks, band in zip(blocks_after(schedule, tokens), bands, strict=True)
    )
    return 1 - held / whole


def describe(settings: Settings, num_layers: int, block_size: int, kv_heads: int = 1) -> str:
    """Say what will be compressed and how much memory that frees.

    Parameters
    ----------
    settings : Settings
    num_layers : int
        Layers of the model, all of them full attention.
    block_size : int
        Tokens per block.
    kv_heads : int
        KV heads of a layer.

    Returns
    -------
    str
        A few lines for a terminal.

    Raises
    ------
    SettingsError
        If the settings do not fit the model.
    """
    if not settings.enabled:
        return "KV cache compression is off (method none): this is stock vLLM."
    bands = plan_bands(settings, num_layers, block_size, kv_heads=kv_heads)
    when = {
        "after_prefill": "at the end of the prompt",
        "during_prefill": f"every {settings.interval} prompt tokens",
        "decode": "the prompt stays whole",
    }[settings.phase]
    lines = [
        f"KV cache compression: {settings.method}, {when}, then every {settings.interval} "
        "generated tokens."
    ]
    boosted = max(band.index for band in bands) if settings.boost_heads else None
    for band in bands:
        name = f"  layers {band.layers[0]}-{band.layers[-1]}"
        if band.index == boosted:
            name = f"  KV heads {heads_as_text(settings.boost_heads)}"
        if band.limits is None:
            lines += _whole(settings)
        elif band.limits.budget is not None:
            lines.append(f"{name}: {band.limits.budget} tokens per request")
        else:
            lines.append(f"{name}: {float(band.limits.ratio or 0):.0%} of a request's tokens")
    if settings.phase != "decode":
        freed = ", ".join(
            f"{share_freed(bands, settings, block_size, tokens):.0%} at {tokens:,}"
            for tokens in LENGTHS
        )
        lines.append(f"  memory freed by prompt length in tokens: {freed}")
    return "\n".join(lines)


def _whole(settings: Settings) -> list[str]:
    """What keeps every token, as the user named it."""
    lines = []
    if settings.skip_layers:
        lines.append(f"  layers {', '.join(map(str, settings.skip_layers))}: every token")
    if settings.skip_heads:
        lines.append(f"  KV heads {heads_as_text(settings.skip_heads)}: every token")
    return lines
