"""Pooling a block into half of another, and all merges of one head. Compiled.

Same results as :func:`~vllm_kvcompress.methods.pooling.merge_blocks` up to the order of
additions. Conventions are those of :mod:`~vllm_kvcompress.worker.cpu.moves`; keys lie
across tokens, values along them, as the CPU attention of vLLM has them. Each block is read
once, pooled in float32 and written once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import (
    LANES,
    address_of,
    compiled,
    copy,
    fetch,
    fetch_bytes,
)
from vllm_kvcompress.worker.cpu.moves import Place
from vllm_kvcompress.worker.cpu.steps import LEVEL, OLDER, OUT
from vllm_kvcompress.worker.cpu.vectors import (
    WIDTH,
    fma,
    largest,
    load,
    load_pairs,
    multiply,
    sine_and_cosine,
    splat,
    store,
    store_exactly,
    store_mean,
)

MEAN, MAX, BEST = 0, 1, 2
"""Poolings, as kernels know them."""


class Turns(NamedTuple):
    """How keys turn.

    Attributes
    ----------
    pairs : np.ndarray
        ``[2, n]``, int64: dimensions that turn together, the first ``2 n``; none if keys do
        not turn.
    cos, sin : np.ndarray
        ``[levels, n]``, float32: half of those of half the angle between two slots of a level.
    angles : np.ndarray
        ``[n]``, float32: radians per position.
    """

    pairs: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    angles: np.ndarray


@compiled
def _pool_keys(
    read: int,
    starts: np.ndarray,
    like: np.ndarray,
    made: int,
    made_starts: np.ndarray,
    made_like: np.ndarray,
    size: int,
    pooling: int,
    level: int,
    turns: Turns,
    ahead: int,
) -> None:
    """Pool neighbouring tokens of each row of a block into half a row of another."""
    item, made_item = like.itemsize, made_like.itemsize
    turning = turns.pairs.shape[1] if pooling == MEAN else 0
    for pair in range(turning):
        one, two = turns.pairs[0, pair], turns.pairs[1, pair]
        c, s = splat(turns.cos[level, pair]), splat(turns.sin[level, pair])
        for at in range(0, size, LANES):
            fetch(ahead + (2 * pair * size + at) * item, like)
            fetch(ahead + ((2 * pair + 1) * size + at) * item, like)
            older, newer = load_pairs(read + starts[one] + at * item, like)
            other, another = load_pairs(read + starts[two] + at * item, like)
            place = at // 2 * made_item
            store(
                made + made_starts[one] + place,
                made_like,
                fma(older + newer, c, multiply(another - other, s)),
            )
            store(
                made + made_starts[two] + place,
                made_like,
                fma(other + another, c, multiply(older - newer, s)),
            )
    half = splat(np.float32(0.5))
    for dim in range(2 * turning, starts.shape[0]):
        for at in range(0, size, LANES):
            fetch(ahead + (dim * size + at) * item, like)
            older, newer = load_pairs(read + starts[dim] + at * item, like)
            place = made + made_starts[dim] + at // 2 * made_item
            if pooling == MEAN:
                store_mean(place, made_like, multiply(older + newer, half), like)
            else:
                store_exactly(place, made_like, largest(older, newer))


@compiled
def _turn_keys(
    read: int,
    starts: np.ndarray,
    like: np.ndarray,
    made: int,
    made_starts: np.ndarray,
    made_like: np.ndarray,
    size: int,
    turns: Turns,
    ways: int,
    numbers: np.ndarray,
) -> None:
    """Means as of :func:`_pool_keys`, of keys that each pair turns by a way of its own."""
    item, made_item = like.itemsize, made_like.itemsize
    half, turning = splat(np.float32(0.5)), turns.pairs.shape[1]
    for at in range(0, size, LANES):
        place = at // 2 * made_item
        way = load(ways + at // 2 * 4, numbers)
        for pair in range(turning):
            one, two = turns.pairs[0, pair], turns.pairs[1, pair]
            s, c = sine_and_cosine(multiply(way, splat(turns.angles[pair])))
            s, c = multiply(s, half), multiply(c, half)
            older, newer = load_pairs(read + starts[one] + at * item, like)
            other, another = load_pairs(read + starts[two] + at * item, like)
            store(
                made + made_starts[one] + place,
                made_like,
                fma(older + newer, c, multiply(another - other, s)),
            )
            store(
                made + made_starts[two] + place,
                made_like,
                fma(other + another, c, multiply(older - newer, s)),
            )
        for dim in range(2 * turning, starts.shape[0]):
            older, newer = load_pairs(read + starts[dim] + at * item, like)
            mean = multiply(older + newer, half)
            store_mean(made + made_starts[dim] + place, made_like, mean, like)


@compiled
def _pool_values(
    read: int,
    starts: np.ndarray,
    like: np.ndarray,
    made: int,
    made_starts: np.ndarray,
    made_like: np.ndarray,
    dims: int,
    pooling: int,
    ahead: int,
) -> None:
    """Pool neighbouring rows of a block into rows of another."""
    item, made_item = like.itemsize, made_like.itemsize
    half = splat(np.float32(0.5))
    for slot in range(starts.shape[0] // 2):
        fetch_bytes(ahead + 2 * slot * dims * item, 2 * dims * item)
        older, newer = read + starts[2 * slot], read + starts[2 * slot + 1]
        target = made + made_starts[slot]
        if pooling == MEAN:
            for at in range(0, dims, WIDTH):
                one, other = load(older + at * item, like), load(newer + at * item, like)
                store_mean(target + at * made_item, made_like, multiply(one + other, half), like)
        else:
            for at in range(0, dims, WIDTH):
                one, other = load(older + at * item, like), load(newer + at * item, like)
                store_exactly(target + at * made_item, made_like, largest(one, other))


@compiled
def _pool(
    keys: bool,
    read: int,
    starts: np.ndarray,
    like: np.ndarray,
    made: int,
    made_starts: np.ndarray,
    made_like: np.ndarray,
    side: int,
    size: int,
    dims: int,
    pooling: int,
    level: int,
    turns: Turns,
    ahead: int,
    ways: np.ndarray | None,
    step: int,
    numbers: np.ndarray,
) -> None:
    """Pool a block into the older (0) or newer half of another."""
    half = side * (size // 2)
    if not keys:
        rows = made_starts[half:]
        _pool_values(read, starts, like, made, rows, made_like, dims, pooling, ahead)
        return
    made += half * made_like.itemsize
    if ways is None:
        _pool_keys(
            read, starts, like, made, made_starts, made_like, size, pooling, level, turns, ahead
        )
    else:
        way = address_of(ways) + (step * size + half) * 4
        _turn_keys(
            read, starts, like, made, made_starts, made_like, size, turns, way, numbers
        )  # fmt: skip


@compiled
def merge_head(
    keys: bool,
    source: Place,
    target: Place,
    leaves: np.ndarray,
    steps: np.ndarray,
    size: int,
    dims: int,
    pooling: int,
    turns: Turns,
    ways: np.ndarray | None,
    held: np.ndarray,
    held_starts: np.ndarray,
    after: int,
    like: np.ndarray,
    numbers: np.ndarray,
) -> None:
    """Merge the keys, or the values, of one head.

    Parameters
    ----------
    steps, leaves : np.ndarray
        As :func:`order_steps` has them.
    ways : np.ndarray or None
        As :func:`find_ways` has them; ``None`` if slots of a level are equally far apart.
    held : np.ndarray
        ``[LEVELS, head_dim * size]``, float32: room for blocks on the way, whose runs begin
        at ``held_starts``, in bytes.
    after : int
        Address of what is read next.
    numbers : np.ndarray
        Of float32.
    """
    starts, blocks = source.starts, source.blocks
    leaf, last = 0, leaves.shape[0] - 1
    room, held_page = address_of(held), held.shape[1] * 4
    for step in range(steps.shape[0]):
        level, out = steps[step, LEVEL], steps[step, OUT]
        made = room - (out + 1) * held_page
        if out >= 0:
            made = target.cache + target.blocks[out] * target.page
        for side in range(2):
            block = steps[step, OLDER + side]
            base = room - (block + 1) * held_page
            ahead = base
            if block >= 0:
                base = source.cache + blocks[block] * source.page
                ahead = after
                if leaf < last:
                    ahead = source.cache + blocks[leaves[leaf + 1]] * source.page + starts[0]
                leaf += 1
            if level < 0:
                for run in range(starts.shape[0]):
                    copy(base + starts[run], made + target.starts[run], source.run)
                break
            if block >= 0 and out >= 0:
                _pool(
                    keys, base, starts, like, made, target.starts, like,
                    side, size, dims, pooling, level, turns, ahead, ways, step, numbers,
                )  # fmt: skip
            elif block >= 0:
                _pool(
                    keys, base, starts, like, made, held_starts, numbers,
                    side, size, dims, pooling, level, turns, ahead, ways, step, numbers,
                )  # fmt: skip
            elif out >= 0:
                _pool(
                    keys, base, held_starts, numbers, made, target.starts, like,
                    side, size, dims, pooling, level, turns, ahead, ways, step, numbers,
                )  # fmt: skip
            else:
                _pool(
                    keys, base, held_starts, numbers, made, held_starts, numbers,
                    side, size, dims, pooling, level, turns, ahead, ways, step, numbers,
                )  # fmt: skip
