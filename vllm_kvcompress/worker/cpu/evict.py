"""Eviction on the CPU, compiled: scores, choice and moves, one KV head after the other.

A head's keys are still in the processor's caches when the chosen ones move.
"""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.worker.cpu.directions import score_differences, score_keys_and_values
from vllm_kvcompress.worker.cpu.intrinsics import LANES, compiled
from vllm_kvcompress.worker.cpu.moves import Part, in_order, move_head, place_of
from vllm_kvcompress.worker.cpu.ranks import (
    choose,
    keep_latest,
    score_at_random,
    score_norms,
    squared_norms,
)

GIVEN, KNORM, KEYDIFF, KVDIFF, RANDOM, STREAMING = range(6)
"""Methods, as kernels know them; ``GIVEN`` is any whose scores somebody else has found."""


@compiled
def mark_row(
    keys: Part,
    values: Part,
    layer: int,
    head: int,
    size: int,
    sources: np.ndarray,
    keep: int,
    sinks: int,
    method: int,
    key: int,
    scale: float,
    scores: np.ndarray,
    norms: np.ndarray,
    ranks: np.ndarray,
    block: np.ndarray,
    means: np.ndarray,
    masks: np.ndarray,
    like: np.ndarray,
) -> None:
    """Mark the tokens of a head that stay; ``scores`` are filled unless they are given.

    ``norms`` is room like ``scores``, where values are looked at.
    """
    cache, starts = keys.caches[layer], keys.starts[head]
    if method == STREAMING:
        keep_latest(sources.shape[0] * size, keep, sinks, masks)
        return
    if method == KNORM:
        squared_norms(
            cache, keys.page, starts, keys.run, keys.across, size, sources, scale, like, scores
        )
        score_norms(scores)
    elif method == KEYDIFF:
        score_differences(place_of(keys, layer, head, sources), size, like, block, means, scores)
    elif method == KVDIFF:
        score_keys_and_values(
            place_of(keys, layer, head, sources), place_of(values, layer, head, sources),
            values.across, size, scale, like, block, means, norms, scores,
        )  # fmt: skip
    elif method == RANDOM:
        score_at_random(key, scores)
    choose(scores, keep, sinks, ranks, masks)


@compiled
def evict(
    keys: Part,
    values: Part,
    size: int,
    sources: np.ndarray,
    destinations: np.ndarray,
    sinks: int,
    method: int,
    random_keys: np.ndarray,
    scale: float,
    scores: np.ndarray,
    masks: np.ndarray,
    staging: np.ndarray,
    whole: np.ndarray,
    like: np.ndarray,
) -> None:
    """Keep the tokens with the highest scores of each head, and move them.

    Parameters
    ----------
    sinks : int
        First tokens that stay whatever their score.
    random_keys : np.ndarray
        ``[layers * kv_heads]``, int64, where tokens are drawn.
    scores : np.ndarray
        ``[layers * kv_heads, n * size]``, float32, if given; else room:
        one row, and for methods that look at values another.
    masks : np.ndarray
        ``[layers * kv_heads, n * size / LANES]``, uint32, filled.
    """
    plain = in_order(sources, destinations, np.arange(1, destinations.shape[0] + 1))
    heads, dims = keys.starts.shape
    keep = destinations.shape[0] * size
    ranks = np.empty(sources.shape[0] * size, np.int32)
    block = np.empty((dims, LANES), np.float32)
    means = np.empty((dims, 16), np.float32)
    for layer in range(keys.caches.shape[0]):
        for head in range(heads):
            row = layer * heads + head
            own, norms = scores[row if method == GIVEN else 0], scores[scores.shape[0] - 1]
            key = random_keys[row] if method == RANDOM else 0
            mark_row(
                keys, values, layer, head, size, sources, keep, sinks, method, key, scale, own,
                norms, ranks, block, means, masks[row], like,
            )  # fmt: skip
            move_head(
                keys, values, layer, head, size, sources, masks[row], destinations, plain,
                staging, whole, like,
            )  # fmt: skip
