"""Key-norm compression by a call."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from transformers.cache_utils import Cache

from vllm_kvcompress.hf.cache import CompressedCache
from vllm_kvcompress.hf.oneshot import check_not_negative, checked_layers, compress, slot_cache
from vllm_kvcompress.hf.slots import Evict, Step
from vllm_kvcompress.methods import METHODS


def l2_compress(
    past_key_values: Cache,
    keep_ratio: float = 1.0,
    prune_after: int = 2048,
    skip_layers: Sequence[int] = (),
    *,
    attention_mask: torch.Tensor | None = None,
) -> CompressedCache:
    """Keep the tokens with the lowest key norms (Devoto et al. 2024, arXiv 2406.11430).

    Parameters
    ----------
    past_key_values : Cache
        A :class:`~transformers.DynamicCache`, or what this function returned; not changed.
    keep_ratio : float
        Each KV head keeps ``ceil(keep_ratio * n)`` of the ``n`` tokens that a layer holds.
    prune_after : int
        Layers that hold fewer tokens are left alone.
    skip_layers : sequence of int
        Layers that keep every token, by index from 0.
    attention_mask : torch.Tensor or None
        ``[batch, tokens seen]``, 0 at padding, which ``n`` does not count and nobody keeps.

    Returns
    -------
    CompressedCache
        It reports the true length, so that later tokens get their true positions.

    Raises
    ------
    TypeError
        If it is not such a cache.
    ValueError
        For a ratio outside (0, 1], a negative number, a layer that does not exist, a cache
        with merged tokens or an empty one.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio} is not allowed: it must be in (0, 1].")
    check_not_negative(prune_after=prune_after)
    cache = slot_cache(past_key_values)
    skipped = checked_layers(skip_layers, len(cache.layers))
    if any(layer.counts is not None for layer in cache.layers):
        raise ValueError("l2_compress does not evict merged tokens: their keys are pooled.")

    def step(layer: int, prompt: int, held: int, tokens: int) -> Step | None:
        keep = ceil(keep_ratio * held)
        due = layer not in skipped and held >= prune_after and keep < held
        return Step(0, held, keep, 0) if due else None

    return compress(cache, attention_mask, 0, step, Evict(METHODS["knorm"]()))
