"""Merging on the CPU, compiled: each block is read once, pooled in float32 and written once.

Same results as :func:`~vllm_kvcompress.methods.pooling.merge_blocks` up to the order of
additions. Conventions are those of :mod:`~vllm_kvcompress.worker.cpu.moves`; keys lie
across tokens, values along them, as the CPU attention of vLLM has them.

Blocks are rows of elements, raw as in the cache or float32 where they were just made. ``half``
of a block made comes from its older source, half from its newer one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import compiled, elements_at, fetch
from vllm_kvcompress.worker.cpu.numbers import Format, decode, encode, number

MEAN, MAX, BEST = 0, 1, 2
"""Poolings, as kernels know them."""

NEAR = 11
"""Bits that :func:`~vllm_kvcompress.methods.base.settle_near_ties` rounds away."""


class Part(NamedTuple):
    """Where the keys, or the values, of a head lie in a page: spans one after another.

    Attributes
    ----------
    caches : np.ndarray
        ``[layers]``, int64, addresses.
    page : int
    starts : np.ndarray
        ``[kv_heads, spans]``, int64.
    length : int
        Elements per span.
    """

    caches: np.ndarray
    page: int
    starts: np.ndarray
    length: int


@compiled
def _turn_to_mean(
    block: np.ndarray,
    format: Format,
    size: int,
    pairs: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    out: np.ndarray,
    ahead: tuple[int, int],
) -> None:
    """Means of neighbours, turned half the way to each other, of a block's dimensions in pairs."""
    item = block.itemsize
    half = size // 2
    for pair in range(pairs.shape[1]):
        first, second = pairs[0, pair] * size, pairs[1, pair] * size
        for start in (first, second):
            fetch(ahead[0] + start * item, size * item)
            fetch(ahead[1] + start // 2 * item, size // 2 * item)
        one, two = block[first : first + size], block[second : second + size]
        to_one, to_two = out[first : first + half], out[second : second + half]
        c, s = cos[pair] * np.float32(0.5), sin[pair] * np.float32(0.5)
        for slot in range(half):
            older, newer = number(one[2 * slot], format), number(one[2 * slot + 1], format)
            other, another = number(two[2 * slot], format), number(two[2 * slot + 1], format)
            to_one[slot] = (older + newer) * c + (another - other) * s
            to_two[slot] = (other + another) * c + (older - newer) * s


@compiled
def _pool_across(
    block: np.ndarray,
    format: Format,
    size: int,
    first: int,
    pooling: int,
    picks: np.ndarray,
    out: np.ndarray,
    ahead: tuple[int, int],
) -> None:
    """Pool neighbours in the rows of a block from dimension ``first`` on."""
    half, item = size // 2, block.itemsize
    for dim in range(first, block.shape[0] // size):
        fetch(ahead[0] + dim * size * item, size * item)
        fetch(ahead[1] + dim * half * item, half * item)
        run, made = block[dim * size : (dim + 1) * size], out[dim * size : dim * size + half]
        if pooling == MEAN:
            for slot in range(half):
                older, newer = number(run[2 * slot], format), number(run[2 * slot + 1], format)
                made[slot] = (older + newer) * np.float32(0.5)
        elif pooling == MAX:
            for slot in range(half):
                older, newer = number(run[2 * slot], format), number(run[2 * slot + 1], format)
                made[slot] = max(older, newer)
        else:
            for slot in range(half):
                older, newer = number(run[2 * slot], format), number(run[2 * slot + 1], format)
                made[slot] = newer if picks[slot] else older


@compiled
def _pick(
    block: np.ndarray, format: Format, size: int, sums: np.ndarray, picks: np.ndarray
) -> None:
    """Whether the newer of two neighbours has the lower norm."""
    for token in range(size):
        sums[token] = 0
    for dim in range(block.shape[0] // size):
        run = block[dim * size : (dim + 1) * size]
        for token in range(size):
            own = number(run[token], format)
            sums[token] += own * own
    step = np.int32(1 << NEAR)
    for slot in range(size // 2):
        older = np.float32(sums[2 * slot]).view(np.int32) + (step >> 1)
        newer = np.float32(sums[2 * slot + 1]).view(np.int32) + (step >> 1)
        picks[slot] = (newer & -step) < (older & -step)


@compiled
def _pool_along(
    block: np.ndarray,
    format: Format,
    dims: int,
    pooling: int,
    picks: np.ndarray,
    out: np.ndarray,
    ahead: tuple[int, int],
) -> None:
    """Pool neighbouring rows ``[dims]`` of a block."""
    item = block.itemsize
    for slot in range(block.shape[0] // dims // 2):
        fetch(ahead[0] + 2 * slot * dims * item, 2 * dims * item)
        fetch(ahead[1] + slot * dims * item, dims * item)
        older = block[2 * slot * dims : (2 * slot + 1) * dims]
        newer = block[(2 * slot + 1) * dims : (2 * slot + 2) * dims]
        made = out[slot * dims : (slot + 1) * dims]
        if pooling == MEAN:
            for dim in range(dims):
                total = number(older[dim], format) + number(newer[dim], format)
                made[dim] = total * np.float32(0.5)
        elif pooling == MAX:
            for dim in range(dims):
                made[dim] = max(number(older[dim], format), number(newer[dim], format))
        else:
            chosen = newer if picks[slot] else older
            for dim in range(dims):
                made[dim] = number(chosen[dim], format)


@compiled
def _pool(
    block: np.ndarray,
    format: Format,
    keys: bool,
    size: int,
    pooling: int,
    pairs: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    sums: np.ndarray,
    picks: np.ndarray,
    out: np.ndarray,
    ahead: tuple[int, int],
) -> None:
    """Pool the slots of one block into one half of another.

    On the way ask for what is needed soon: a block at ``ahead[0]``, half a block at the other.
    """
    if not keys:
        _pool_along(block, format, block.shape[0] // size, pooling, picks, out, ahead)
        return
    if pooling == BEST:
        _pick(block, format, size, sums, picks)
    _turn_to_mean(block, format, size, pairs, cos, sin, out, ahead)
    _pool_across(block, format, size, 2 * pairs.shape[1], pooling, picks, out, ahead)


@compiled
def _address(part: Part, layer: int, head: int, block: int, item: int) -> int:
    """Where a head's part of a block begins."""
    return part.caches[layer] + (block * part.page + part.starts[head, 0]) * item


@compiled
def merge_part(
    part: Part,
    keys: bool,
    size: int,
    like: np.ndarray,
    format: Format,
    sources: np.ndarray,
    merges: np.ndarray,
    outputs: np.ndarray,
    destinations: np.ndarray,
    pooling: int,
    pairs: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    picks: np.ndarray,
    gathered: np.ndarray,
    scratch: np.ndarray,
) -> None:
    """Merge the keys, or after them the values, of blocks of all layers.

    Parameters
    ----------
    part : Part
    keys : bool
    size : int
        Tokens per block.
    like : np.ndarray
        Of the raw type.
    sources, destinations : np.ndarray
        ``[n]`` and ``[k]``, int64.
    merges : np.ndarray
        ``[3, m]``, int64: level, older and newer block of each merge, numbered as in
        :class:`~vllm_kvcompress.levels.Round`.
    outputs : np.ndarray
        ``[k]``, int64: blocks, by these numbers, to write to the destinations.
    pairs : np.ndarray
        ``[2, n]``, int64: dimensions that turn together, the first ``2 n``; none if keys do
        not turn.
    cos, sin : np.ndarray
        ``[levels, n]``, float32: of half the angle between two slots of a level.
    picks : np.ndarray
        ``[layers * kv_heads, m, size]``, bool: found with the keys, used with the values.
    gathered : np.ndarray
        ``[head_dim * size]``, raw: room.
    scratch : np.ndarray
        ``[m + k + 1, head_dim * size]``, float32: room.
    """
    heads, spans = part.starts.shape
    length = part.length
    count, made = sources.shape[0], merges.shape[1]
    half, half_block = size // 2, scratch.shape[1] // 2
    layers, item = part.caches.shape[0], like.itemsize
    for layer in range(layers):
        cache = elements_at(part.caches[layer], like)
        for head in range(heads):
            for index in range(made):
                level, out = merges[0, index], scratch[index]
                # What is read next, here or for the next head.
                after, next_head, next_layer = index + 1, head, layer
                if after == made:
                    after, next_head = 0, head + 1
                    if next_head == heads:
                        next_head, next_layer = 0, min(layer + 1, layers - 1)
                for side in range(2):
                    source = merges[1 + side, index]
                    chosen = picks[layer * heads + head, index, side * half : (side + 1) * half]
                    # Keys lie across: a half is half of each row. Values: of all rows.
                    into = out[side * (half if keys else half_block) :]
                    # Where there is nothing to ask for, what is at hand does no harm.
                    next_block = sources[min(merges[1 + side, after], count - 1)]
                    written = destinations[min(index, destinations.shape[0] - 1)]
                    ahead = (
                        _address(part, next_layer, next_head, next_block, item),
                        _address(part, layer, head, written, item) + side * half_block * item,
                    )
                    turns = pairs, cos[level], sin[level], scratch[-1], chosen, into, ahead
                    if source >= count:
                        block = scratch[source - count]
                        _pool(block, format, keys, size, pooling, *turns)
                        continue
                    first = sources[source] * part.page
                    if spans == 1:
                        start = first + part.starts[head, 0]
                        block_in_place = cache[start : start + length]
                        _pool(block_in_place, format, keys, size, pooling, *turns)
                        continue
                    for span in range(spans):
                        start = first + part.starts[head, span]
                        gathered[span * length : (span + 1) * length] = cache[
                            start : start + length
                        ]
                    _pool(gathered, format, keys, size, pooling, *turns)
            # Every read comes before the writes: a destination may be a source.
            for index in range(outputs.shape[0]):
                if outputs[index] < count:
                    first = sources[outputs[index]] * part.page
                    for span in range(spans):
                        start = first + part.starts[head, span]
                        target = scratch[made + index, span * length : (span + 1) * length]
                        decode(cache[start : start + length], format, target)
            for index in range(outputs.shape[0]):
                moved = outputs[index] < count
                block = scratch[made + index if moved else outputs[index] - count]
                first = destinations[index] * part.page
                for span in range(spans):
                    start = first + part.starts[head, span]
                    numbers = block[span * length : (span + 1) * length]
                    encode(numbers, format, cache[start : start + length])
