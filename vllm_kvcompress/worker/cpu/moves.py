"""Page moves on the CPU, compiled, one KV head of one layer at a time.

Each does what some lines of torch in :mod:`~vllm_kvcompress.worker.band` do, which remain the
reference. What they share:

part
    Keys or values of all layers, see :class:`Part`.
masks
    ``[n * size / LANES]``, uint32: a bit for each token of some blocks, set if it stays.
like
    Tells the type of the elements, see :data:`~vllm_kvcompress.worker.cpu.numbers.TAGS`.
sources, destinations
    ``[n]`` and ``[k]``, int64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import (
    LANES,
    LINE,
    address_of,
    compiled,
    compress,
    copy,
    fetch,
    fetch_bytes,
    lowest,
    ones,
)
from vllm_kvcompress.worker.cpu.steps import find

AHEAD = 3
"""Chunks of tokens between those that are copied and those that are fetched."""


class Part(NamedTuple):
    """Where keys, or values, are.

    Attributes
    ----------
    caches : np.ndarray
        ``[layers]``, int64, addresses.
    page : int
        Bytes from one block to the next.
    starts : np.ndarray
        ``[kv_heads, runs]``, int64: bytes from a page's start to each contiguous run.
    run : int
        Bytes of a run.
    across : bool
        Whether a run is one dimension of a block, *across* tokens, or one token, *along* them.
    """

    caches: np.ndarray
    page: int
    starts: np.ndarray
    run: int
    across: bool


class Place(NamedTuple):
    """The runs of one head in some blocks.

    Attributes
    ----------
    cache : int
        Address.
    page, starts, run
        As of :class:`Part`, ``starts`` of this head.
    blocks : np.ndarray
        ``[n]``, int64.
    """

    cache: int
    page: int
    starts: np.ndarray
    run: int
    blocks: np.ndarray


@compiled
def in_order(sources: np.ndarray, destinations: np.ndarray, ends: np.ndarray) -> bool:
    """Whether blocks can be written one by one.

    ``ends`` ``[k]``: how many sources have been read when a destination is written. None of
    the others may be a destination until then.
    """
    found = find(sources, destinations)
    for index in range(sources.shape[0]):
        if found[index] >= 0 and index >= ends[found[index]]:
            return False
    return True


@compiled
def _flush(staged: int, width: int, used: int, cache: int, starts: np.ndarray, run: int) -> None:
    """Write a run of each dimension, and move up the ``used`` bytes behind it."""
    for dim in range(starts.shape[0]):
        row = staged + dim * width
        copy(row, cache + starts[dim], run)
        if used > run:
            copy(row + run, row, width - run)


@compiled
def _squeeze(
    base: int,
    ahead: int,
    starts: np.ndarray,
    lane: int,
    mask: int,
    staged: int,
    width: int,
    like: np.ndarray,
) -> None:
    """Put the chosen of ``LANES`` tokens of a block behind those that are staged."""
    for dim in range(starts.shape[0]):
        start = starts[dim] + lane
        fetch(ahead + start, like)
        compress(base + start, staged + dim * width, mask, like)


@compiled
def _fetch_tokens(base: int, starts: np.ndarray, first: int, mask: int, run: int) -> None:
    while mask:
        fetch_bytes(base + starts[first + lowest(mask)], run)
        mask &= mask - 1


@compiled
def move_across(
    source: Place,
    target: Place,
    size: int,
    masks: np.ndarray,
    staging: np.ndarray,
    like: np.ndarray,
) -> None:
    """Move tokens where a run is one dimension.

    ``staging`` has ``head_dim`` rows of ``size + LANES`` elements.
    """
    move_pair(source, target, source, target, False, size, masks, staging, like)


@compiled
def move_pair(
    source: Place,
    target: Place,
    values: Place,
    values_target: Place,
    with_values: bool,
    size: int,
    masks: np.ndarray,
    staging: np.ndarray,
    like: np.ndarray,
) -> None:
    """As :func:`move_across`, and on the way values where a run is one token.

    Values are few and far apart, and come while the keys keep the processor busy.
    """
    item = like.itemsize
    starts, blocks = source.starts, source.blocks
    width, run = (size + LANES) * item, size * item
    staged = address_of(staging)
    staged = (staged + LINE - 1) & -LINE
    per_block = size // LANES
    filled, done, slot, values_done = 0, 0, 0, 0
    last = blocks.shape[0] * per_block - 1
    length = values.run
    for chunk in range(last + 1):
        block, first = chunk // per_block, chunk % per_block * LANES
        base = source.cache + blocks[block] * source.page
        mask = np.int64(masks[chunk])
        if with_values and chunk + AHEAD <= last:
            later = chunk + AHEAD
            place = values.cache + blocks[later // per_block] * values.page
            tokens = np.int64(masks[later])
            _fetch_tokens(place, values.starts, later % per_block * LANES, tokens, length)
        if mask == 0:
            continue
        # What comes next, or where nothing of it stays, what is at hand.
        ahead, ahead_first = base, first
        if chunk < last and masks[chunk + 1]:
            ahead = source.cache + blocks[(chunk + 1) // per_block] * source.page
            ahead_first = (chunk + 1) % per_block * LANES
        lane = first * item
        ahead += (ahead_first - first) * item
        _squeeze(base, ahead, starts, lane, mask, staged + filled, width, like)
        filled += ones(mask) * item
        if filled >= run:
            written = target.cache + target.blocks[done] * target.page
            _flush(staged, width, filled, written, target.starts, run)
            filled -= run
            done += 1
        if with_values:
            place = values.cache + blocks[block] * values.page
            while mask:
                written = values_target.cache
                written += values_target.blocks[values_done] * values_target.page
                copy(
                    place + values.starts[first + lowest(mask)],
                    written + values_target.starts[slot],
                    length,
                )
                mask &= mask - 1
                slot += 1
                if slot == size:
                    slot = 0
                    values_done += 1


@compiled
def move_along(source: Place, target: Place, masks: np.ndarray) -> None:
    """Move tokens where a run is one token."""
    starts, run = source.starts, source.run
    size = starts.shape[0]
    per_block = size // LANES
    slot, done = 0, 0
    last = source.blocks.shape[0] * per_block - 1
    for chunk in range(-AHEAD, last + 1):
        later = chunk + AHEAD
        if later <= last:
            base = source.cache + source.blocks[later // per_block] * source.page
            tokens = np.int64(masks[later])
            _fetch_tokens(base, starts, later % per_block * LANES, tokens, run)
        if chunk < 0:
            continue
        base = source.cache + source.blocks[chunk // per_block] * source.page
        first = chunk % per_block * LANES
        mask = np.int64(masks[chunk])
        while mask:
            written = target.cache + target.blocks[done] * target.page
            copy(base + starts[first + lowest(mask)], written + target.starts[slot], run)
            mask &= mask - 1
            slot += 1
            if slot == size:
                slot = 0
                done += 1


@compiled
def copy_blocks(source: Place, target: Place) -> None:
    """Copy all runs of a head of some blocks to other blocks."""
    last = source.blocks.shape[0] - 1
    for index in range(last + 1):
        base = source.cache + source.blocks[index] * source.page
        ahead = source.cache + source.blocks[min(index + 1, last)] * source.page
        written = target.cache + target.blocks[index] * target.page
        for run in range(source.starts.shape[0]):
            fetch_bytes(ahead + source.starts[run], source.run)
            copy(base + source.starts[run], written + target.starts[run], source.run)


@compiled
def place_of(part: Part, layer: int, head: int, blocks: np.ndarray) -> Place:
    """Where a head's runs of some blocks are."""
    return Place(part.caches[layer], part.page, part.starts[head], part.run, blocks)


@compiled
def room_like(place: Place, room: np.ndarray) -> Place:
    """Room for the runs of as many blocks, one after another."""
    runs = place.starts.shape[0]
    starts, blocks = np.arange(runs) * place.run, np.arange(place.blocks.shape[0])
    return Place(address_of(room), runs * place.run, starts, place.run, blocks)


@compiled
def move_head(
    keys: Part,
    values: Part,
    layer: int,
    head: int,
    size: int,
    sources: np.ndarray,
    masks: np.ndarray,
    destinations: np.ndarray,
    plain: bool,
    staging: np.ndarray,
    whole: np.ndarray,
    like: np.ndarray,
) -> None:
    """Move the tokens of one head that stay.

    ``plain`` if destinations can be written one by one; else all of them are first made in
    ``whole``, room for as many.
    """
    if plain and keys.across and not values.across:
        move_pair(
            place_of(keys, layer, head, sources),
            place_of(keys, layer, head, destinations),
            place_of(values, layer, head, sources),
            place_of(values, layer, head, destinations),
            True,
            size,
            masks,
            staging,
            like,
        )
        return
    for part in (keys, values):
        source = place_of(part, layer, head, sources)
        written = place_of(part, layer, head, destinations)
        target = written if plain else room_like(written, whole)
        if part.across:
            move_across(source, target, size, masks, staging, like)
        else:
            move_along(source, target, masks)
        if not plain:
            copy_blocks(target, written)


@compiled
def move(
    keys: Part,
    values: Part,
    size: int,
    sources: np.ndarray,
    masks: np.ndarray,
    destinations: np.ndarray,
    staging: np.ndarray,
    whole: np.ndarray,
    like: np.ndarray,
) -> None:
    """Move tokens of all heads, with masks ``[layers * kv_heads, n * size / LANES]``."""
    plain = in_order(sources, destinations, np.arange(1, destinations.shape[0] + 1))
    heads = keys.starts.shape[0]
    for layer in range(keys.caches.shape[0]):
        for head in range(heads):
            row = masks[layer * heads + head]
            move_head(
                keys, values, layer, head, size, sources, row, destinations, plain, staging,
                whole, like,
            )  # fmt: skip
