"""Merging the blocks of all heads on the CPU, compiled.

Conventions are those of :mod:`~vllm_kvcompress.worker.cpu.moves` and
:mod:`~vllm_kvcompress.worker.cpu.pool`.
"""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import LANES, address_of, compiled, copy
from vllm_kvcompress.worker.cpu.moves import (
    Part,
    copy_blocks,
    in_order,
    move_head,
    move_pair,
    place_of,
    room_like,
)
from vllm_kvcompress.worker.cpu.pool import Turns, merge_head
from vllm_kvcompress.worker.cpu.ranks import choose, score_norms, squared_norms
from vllm_kvcompress.worker.cpu.steps import (
    LEVEL,
    LEVELS,
    OLDER,
    OUT,
    can_write_at_once,
    find_ways,
    order_steps,
)


@compiled
def merge(
    keys: Part,
    values: Part,
    size: int,
    sources: np.ndarray,
    merges: np.ndarray,
    outputs: np.ndarray,
    destinations: np.ndarray,
    pooling: int,
    turns: Turns,
    held: np.ndarray,
    whole: np.ndarray,
    like: np.ndarray,
) -> None:
    """Merge blocks of all heads by mean or maximum; ``whole`` is room for a part's outputs."""
    heads, layers, made = keys.starts.shape[0], keys.caches.shape[0], outputs.shape[0]
    steps = np.empty((merges.shape[0] + made, 4), np.int64)
    leaves, firsts = np.empty(sources.shape[0], np.int64), np.empty(made, np.int64)
    count = order_steps(merges, outputs, sources.shape[0], steps, leaves, firsts)
    steps = steps[:count]
    plain = can_write_at_once(steps, sources, destinations)
    dims = keys.starts.shape[1]
    numbers = np.empty(0, np.float32)
    held_starts = np.arange(dims) * (size * 4), np.arange(size) * (dims * 4)
    first = sources[leaves[0]]
    for layer in range(layers):
        for head in range(heads):
            for index in range(2):
                part = keys if index == 0 else values
                # What is read next, here or for the next head.
                next_part = values if index == 0 else keys
                next_head, next_layer = head + index, layer
                if next_head == heads:
                    next_head, next_layer = 0, min(layer + 1, layers - 1)
                after = next_part.caches[next_layer] + first * next_part.page
                after += next_part.starts[next_head, 0]
                written = place_of(part, layer, head, destinations)
                target = written if plain else room_like(written, whole)
                merge_head(
                    index == 0, place_of(part, layer, head, sources), target, leaves, steps,
                    size, dims, pooling, turns, None, held, held_starts[index], after, like,
                    numbers,
                )  # fmt: skip
                if not plain:
                    copy_blocks(target, written)


@compiled
def _play(
    norms: np.ndarray,
    size: int,
    steps: np.ndarray,
    winners: np.ndarray,
    held: np.ndarray,
    masks: np.ndarray,
) -> None:
    """Mark the tokens of one head that stay when the lower norm of each pair does.

    ``norms`` are bits of scores by source and slot, and higher ones win; ``held`` ``[LEVELS,
    size]`` and ``winners`` ``[size]`` are room for tokens on the way.
    """
    masks[:] = 0
    half = size // 2
    for step in range(steps.shape[0]):
        out = steps[step, OUT]
        made = winners if out >= 0 else held[-out - 1]
        if steps[step, LEVEL] < 0:
            for chunk in range(size // LANES):
                masks[steps[step, OLDER] * (size // LANES) + chunk] = np.uint32(0xFFFFFFFF)
            continue
        for side in range(2):
            source = steps[step, OLDER + side]
            if source >= 0:
                first = source * size
                for slot in range(half):
                    older = first + 2 * slot
                    made[side * half + slot] = older + (norms[older + 1] > norms[older])
            else:
                given = held[-source - 1]
                for slot in range(half):
                    older, newer = given[2 * slot], given[2 * slot + 1]
                    made[side * half + slot] = newer if norms[newer] > norms[older] else older
        if out >= 0:
            for slot in range(size):
                masks[made[slot] // LANES] |= np.uint32(1) << np.uint32(made[slot] % LANES)


@compiled
def keep_best(
    keys: Part,
    values: Part,
    size: int,
    sources: np.ndarray,
    merges: np.ndarray,
    outputs: np.ndarray,
    destinations: np.ndarray,
    scale: float,
    staging: np.ndarray,
    whole: np.ndarray,
    like: np.ndarray,
) -> None:
    """Merge blocks of all heads by choosing: tokens that win all of their pairs move."""
    heads, made = keys.starts.shape[0], outputs.shape[0]
    steps = np.empty((merges.shape[0] + made, 4), np.int64)
    leaves, firsts = np.empty(sources.shape[0], np.int64), np.empty(made, np.int64)
    count = order_steps(merges, outputs, sources.shape[0], steps, leaves, firsts)
    steps = steps[:count]
    for output in range(made):
        last = firsts[output + 1] if output + 1 < made else leaves.shape[0]
        leaves[firsts[output] : last].sort()
    plain = in_order(sources[leaves], destinations, firsts + 1)
    norms = np.empty(sources.shape[0] * size, np.float32)
    masks = np.empty(sources.shape[0] * (size // LANES), np.uint32)
    ordered = np.empty_like(masks)
    winners, held = np.empty(size, np.int64), np.empty((LEVELS, size), np.int64)
    per_block = size // LANES
    read = sources[leaves]
    for layer in range(keys.caches.shape[0]):
        for head in range(heads):
            squared_norms(
                keys.caches[layer], keys.page, keys.starts[head], keys.run, keys.across, size,
                sources, scale, like, norms,
            )  # fmt: skip
            score_norms(norms)
            _play(norms, size, steps, winners, held, masks)
            for index in range(leaves.shape[0]):
                for chunk in range(per_block):
                    own = masks[leaves[index] * per_block + chunk]
                    ordered[index * per_block + chunk] = own
            move_head(
                keys, values, layer, head, size, read, ordered, destinations, plain, staging,
                whole, like,
            )  # fmt: skip


@compiled
def _spread(values: np.ndarray, masks: np.ndarray, chosen: np.ndarray, rest: np.ndarray) -> None:
    """Part numbers of slots into those that are marked and the others."""
    found, others = 0, 0
    for slot in range(values.shape[0]):
        if masks[slot // LANES] >> np.uint32(slot % LANES) & np.uint32(1):
            chosen[found] = values[slot]
            found += 1
        else:
            rest[others] = values[slot]
            others += 1


@compiled
def merge_ranked(
    keys: Part,
    values: Part,
    size: int,
    sources: np.ndarray,
    pooled: int,
    exact: int,
    end: int,
    sinks: int,
    merges: np.ndarray,
    outputs: np.ndarray,
    destinations: np.ndarray,
    pooling: int,
    turns: Turns,
    centres: np.ndarray | None,
    scale: float,
    masks: np.ndarray,
    left_keys: np.ndarray,
    left_values: np.ndarray,
    held: np.ndarray,
    staging: np.ndarray,
    whole: np.ndarray,
    like: np.ndarray,
) -> None:
    """Keep the tokens of the lowest norms, and merge what they leave over.

    Parameters
    ----------
    sources : np.ndarray
        ``[n]``, int64: blocks, of which the first ``pooled`` merge whole.
    exact, end : int
        How many of the last sources hold tokens as they were computed, up to which position.
    outputs, destinations : np.ndarray
        ``[p]`` and ``[k]``, int64: outputs of merges go to the first ``p`` destinations, kept
        tokens to the others.
    centres : np.ndarray
        ``[layers]``, int64: addresses of ``[blocks, kv_heads, size]``, float32; ``None`` if
        keys do not turn.
    masks : np.ndarray
        ``[layers * kv_heads, (n - pooled) * size / LANES]``, uint32, filled: what was kept.
    left_keys, left_values : np.ndarray
        Room for a head's part of all sources.
    """
    (heads, dims), made, count = keys.starts.shape, outputs.shape[0], sources.shape[0]
    ranked, kept_to = sources[pooled:], destinations[made:]
    keep = kept_to.shape[0] * size
    left = count - kept_to.shape[0]
    per_block = size // LANES
    plain = in_order(ranked, kept_to, np.arange(1, kept_to.shape[0] + 1))
    steps = np.empty((merges.shape[0] + made, 4), np.int64)
    leaves, firsts = np.empty(left, np.int64), np.empty(made, np.int64)
    steps = steps[: order_steps(merges, outputs, left, steps, leaves, firsts)]
    scores = np.empty(ranked.shape[0] * size, np.float32)
    ranks = np.empty(scores.shape[0], np.int32)
    rest = np.empty(count * per_block, np.uint32)
    numbers = np.empty(0, np.float32)
    slots = np.empty(count * size, np.float32)
    kept_centres, left_centres = np.empty(keep, np.float32), np.empty((left, size), np.float32)
    held_centres = np.empty((LEVELS, size), np.float32)
    made_centres = np.empty((made, size), np.float32)
    ways = np.empty((steps.shape[0], size), np.float32)
    held_starts = np.arange(dims) * (size * 4), np.arange(size) * (dims * 4)
    for layer in range(keys.caches.shape[0]):
        for head in range(heads):
            row = masks[layer * heads + head]
            squared_norms(
                keys.caches[layer], keys.page, keys.starts[head], keys.run, keys.across, size,
                ranked, scale, like, scores,
            )  # fmt: skip
            score_norms(scores)
            choose(scores, keep, sinks, ranks, row)
            for chunk in range(pooled * per_block):
                rest[chunk] = np.uint32(0xFFFFFFFF)
            for chunk in range(row.shape[0]):
                rest[pooled * per_block + chunk] = ~row[chunk]
            if centres is not None:
                for block in range(count):
                    into = slots[block * size : (block + 1) * size]
                    if block < count - exact:
                        place = centres[layer] + (sources[block] * heads + head) * size * 4
                        copy(place, address_of(into), size * 4)
                    else:
                        for slot in range(size):
                            into[slot] = np.float32(end - (count - block) * size + slot)
                flat = left_centres.reshape(-1)
                flat[: pooled * size] = slots[: pooled * size]
                _spread(slots[pooled * size :], row, kept_centres, flat[pooled * size :])
                find_ways(steps, size, left_centres, held_centres, made_centres, ways)
            from_keys = place_of(keys, layer, head, sources)
            from_values = place_of(values, layer, head, sources)
            room_keys = room_like(place_of(keys, layer, head, leaves), left_keys)
            room_values = room_like(place_of(values, layer, head, leaves), left_values)
            move_pair(
                from_keys, room_keys, from_values, room_values, True, size, rest, staging, like
            )
            # What is kept moves first: outputs may go to where it was.
            move_head(
                keys, values, layer, head, size, ranked, row, kept_to, plain, staging, whole, like
            )
            written_keys = place_of(keys, layer, head, destinations)
            written_values = place_of(values, layer, head, destinations)
            if centres is None:
                merge_head(
                    True, room_keys, written_keys, leaves, steps, size, dims, pooling, turns,
                    None, held, held_starts[0], room_values.cache, like, numbers,
                )  # fmt: skip
            else:
                merge_head(
                    True, room_keys, written_keys, leaves, steps, size, dims, pooling, turns,
                    ways, held, held_starts[0], room_values.cache, like, numbers,
                )  # fmt: skip
            merge_head(
                False, room_values, written_values, leaves, steps, size, dims, pooling, turns,
                None, held, held_starts[1], room_keys.cache, like, numbers,
            )  # fmt: skip
            if centres is not None:
                for block in range(destinations.shape[0]):
                    place = centres[layer] + (destinations[block] * heads + head) * size * 4
                    if block < made:
                        copy(address_of(made_centres[block]), place, size * 4)
                    else:
                        first = (block - made) * size
                        copy(address_of(kept_centres[first:]), place, size * 4)
