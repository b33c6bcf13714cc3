"""Whole blocks on the CPU, read and written by compiled kernels.

Conventions are those of :mod:`~vllm_kvcompress.worker.cpu.moves`. Runs are ordered by run,
then block if they lie across tokens, else by block, then run.
"""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.worker.cpu.intrinsics import address_of, compiled, copy
from vllm_kvcompress.worker.cpu.moves import Part
from vllm_kvcompress.worker.cpu.vectors import WIDTH, load, multiply, splat, store


@compiled
def _row(part: Part, layer: int, head: int, block: int, run: int, blocks: int) -> int:
    """Which of all runs that are read comes from a run of a block."""
    heads, runs = part.starts.shape
    first = (layer * heads + head) * runs * blocks
    return first + (block + run * blocks if part.across else block * runs + run)


@compiled
def read_runs(part: Part, blocks: np.ndarray, out: np.ndarray) -> None:
    """Copy all runs of some blocks to ``out`` ``[layers, kv_heads, runs * n, length]``, raw."""
    heads, runs = part.starts.shape
    room, count = address_of(out), blocks.shape[0]
    for layer in range(part.caches.shape[0]):
        for head in range(heads):
            for block in range(count):
                base = part.caches[layer] + blocks[block] * part.page
                for run in range(runs):
                    row = _row(part, layer, head, block, run, count)
                    copy(base + part.starts[head, run], room + row * part.run, part.run)


@compiled
def write_runs(part: Part, blocks: np.ndarray, values: np.ndarray) -> None:
    """Copy ``values``, as :func:`read_runs` gives them, to all runs of some blocks."""
    heads, runs = part.starts.shape
    room, count = address_of(values), blocks.shape[0]
    for layer in range(part.caches.shape[0]):
        for head in range(heads):
            for block in range(count):
                base = part.caches[layer] + blocks[block] * part.page
                for run in range(runs):
                    row = _row(part, layer, head, block, run, count)
                    copy(room + row * part.run, base + part.starts[head, run], part.run)


@compiled
def read_numbers(
    part: Part, blocks: np.ndarray, scale: float, like: np.ndarray, out: np.ndarray
) -> None:
    """As :func:`read_runs`, as float32 numbers."""
    heads, runs = part.starts.shape
    room, count, item = address_of(out), blocks.shape[0], like.itemsize
    factors = splat(np.float32(scale))
    for layer in range(part.caches.shape[0]):
        for head in range(heads):
            for block in range(count):
                base = part.caches[layer] + blocks[block] * part.page
                for run in range(runs):
                    place = room + _row(part, layer, head, block, run, count) * out.shape[3] * 4
                    for at in range(0, part.run, WIDTH * item):
                        own = load(base + part.starts[head, run] + at, like)
                        store(place + at // item * 4, out, multiply(own, factors))
