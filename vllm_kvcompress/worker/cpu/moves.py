"""Page moves on the CPU, compiled: one pass over the pages of all layers of a band.

Each does what some lines of torch in :mod:`~vllm_kvcompress.worker.band` do, which remain the
reference. What they share:

caches
    ``[layers]``, int64: address of each layer's cache, in raw elements of ``like``'s type.
page
    Elements from one block to the next.
starts
    ``[kv_heads, runs]``: where each contiguous run begins in its page. *Across* tokens a run
    is one dimension of a block, *along* them one token.
blocks, sources, destinations
    ``[n]``, int64.
scratch
    Room to work in, kept from call to call: fresh memory costs more than the moves.
"""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import (
    LANES,
    compiled,
    compress,
    copy,
    elements_at,
    fetch,
)
from vllm_kvcompress.worker.cpu.numbers import Format, decode, number

AHEAD = 16
"""Tokens between the one that is copied and the one that is fetched."""


@compiled
def move_across(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    size: int,
    sources: np.ndarray,
    tokens: np.ndarray,
    destinations: np.ndarray,
    scratch: np.ndarray,
) -> None:
    """Move tokens ``[layers * kv_heads, kept]`` where a run is one dimension.

    Tokens ascend. ``scratch`` is ``[>= head_dim, >= kept + LANES]``, raw.
    """
    heads, dims = starts.shape
    kept, item = tokens.shape[1], scratch.itemsize
    width = scratch.shape[1]
    flat = scratch.reshape(-1)
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], scratch)
        for head in range(heads):
            row = tokens[layer * heads + head]
            done = 0
            block = 0
            while done < kept:
                chunk = row[done] // LANES
                mask = np.int64(0)
                found = 0
                while done + found < kept and row[done + found] < (chunk + 1) * LANES:
                    mask |= np.int64(1) << (row[done + found] - chunk * LANES)
                    found += 1
                while chunk * LANES >= (block + 1) * size:
                    block += 1
                first = sources[block] * page + chunk * LANES - block * size
                ahead = sources[min(block + 1, sources.shape[0] - 1)] * page
                for dim in range(dims):
                    fetch(caches[layer] + (ahead + starts[head, dim]) * item, size * item)
                    start = first + starts[head, dim]
                    compress(cache, start, flat, dim * width + done, mask)
                done += found
            for index in range(destinations.shape[0]):
                first = destinations[index] * page
                ahead = destinations[min(index + 1, destinations.shape[0] - 1)] * page
                for dim in range(dims):
                    fetch(caches[layer] + (ahead + starts[head, dim]) * item, size * item)
                    start = dim * width + index * size
                    copy(flat, start, cache, first + starts[head, dim], size)


@compiled
def move_along(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    length: int,
    sources: np.ndarray,
    tokens: np.ndarray,
    destinations: np.ndarray,
    scratch: np.ndarray,
) -> None:
    """Move tokens ``[layers * kv_heads, kept]`` where a run is one token.

    ``scratch`` is ``[>= kept * length]``, raw.
    """
    heads, size = starts.shape
    kept, item = tokens.shape[1], scratch.itemsize
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], scratch)
        for head in range(heads):
            row = tokens[layer * heads + head]
            block, later = 0, 0
            for index in range(-AHEAD, kept):
                if index + AHEAD < kept:
                    token = row[index + AHEAD]
                    while token >= (later + 1) * size:
                        later += 1
                    start = sources[later] * page + starts[head, token - later * size]
                    fetch(caches[layer] + (start) * item, length * item)
                if index >= 0:
                    token = row[index]
                    while token >= (block + 1) * size:
                        block += 1
                    start = sources[block] * page + starts[head, token - block * size]
                    copy(cache, start, scratch, index * length, length)
            for block in range(kept // size):
                first = destinations[block] * page
                ahead = destinations[min(block + 1, kept // size - 1)] * page
                for token in range(size):
                    fetch(caches[layer] + (ahead + starts[head, token]) * item, length * item)
                    start = first + starts[head, token]
                    copy(scratch, (block * size + token) * length, cache, start, length)


@compiled
def squared_norms_across(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    size: int,
    blocks: np.ndarray,
    like: np.ndarray,
    format: Format,
    out: np.ndarray,
) -> None:
    """Squared norms ``[layers * kv_heads, n * size]``, float32, of keys with a run a dimension."""
    heads, dims = starts.shape
    item = like.itemsize
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], like)
        for head in range(heads):
            for index in range(blocks.shape[0]):
                ahead = blocks[min(index + 1, blocks.shape[0] - 1)] * page
                for lane in range(0, size, LANES):
                    first = index * size + lane
                    sums = out[layer * heads + head, first : first + LANES]
                    for token in range(LANES):
                        sums[token] = 0
                    for dim in range(dims):
                        start = starts[head, dim] + lane
                        fetch(caches[layer] + (ahead + start) * item, LANES * item)
                        start += blocks[index] * page
                        run = cache[start : start + LANES]
                        for token in range(LANES):
                            own = number(run[token], format)
                            sums[token] += own * own


@compiled(fastmath={"reassoc", "contract"})
def squared_norms_along(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    length: int,
    blocks: np.ndarray,
    like: np.ndarray,
    format: Format,
    out: np.ndarray,
) -> None:
    """As :func:`squared_norms_across`, of keys with a run a token."""
    heads, size = starts.shape
    item = like.itemsize
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], like)
        for head in range(heads):
            for index in range(blocks.shape[0]):
                ahead = blocks[min(index + 1, blocks.shape[0] - 1)] * page
                for token in range(size):
                    fetch(caches[layer] + (ahead + starts[head, token]) * item, length * item)
                    start = blocks[index] * page + starts[head, token]
                    run = cache[start : start + length]
                    total = np.float32(0)
                    for dim in range(length):
                        own = number(run[dim], format)
                        total += own * own
                    out[layer * heads + head, index * size + token] = total


@compiled
def choose(scores: np.ndarray, least: np.ndarray, sinks: int, out: np.ndarray) -> None:
    """Tokens ``[rows, keep]`` with a score above ``least`` ``[rows]``, and the oldest with it.

    As many as ``out`` holds; the first ``sinks`` whatever their score. A score that is no
    number counts as the highest.
    """
    rows, tokens = scores.shape
    keep = out.shape[1]
    for row in range(rows):
        own, limit, kept = scores[row], least[row], out[row]
        above = 0
        for token in range(sinks, tokens):
            above += (own[token] > limit) | ((own[token] != own[token]) & (limit == limit))
        equal = keep - sinks - above
        done = 0
        for token in range(tokens):
            score = own[token]
            if token >= sinks and not (score > limit or (score != score and limit == limit)):
                if equal == 0 or score < limit or (score == score and limit != limit):
                    continue
                equal -= 1
            kept[done] = token
            done += 1


@compiled
def read_runs(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    blocks: np.ndarray,
    across: bool,
    out: np.ndarray,
) -> None:
    """Copy all runs of some blocks to ``out`` ``[layers, kv_heads, runs * n, length]``, raw.

    Ordered by run, then block if ``across``, else by block, then run.
    """
    heads, runs = starts.shape
    count, length = blocks.shape[0], out.shape[3]
    per_run, per_block = (count, 1) if across else (1, runs)
    flat = out.reshape(-1)
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], out)
        for head in range(heads):
            first = (layer * heads + head) * runs * count
            for block in range(count):
                for run in range(runs):
                    start = blocks[block] * page + starts[head, run]
                    row = first + block * per_block + run * per_run
                    copy(cache, start, flat, row * length, length)


@compiled
def write_runs(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    blocks: np.ndarray,
    across: bool,
    values: np.ndarray,
) -> None:
    """Copy ``values``, as :func:`read_runs` gives them, to all runs of some blocks."""
    heads, runs = starts.shape
    count, length = blocks.shape[0], values.shape[3]
    per_run, per_block = (count, 1) if across else (1, runs)
    flat = values.reshape(-1)
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], values)
        for head in range(heads):
            first = (layer * heads + head) * runs * count
            for block in range(count):
                for run in range(runs):
                    start = blocks[block] * page + starts[head, run]
                    row = first + block * per_block + run * per_run
                    copy(flat, row * length, cache, start, length)


@compiled
def read_numbers(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    blocks: np.ndarray,
    across: bool,
    like: np.ndarray,
    format: Format,
    out: np.ndarray,
) -> None:
    """As :func:`read_runs`, as float32 numbers."""
    heads, runs = starts.shape
    count, length = blocks.shape[0], out.shape[3]
    per_run, per_block = (count, 1) if across else (1, runs)
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], like)
        for head in range(heads):
            for block in range(count):
                for run in range(runs):
                    start = blocks[block] * page + starts[head, run]
                    row = out[layer, head, block * per_block + run * per_run]
                    decode(cache[start : start + length], format, row)


@compiled
def read_tokens_across(
    caches: np.ndarray,
    page: int,
    starts: np.ndarray,
    size: int,
    blocks: np.ndarray,
    like: np.ndarray,
    format: Format,
    out: np.ndarray,
) -> None:
    """Elements with a run a dimension as numbers ``[layers, kv_heads, n * size, head_dim]``."""
    heads, dims = starts.shape
    item = like.itemsize
    for layer in range(caches.shape[0]):
        cache = elements_at(caches[layer], like)
        for head in range(heads):
            for index in range(blocks.shape[0]):
                ahead = blocks[min(index + 1, blocks.shape[0] - 1)] * page
                rows = out[layer, head, index * size : (index + 1) * size]
                for dim in range(dims):
                    fetch(caches[layer] + (ahead + starts[head, dim]) * item, size * item)
                    start = blocks[index] * page + starts[head, dim]
                    run = cache[start : start + size]
                    for token in range(size):
                        rows[token, dim] = number(run[token], format)
