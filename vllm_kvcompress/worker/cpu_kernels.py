"""Page moves on the CPU, compiled: one pass over the cache instead of one per tensor operation.

Each does what a few lines of torch in :mod:`~vllm_kvcompress.worker.pages` do, which remain
the reference. ``flat`` is a layer's cache as one row of raw integers, ``page`` its elements
per block, ``table`` the offset of each run in its page. Loops are spelled out where numba
would otherwise check for overlap at every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding.ffi
import numba
import numpy as np


def _hide_from_vllm() -> None:
    """Let vLLM start another engine in a process that has imported numba.

    Target: ``llvmlite.binding.ffi.lib``. Why: vLLM's CPU platform looks at the ``__dict__``
    of every object in every module when an engine starts
    (``triton_utils.dispatcher._rebind_kernels``), and this one answers with a function for
    any name, so that the second engine of a process fails. Upstream plan: ``patches/``
    proposes that vLLM looks at dictionaries only.
    """
    wrapper = type(llvmlite.binding.ffi.lib)
    original = wrapper.__getattr__

    def without_special_names(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    wrapper.__getattr__ = without_special_names


_hide_from_vllm()


def _compiled(function: Callable[..., None]) -> Any:
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # nowhere to keep compiled code
        return numba.njit(nogil=True, error_model="numpy")(function)


@_compiled
def read_runs(
    flat: np.ndarray,
    page: int,
    table: np.ndarray,
    blocks: np.ndarray,
    out: np.ndarray,
    run_first: bool,
    shift: int,
) -> None:
    """Copy all runs of some blocks to rows ``out``, in the order of :func:`write_runs`.

    Shifted by 16 bits, bfloat16 numbers become the bits of float32 numbers, int32.
    """
    heads, runs = table.shape
    count, length = blocks.shape[0], out.shape[1]
    per_run, per_block = (count, 1) if run_first else (1, runs)
    for head in range(heads):
        for block in range(count):
            first = blocks[block] * page
            row = head * runs * count + block * per_block
            for run in range(runs):
                start = first + table[head, run]
                source = flat[start : start + length]
                target = out[row + run * per_run]
                for index in range(length):
                    target[index] = np.int32(source[index]) << np.int32(shift)


@_compiled
def write_runs(
    flat: np.ndarray,
    page: int,
    table: np.ndarray,
    blocks: np.ndarray,
    values: np.ndarray,
    run_first: bool,
) -> None:
    """Copy rows ``values`` to all runs ``[heads, runs]`` of some blocks.

    Rows are in the order of heads, runs, blocks if ``run_first``, else heads, blocks, runs.
    """
    heads, runs = table.shape
    count, length = blocks.shape[0], values.shape[1]
    per_run, per_block = (count, 1) if run_first else (1, runs)
    for head in range(heads):
        for block in range(count):
            first = blocks[block] * page
            row = head * runs * count + block * per_block
            for run in range(runs):
                start = first + table[head, run]
                source = values[row + run * per_run]
                target = flat[start : start + length]
                for index in range(length):
                    target[index] = source[index]


@_compiled
def take_across_runs(
    flat: np.ndarray,
    page: int,
    table: np.ndarray,
    length: int,
    blocks: np.ndarray,
    tokens: np.ndarray,
    out: np.ndarray,
) -> None:
    """Tokens ``[heads, n]`` where a run is one dimension, to ``out`` ``[heads, dims, n]``.

    Tokens ascend: those of one block are taken together, while it is in the nearest cache.
    """
    heads, dims, count = out.shape
    slots = np.empty(length, np.int64)
    for head in range(heads):
        done = 0
        while done < count:
            block = tokens[head, done] // length
            found = 0
            while done + found < count and tokens[head, done + found] // length == block:
                slots[found] = tokens[head, done + found] - block * length
                found += 1
                if found == length:
                    break
            first = blocks[block] * page
            for dim in range(dims):
                start = first + table[head, dim]
                source = flat[start : start + length]
                target = out[head, dim, done : done + found]
                for index in range(found):
                    target[index] = source[slots[index]]
            done += found


@_compiled
def take_runs(
    flat: np.ndarray,
    page: int,
    table: np.ndarray,
    blocks: np.ndarray,
    tokens: np.ndarray,
    out: np.ndarray,
) -> None:
    """Tokens ``[heads, n]`` where a run is one token, to ``out`` ``[heads, n, dims]``."""
    heads, count, dims = out.shape
    size = table.shape[1]
    for head in range(heads):
        for index in range(count):
            token = tokens[head, index]
            block = token // size
            start = blocks[block] * page + table[head, token - block * size]
            source = flat[start : start + dims]
            target = out[head, index]
            for dim in range(dims):
                target[dim] = source[dim]
