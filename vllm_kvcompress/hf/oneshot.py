"""Shared by the functions that compress a cache once, by a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vllm_kvcompress.hf.cache import CompressedCache
from vllm_kvcompress.hf.compaction import Lengths, compact
from vllm_kvcompress.hf.layer import SlotLayer
from vllm_kvcompress.hf.slots import Reduce, Step

StepOfRow = Callable[[int, int, int, int], Step | None]
"""From layer, tokens of the prompt, slots held and tokens so far of one row."""


def slot_cache(past_key_values: Cache) -> CompressedCache:
    """A cache of the same slots, which can be compressed without changing the one given.

    Raises
    ------
    TypeError
        If it is neither a plain :class:`~transformers.DynamicCache` nor a compressed one.
    ValueError
        If it is empty, or compresses itself.
    """
    cache = CompressedCache({"method": "none"})
    if isinstance(past_key_values, CompressedCache):
        if past_key_values.settings.enabled:
            raise ValueError("This cache compresses itself, by its settings; do one or the other.")
        cache.weighted = past_key_values.weighted
        cache.layers = [layer.copy() for layer in past_key_values.layers]
    elif type(past_key_values) is DynamicCache and not past_key_values.offloading:
        cache.layers = [_slot_layer(layer) for layer in past_key_values.layers]
    else:
        raise TypeError(
            "past_key_values must be a DynamicCache of transformers without offloading, "
            f"not {type(past_key_values).__name__}."
        )
    if not any(layer.length for layer in cache.layers):
        raise ValueError("past_key_values is empty: let the model fill it first.")
    return cache


def _slot_layer(layer: Any) -> SlotLayer:
    if type(layer) is not DynamicLayer:
        raise TypeError(
            "past_key_values must hold full attention in every layer (DynamicLayer), "
            f"not {type(layer).__name__}."
        )
    slots = SlotLayer()
    if layer.is_initialized:
        slots.update(layer.keys, layer.values)
    return slots


def checked_layers(skip_layers: Sequence[int], count: int) -> frozenset[int]:
    """Layers to skip.

    Raises
    ------
    ValueError
        For a layer that does not exist.
    """
    unknown = [layer for layer in skip_layers if not 0 <= layer < count]
    if unknown:
        raise ValueError(
            f"skip_layers={list(skip_layers)} is not allowed: the cache has layers "
            f"0 to {count - 1}."
        )
    return frozenset(skip_layers)


def check_not_negative(**sizes: int | None) -> None:
    """Refuse negative sizes.

    Raises
    ------
    ValueError
        Names the first.
    """
    for name, size in sizes.items():
        if size is not None and size < 0:
            raise ValueError(f"{name}={size} is not allowed: it cannot be negative.")


def compress(
    cache: CompressedCache,
    attention_mask: torch.Tensor | None,
    prompt: int,
    step_of: StepOfRow,
    reduce: Reduce,
) -> CompressedCache:
    """Compact every layer of a cache once.

    Parameters
    ----------
    cache : CompressedCache
        From :func:`slot_cache`; changed.
    attention_mask : torch.Tensor or None
        ``[batch, tokens seen]``, 0 at padding.
    prompt : int
        Columns of the prompt.
    step_of : callable
    reduce : Reduce

    Returns
    -------
    CompressedCache
        The same.

    Raises
    ------
    ValueError
        For a mask of another shape.
    """
    for index, layer in enumerate(cache.layers):
        batch, length = layer.keys.shape[0], layer.length
        visible = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, length):
                raise ValueError(
                    f"attention_mask must be of shape [{batch}, {length}], one number per token "
                    f"seen, not {list(attention_mask.shape)}."
                )
            visible = attention_mask.to(device=layer.keys.device, dtype=torch.bool)
        lengths = Lengths.of(length, 0, prompt, batch, visible)
        held = layer.held(visible)
        steps = {}
        for row, size in enumerate(held.sum(-1).tolist()):
            step = step_of(index, lengths.prompt[row], size, lengths.now[row])
            if step is not None:
                steps[row] = step
        compact(layer, index, held, steps, lengths.now, reduce)
    return cache
