"""In which order merges run, as kernels take it.

Output by output, so that what is made on the way stays in the processor's caches.
"""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import compiled

LEVELS = 32
"""More levels than any request reaches, and more blocks than are held on the way."""

LEVEL, OLDER, NEWER, OUT = 0, 1, 2, 3
"""Columns of steps. Sources and outputs count from 0, blocks held on the way from -1 down."""


@compiled
def find(sources: np.ndarray, destinations: np.ndarray) -> np.ndarray:
    """Which destination each source is, -1 where none, ``[n]``, int64."""
    found = np.full(sources.shape[0], -1)
    order = np.argsort(destinations)
    ordered = destinations[order]
    for index in range(sources.shape[0]):
        place = np.searchsorted(ordered, sources[index])
        if place < ordered.shape[0] and ordered[place] == sources[index]:
            found[index] = order[place]
    return found


@compiled
def order_steps(
    merges: np.ndarray,
    outputs: np.ndarray,
    count: int,
    steps: np.ndarray,
    leaves: np.ndarray,
    firsts: np.ndarray,
) -> int:
    """Merges one output after the other.

    Parameters
    ----------
    merges : np.ndarray
        ``[m, 3]``, int64: level, older and newer block of each merge, numbered as in
        :class:`~vllm_kvcompress.levels.Round`, behind ``count`` sources.
    outputs : np.ndarray
        ``[k]``, int64: blocks, by these numbers.
    steps : np.ndarray
        ``[m + k, 4]``, int64, filled: level, older, newer block, and the one that is made;
        a level of -1 is a source that moves to an output.
    leaves : np.ndarray
        ``[count]``, int64, filled with sources in the order in which they are read.
    firsts : np.ndarray
        ``[k]``, int64, filled: which of the leaves is an output's first.

    Returns
    -------
    int
        Steps.
    """
    todo = np.empty(2 * LEVELS, np.int64)
    held = np.empty(merges.shape[0], np.int64)
    free = np.arange(LEVELS, 0, -1)
    left = LEVELS
    done, read = 0, 0
    for index in range(outputs.shape[0]):
        firsts[index] = read
        if outputs[index] < count:
            steps[done, LEVEL], steps[done, OLDER] = -1, outputs[index]
            steps[done, NEWER], steps[done, OUT] = outputs[index], index
            leaves[read] = outputs[index]
            done, read = done + 1, read + 1
            continue
        todo[0], depth = outputs[index] - count, 1
        while depth:
            depth -= 1
            node = todo[depth]
            if node >= 0:
                # Again when both of its sources are there; the older one is made first.
                todo[depth] = -node - 1
                depth += 1
                for side in (NEWER, OLDER):
                    if merges[node, side] >= count:
                        todo[depth] = merges[node, side] - count
                        depth += 1
                continue
            node = -node - 1
            steps[done, LEVEL] = merges[node, LEVEL]
            final = depth == 0
            if not final:
                left -= 1
                held[node] = -free[left]
            steps[done, OUT] = index if final else held[node]
            for side in (OLDER, NEWER):
                block = merges[node, side]
                if block < count:
                    leaves[read] = block
                    read += 1
                else:
                    block = held[block - count]
                    free[left] = -block
                    left += 1
                steps[done, side] = block
            done += 1
    return done


@compiled
def can_write_at_once(steps: np.ndarray, sources: np.ndarray, destinations: np.ndarray) -> bool:
    """Whether outputs can be written when they are made: no step reads them later.

    A step reads its older block while it writes, row by row, and may do so in place.
    """
    found = find(sources, destinations)
    last = np.empty(destinations.shape[0], np.int64)
    for step in range(steps.shape[0]):
        if steps[step, OUT] >= 0:
            last[steps[step, OUT]] = step
    for step in range(steps.shape[0]):
        for side in (OLDER, NEWER):
            source = steps[step, side]
            if source < 0 or found[source] < 0:
                continue
            written = last[found[source]]
            in_place = side == OLDER or steps[step, LEVEL] < 0
            if step > written or (step == written and not in_place):
                return False
    return True


@compiled
def find_ways(
    steps: np.ndarray,
    size: int,
    centres: np.ndarray,
    held: np.ndarray,
    made: np.ndarray,
    ways: np.ndarray,
) -> None:
    """How far keys turn to the centre of each pair, by step, and the centres of outputs.

    ``centres`` and ``made`` are ``[n, size]`` and ``[k, size]``, of sources and outputs;
    ``held`` ``[LEVELS, size]`` is room, ``ways`` ``[steps, size]``; all float32.
    """
    half = size // 2
    for step in range(steps.shape[0]):
        out = steps[step, OUT]
        target = made[out] if out >= 0 else held[-out - 1]
        if steps[step, LEVEL] < 0:
            target[:] = centres[steps[step, OLDER]]
            continue
        for side in range(2):
            source = steps[step, OLDER + side]
            row = centres[source] if source >= 0 else held[-source - 1]
            for slot in range(half):
                older, newer = row[2 * slot], row[2 * slot + 1]
                ways[step, side * half + slot] = (newer - older) * np.float32(0.5)
                target[side * half + slot] = (older + newer) * np.float32(0.5)
