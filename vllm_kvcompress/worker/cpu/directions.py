"""Scores by direction, compiled: how far keys point away from their mean, and values with them.

The same as KeyDiff and KVDiff in torch, up to the order of additions, where a run of keys is a
dimension. Conventions are those of :mod:`~vllm_kvcompress.worker.cpu.moves`; the scale of
elements does not matter for directions.
"""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import LANES, address_of, compiled, fetch
from vllm_kvcompress.worker.cpu.moves import Place
from vllm_kvcompress.worker.cpu.ranks import norms_of_block
from vllm_kvcompress.worker.cpu.vectors import (
    WIDTH,
    add,
    divide,
    fma,
    largest,
    load,
    multiply,
    nearest,
    splat,
    square_root,
    store,
    subtract,
    total,
)

UNIT = 4096
"""Steps of a cosine, or a standard deviation, of 1: scores are rounded to them."""

PART = 1024
"""Numbers that are added up as float32 before the sum goes to a wider one."""


@compiled
def find_mean(
    keys: Place,
    size: int,
    like: np.ndarray,
    block: np.ndarray,
    means: np.ndarray,
    out: np.ndarray,
) -> None:
    """Mean of the unit keys of a head, at unit length, and the inverse lengths of keys.

    Parameters
    ----------
    block : np.ndarray
        ``[head_dim, LANES]``, float32, room.
    means : np.ndarray
        ``[head_dim, WIDTH]``, float32; the mean goes to ``means[:, 0]``.
    out : np.ndarray
        ``[n * size]``, float32, filled with inverse lengths.
    """
    item, last, dims = like.itemsize, keys.blocks.shape[0] - 1, keys.starts.shape[0]
    step = WIDTH * item
    zero, unit = splat(np.float32(0)), splat(np.float32(1))
    least = splat(np.float32(1e-12))
    room, numbers, sums = address_of(out), address_of(block), address_of(means)
    means[:] = 0
    for index in range(last + 1):
        base = keys.cache + keys.blocks[index] * keys.page
        ahead = keys.cache + keys.blocks[min(index + 1, last)] * keys.page
        for lane in range(0, size, LANES):
            one, other = zero, zero
            for dim in range(dims):
                at = keys.starts[dim] + lane * item
                fetch(ahead + at, like)
                first, second = load(base + at, like), load(base + at + step, like)
                place = numbers + dim * LANES * 4
                store(place, out, first)
                store(place + 4 * WIDTH, out, second)
                one, other = fma(first, first, one), fma(second, second, other)
            one = divide(unit, largest(square_root(one), least))
            other = divide(unit, largest(square_root(other), least))
            place = room + (index * size + lane) * 4
            store(place, out, one)
            store(place + 4 * WIDTH, out, other)
            for dim in range(dims):
                place, own = numbers + dim * LANES * 4, sums + dim * WIDTH * 4
                so_far = fma(load(place, out), one, load(own, out))
                store(own, out, fma(load(place + 4 * WIDTH, out), other, so_far))
    length = np.float32(0)
    for dim in range(dims):
        means[dim, 0] = total(load(sums + dim * WIDTH * 4, out))
        length += means[dim, 0] * means[dim, 0]
    length = max(np.sqrt(length), np.float32(1e-12))
    for dim in range(dims):
        means[dim, 0] /= length


@compiled
def cosines_of_block(
    base: int,
    ahead: int,
    starts: np.ndarray,
    size: int,
    like: np.ndarray,
    means: np.ndarray,
    out: np.ndarray,
    first: int,
) -> None:
    """Inverse lengths to cosines to the mean, in ``out`` from token ``first`` on.

    Of one block of a head; ``ahead`` is the page to ask for, ``means`` as :func:`find_mean`
    leaves them.
    """
    item = like.itemsize
    step, zero = WIDTH * item, splat(np.float32(0))
    room = address_of(out) + first * 4
    for lane in range(0, size, LANES):
        one, other = zero, zero
        for dim in range(starts.shape[0]):
            at = starts[dim] + lane * item
            fetch(ahead + at, like)
            mean = splat(means[dim, 0])
            one = fma(load(base + at, like), mean, one)
            other = fma(load(base + at + step, like), mean, other)
        place = room + lane * 4
        store(place, out, multiply(load(place, out), one))
        place += 4 * WIDTH
        store(place, out, multiply(load(place, out), other))


@compiled
def score_differences(
    keys: Place,
    size: int,
    like: np.ndarray,
    block: np.ndarray,
    means: np.ndarray,
    out: np.ndarray,
) -> None:
    """Scores of :class:`~vllm_kvcompress.methods.keydiff.KeyDiff`; room as of :func:`find_mean`."""
    find_mean(keys, size, like, block, means, out)
    # Backwards: what was read last is in a cache still, and what is read now last moves first.
    for index in range(keys.blocks.shape[0] - 1, -1, -1):
        base = keys.cache + keys.blocks[index] * keys.page
        ahead = keys.cache + keys.blocks[max(index - 1, 0)] * keys.page
        cosines_of_block(base, ahead, keys.starts, size, like, means, out, index * size)
    steps, inverse = splat(np.float32(-UNIT)), splat(np.float32(1 / UNIT))
    for place in range(address_of(out), address_of(out) + out.shape[0] * 4, WIDTH * 4):
        store(place, out, multiply(nearest(multiply(load(place, out), steps)), inverse))


@compiled
def _mean(numbers: np.ndarray) -> np.float32:
    """Of float32 numbers, a multiple of ``WIDTH``."""
    room, count = address_of(numbers), numbers.shape[0]
    found = np.float64(0)
    for first in range(0, count, PART):
        sums = splat(np.float32(0))
        for at in range(first, min(first + PART, count), WIDTH):
            sums = add(sums, load(room + at * 4, numbers))
        found += total(sums)
    return np.float32(found / count)


@compiled
def _deviation(numbers: np.ndarray, mean: np.float32) -> np.float32:
    """Root of the mean squared distance from the mean."""
    room, count = address_of(numbers), numbers.shape[0]
    middle = splat(mean)
    found = np.float64(0)
    for first in range(0, count, PART):
        sums = splat(np.float32(0))
        for at in range(first, min(first + PART, count), WIDTH):
            apart = subtract(load(room + at * 4, numbers), middle)
            sums = fma(apart, apart, sums)
        found += total(sums)
    return np.float32(np.sqrt(found / count))


@compiled
def _add_up(cosines: np.ndarray, norms: np.ndarray) -> None:
    """Squared norms of values and cosines to scores, in place of cosines; norms are lost."""
    room, other_room = address_of(cosines), address_of(norms)
    count = cosines.shape[0] * 4
    for at in range(0, count, WIDTH * 4):
        store(other_room + at, norms, square_root(load(other_room + at, norms)))
    middle, other_middle = _mean(cosines), _mean(norms)
    deviation, other_deviation = _deviation(cosines, middle), _deviation(norms, other_middle)
    # As in torch, rounding noise alone is not blown up; what is no number stays none.
    use = splat(np.float32(0 if deviation <= np.float32(1e-5) else 1))
    use_other = splat(np.float32(0 if other_deviation <= np.float32(1e-5) else 1))
    least = splat(np.float32(1e-6))
    width, other_width = largest(least, splat(deviation)), largest(least, splat(other_deviation))
    centre, other_centre = splat(middle), splat(other_middle)
    steps, inverse = splat(np.float32(UNIT)), splat(np.float32(1 / UNIT))
    for at in range(0, count, WIDTH * 4):
        long = divide(subtract(load(other_room + at, norms), other_centre), other_width)
        alike = divide(subtract(load(room + at, cosines), centre), width)
        score = subtract(multiply(long, use_other), multiply(alike, use))
        store(room + at, cosines, multiply(nearest(multiply(score, steps)), inverse))


@compiled
def score_keys_and_values(
    keys: Place,
    values: Place,
    across: bool,
    size: int,
    scale: float,
    like: np.ndarray,
    block: np.ndarray,
    means: np.ndarray,
    norms: np.ndarray,
    out: np.ndarray,
) -> None:
    """Scores of :class:`~vllm_kvcompress.methods.kvdiff.KVDiff`.

    Parameters
    ----------
    across : bool
        Whether a run of values is a dimension, as one of keys is.
    scale : float
        Of elements: differences of norms that are too small to count depend on it.
    block, means, out : np.ndarray
        As of :func:`find_mean`.
    norms : np.ndarray
        ``[n * size]``, float32, room.
    """
    find_mean(keys, size, like, block, means, out)
    factor = np.float32(scale) * np.float32(scale)
    # Backwards, as in score_differences.
    for index in range(keys.blocks.shape[0] - 1, -1, -1):
        later, first = max(index - 1, 0), index * size
        base = keys.cache + keys.blocks[index] * keys.page
        ahead = keys.cache + keys.blocks[later] * keys.page
        cosines_of_block(base, ahead, keys.starts, size, like, means, out, first)
        # Values come from memory while keys, which were read just before, are in a cache.
        base = values.cache + values.blocks[index] * values.page
        ahead = values.cache + values.blocks[later] * values.page
        norms_of_block(
            base, ahead, values.starts, values.run, across, size, factor, like, norms, first
        )
    _add_up(out, norms)
