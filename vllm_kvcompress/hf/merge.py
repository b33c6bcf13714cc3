"""Merging by a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from vllm_kvcompress.hf.cache import CompressedCache
from vllm_kvcompress.hf.oneshot import check_not_negative, checked_layers, compress, slot_cache
from vllm_kvcompress.hf.plan import Plan, recent_window
from vllm_kvcompress.hf.rotary import rotation_of
from vllm_kvcompress.hf.slots import Merge
from vllm_kvcompress.methods import POOLINGS
from vllm_kvcompress.methods.pooling import Pooling, Rotation
from vllm_kvcompress.settings import parse_settings

NOT_GIVEN: Any = object()
"""Default of a parameter where ``None`` says something."""


def merge_compress(
    past_key_values: Cache,
    initial_local_window: int,
    steepness_coefficient: float = 1.0,
    sink_tokens: int = 4,
    seq_pooling_type: Literal["mean", "max", "best"] = "mean",
    skip_prefill_compression: bool = False,
    *,
    rope: Any = NOT_GIVEN,
    prompt_tokens: int | None = None,
    recent_tokens: int | None = None,
    skip_layers: Sequence[int] = (),
    merge_weighting: Literal["count", "none"] = "count",
    attention_mask: torch.Tensor | None = None,
) -> CompressedCache:
    """Pool old neighbours, the more of them the older they are.

    Layer ``k`` of ``m`` keeps ``L0 * (1 + k / m * (1 / beta - 1))`` slots, rounded up. This
    is the method ``merge`` of the paged caches with blocks of one token.

    Parameters
    ----------
    past_key_values : Cache
        A :class:`~transformers.DynamicCache`, or what this function returned; not changed.
    initial_local_window : int
        ``L0``, the slots of the first layer.
    steepness_coefficient : float
        ``beta`` of the pyramid; 1 is flat.
    sink_tokens : int
        First tokens, never merged.
    seq_pooling_type : str
        ``mean`` (keys are turned to a common position first), ``max`` (elementwise) or
        ``best`` (the lower-norm key with its value).
    skip_prefill_compression : bool
        Leave the first ``prompt_tokens`` tokens alone; the window counts what follows.
    rope : PreTrainedModel, PreTrainedConfig, Rotation or None
        Whose rotary embedding turned the keys; must be given for ``mean``. ``None`` says that
        the model has none.
    prompt_tokens : int or None
        Columns of the prompt, padding included; for ``skip_prefill_compression`` only.
    recent_tokens : int or None
        Latest tokens, never merged; by default half of the room in the smallest layer.
    skip_layers : sequence of int
        Layers that keep every token.
    merge_weighting : str
        ``count``: a slot weighs as much in attention as it stands for tokens; ``none``: once.
    attention_mask : torch.Tensor or None
        ``[batch, tokens seen]``, 0 at padding, which is neither kept nor merged.

    Returns
    -------
    CompressedCache
        It reports the true length, so that later tokens get their true positions.

    Raises
    ------
    TypeError
        If it is not such a cache.
    ValueError
        For sizes that are negative or do not fit, a layer that does not exist, a cache with
        evicted tokens or an empty one, or ``mean`` without a usable ``rope``.
    """
    cache = slot_cache(past_key_values)
    count = len(cache.layers)
    skipped = checked_layers(skip_layers, count)
    check_not_negative(
        sink_tokens=sink_tokens, recent_tokens=recent_tokens, prompt_tokens=prompt_tokens
    )
    if skip_prefill_compression != (prompt_tokens is not None):
        raise ValueError("skip_prefill_compression and prompt_tokens go together: give both.")
    if any(layer.columns is not None and layer.counts is None for layer in cache.layers):
        raise ValueError("merge_compress pools neighbours, but this cache has evicted tokens.")
    if len(skipped) == count:
        return cache
    pooling, rotation = _pooling(seq_pooling_type, rope)

    longest = max(layer.length for layer in cache.layers)
    recent_tokens = recent_window(
        initial_local_window,
        steepness_coefficient,
        0 if skip_prefill_compression else sink_tokens,
        recent_tokens,
        (count, max(set(range(count)) - skipped)),
        longest,
    )
    plan = Plan.of(
        parse_settings(
            {
                "method": "merge",
                "budget": initial_local_window,
                "pyramid_beta": float(steepness_coefficient),
                "sink_tokens": sink_tokens,
                "recent_tokens": recent_tokens,
                "skip_layers": tuple(sorted(skipped)),
                "pooling": seq_pooling_type,
                "merge_weighting": merge_weighting,
                "phase": "decode" if skip_prefill_compression else "after_prefill",
            }
        ),
        count,
        longest,
    )
    cache.weighted = merge_weighting == "count"

    def step(layer: int, prompt: int, held: int, tokens: int) -> Any:
        return plan.step(layer, min(prompt, held), held, tokens)

    reduce = Merge(pooling, rotation)
    return compress(cache, attention_mask, prompt_tokens or 0, step, reduce)


def _pooling(name: str, rope: Any) -> tuple[Pooling, Rotation | None]:
    if name not in POOLINGS:
        raise ValueError(
            f"seq_pooling_type={name!r} is not allowed: allowed are {', '.join(POOLINGS)}."
        )
    pooling = POOLINGS[name]()
    if not pooling.needs_rotation:
        return pooling, None
    if rope is NOT_GIVEN:
        raise ValueError(
            f"seq_pooling_type={name!r} turns keys: pass rope=model or its configuration, or "
            "rope=None for a model without RoPE."
        )
    return pooling, rope if rope is None or isinstance(rope, Rotation) else rotation_of(rope)
