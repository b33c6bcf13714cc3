"""Scores of tokens and the choice by them, compiled, one KV head of one layer at a time.

The same as the methods in torch, up to the order of additions. Conventions are those of
:mod:`~vllm_kvcompress.worker.cpu.moves`.
"""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import (
    LANES,
    above,
    address_of,
    compiled,
    equal,
    fetch,
    fetch_bytes,
    ones,
)
from vllm_kvcompress.worker.cpu.moves import Part
from vllm_kvcompress.worker.cpu.vectors import (
    WIDTH,
    fma,
    load,
    multiply,
    splat,
    store,
    total,
)

NEAR = 11
"""Bits that :func:`~vllm_kvcompress.methods.base.settle_near_ties` rounds away."""


@compiled
def norms_of_block(
    base: int,
    ahead: int,
    starts: np.ndarray,
    run: int,
    across: bool,
    size: int,
    factor: float,
    like: np.ndarray,
    out: np.ndarray,
    first: int,
) -> None:
    """Squared norms, times a factor, of a head's keys (or values) of one block.

    Written to ``out`` from token ``first`` on, float32; ``ahead`` is the page to ask for.
    """
    item = like.itemsize
    step = WIDTH * item
    zero = splat(np.float32(0))
    if across:
        factors = splat(np.float32(factor))
        room = address_of(out) + first * 4
        for lane in range(0, size, LANES):
            one, other = zero, zero
            for dim in range(starts.shape[0]):
                at = starts[dim] + lane * item
                fetch(ahead + at, like)
                left, right = load(base + at, like), load(base + at + step, like)
                one, other = fma(left, left, one), fma(right, right, other)
            place = room + lane * 4
            store(place, out, multiply(one, factors))
            store(place + 4 * WIDTH, out, multiply(other, factors))
    else:
        for token in range(size):
            fetch_bytes(ahead + starts[token], run)
            sums = zero
            for at in range(starts[token], starts[token] + run, step):
                own = load(base + at, like)
                sums = fma(own, own, sums)
            out[first + token] = total(sums) * np.float32(factor)


@compiled
def squared_norms(
    cache: int,
    page: int,
    starts: np.ndarray,
    run: int,
    across: bool,
    size: int,
    blocks: np.ndarray,
    scale: float,
    like: np.ndarray,
    out: np.ndarray,
) -> None:
    """Squared norms ``[n * size]``, float32, of the keys of one head."""
    last = blocks.shape[0] - 1
    factor = np.float32(scale) * np.float32(scale)
    for index in range(blocks.shape[0]):
        base = cache + blocks[index] * page
        ahead = cache + blocks[min(index + 1, last)] * page
        norms_of_block(base, ahead, starts, run, across, size, factor, like, out, index * size)


@compiled
def score_norms(norms: np.ndarray) -> None:
    """Squared norms to scores of :class:`~vllm_kvcompress.methods.knorm.KNorm`, in place."""
    bits = norms.view(np.int32)
    half = np.int32(1 << (NEAR - 1))
    for token in range(norms.shape[0]):
        negative = bits[token] ^ np.int32(-(1 << 31))
        bits[token] = np.int32(negative + half) & np.int32(-2 * half)


@compiled
def score_at_random(key: int, out: np.ndarray) -> None:
    """Scores of :class:`~vllm_kvcompress.methods.random.Random` with a head's key."""
    for token in range(out.shape[0]):
        mixed = np.uint32(np.uint32(token) * np.uint32(0x9E3779B9)) ^ np.uint32(key)
        mixed ^= mixed >> np.uint32(16)
        mixed = np.uint32(mixed * np.uint32(0x85EBCA6B))
        mixed ^= mixed >> np.uint32(13)
        mixed = np.uint32(mixed * np.uint32(0xC2B2AE35))
        mixed ^= mixed >> np.uint32(16)
        out[token] = np.float32(np.int32(mixed >> np.uint32(8))) * np.float32(1 / (1 << 24))


@compiled
def _order(scores: np.ndarray, out: np.ndarray) -> None:
    """Integers in the order of scores, and above all where there is no number."""
    bits = scores.view(np.int32)
    most = np.int32(0x7FFFFFFF)
    for token in range(scores.shape[0]):
        own = bits[token]
        flipped = np.int32(own ^ (np.int32(own >> np.int32(31)) & most))
        # -0 ranks as 0, and so does nothing else.
        flipped = np.int32(0) if flipped == np.int32(-1) else flipped
        out[token] = most if np.int32(own & most) > np.int32(0x7F800000) else flipped


@compiled
def _count(ranks: int, chunks: int, limit: int) -> int:
    """How many of so many chunks of ranks from an address on are above a limit."""
    found = 0
    for chunk in range(chunks):
        found += ones(above(ranks + chunk * LANES * 4, limit))
    return found


@compiled
def _highest(mask: int) -> int:
    """The place of the highest bit that is set."""
    place = 0
    while mask > 1:
        mask >>= 1
        place += 1
    return place


@compiled
def choose(scores: np.ndarray, keep: int, sinks: int, ranks: np.ndarray, masks: np.ndarray) -> None:
    """Mark the ``keep`` tokens with the highest scores, the older ones where equal.

    The first ``sinks`` stay whatever their score, and what is no number counts as the
    highest. ``ranks``, int32, is room for all tokens, in whole chunks of ``LANES``.
    """
    tokens = scores.shape[0]
    _order(scores, ranks[:tokens])
    ranks[:sinks] = np.int32(0x7FFFFFFF)
    ranks[tokens:] = np.int32(-(1 << 31))
    # The highest rank that at least so many tokens have, found bit by bit.
    low, high = np.int64(ranks[0]), np.int64(ranks[0])
    for token in range(tokens):
        low, high = min(low, np.int64(ranks[token])), max(high, np.int64(ranks[token]))
    place = address_of(ranks)
    while low < high:
        middle = (low + high + 1) >> 1
        if _count(place, masks.shape[0], np.int32(middle - 1)) >= keep:
            low = middle
        else:
            high = middle - 1
    limit = np.int32(low)
    left = keep
    for chunk in range(masks.shape[0]):
        mask = above(place + chunk * LANES * 4, limit)
        masks[chunk] = mask
        left -= ones(mask)
    for chunk in range(masks.shape[0]):
        if left <= 0:
            break
        more = equal(place + chunk * LANES * 4, limit)
        while ones(more) > left:
            more &= ~(np.int64(1) << _highest(more))
        masks[chunk] |= np.uint32(more)
        left -= ones(more)


@compiled
def keep_latest(tokens: int, keep: int, sinks: int, masks: np.ndarray) -> None:
    """Mark the sinks and the latest tokens."""
    for chunk in range(masks.shape[0]):
        masks[chunk] = 0
    for token in range(sinks):
        masks[token // LANES] |= np.uint32(1 << (token % LANES))
    for token in range(tokens - keep + sinks, tokens):
        masks[token // LANES] |= np.uint32(1 << (token % LANES))


@compiled
def all_squared_norms(
    keys: Part, size: int, blocks: np.ndarray, scale: float, like: np.ndarray, out: np.ndarray
) -> None:
    """Squared norms of the keys of all heads, ``[layers * kv_heads, n * size]``."""
    heads = keys.starts.shape[0]
    for layer in range(keys.caches.shape[0]):
        for head in range(heads):
            squared_norms(
                keys.caches[layer], keys.page, keys.starts[head], keys.run, keys.across, size,
                blocks, scale, like, out[layer * heads + head],
            )  # fmt: skip


@compiled
def choose_all(
    scores: np.ndarray, keep: int, sinks: int, ranks: np.ndarray, masks: np.ndarray
) -> None:
    """:func:`choose` for all rows of scores."""
    for row in range(scores.shape[0]):
        choose(scores[row], keep, sinks, ranks, masks[row])
