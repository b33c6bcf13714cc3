"""A band's pages on the CPU, moved by compiled kernels."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch

from vllm_kvcompress.levels import Round
from vllm_kvcompress.methods import select_tokens
from vllm_kvcompress.methods.pooling import Best, Max, Mean, Pooling, Rotation
from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.cpu import merge, moves
from vllm_kvcompress.worker.cpu.intrinsics import LANES, LINE
from vllm_kvcompress.worker.cpu.merge import Part
from vllm_kvcompress.worker.cpu.numbers import FORMATS
from vllm_kvcompress.worker.layout import RAW_DTYPES
from vllm_kvcompress.worker.pages import LayerPages, RunPart, TokenMinor

KERNELS: dict[type, int] = {Mean: merge.MEAN, Max: merge.MAX, Best: merge.BEST}

LEVELS = 32
"""More levels than any request reaches."""

FLOATS = np.dtype(np.float32)

_rooms = threading.local()


def scratch(dtype: np.dtype, *shape: int, purpose: str = "") -> np.ndarray:
    """Room of this shape, for each purpose the same memory at every call of a thread."""
    held: dict[str, np.ndarray] = _rooms.__dict__
    key, elements = f"{dtype.name} {purpose}", math.prod(shape)
    if key not in held or len(held[key]) < elements:
        held[key] = np.empty(elements, dtype)
    return held[key][:elements].reshape(shape)


class Runs(NamedTuple):
    """One part (keys or values) of all layers, as kernels take it."""

    each: Part
    """Every run by itself."""
    joined: Part
    """Runs that follow one another as one."""
    across: bool
    """Whether a run is one dimension of a block, not one token."""

    @classmethod
    def of(cls, parts: list[RunPart]) -> Runs:
        """The runs of parts that are laid out alike."""
        first, addresses = parts[0], [part.runs.data_ptr() for part in parts]
        starts = first.starts.numpy()
        each = joined = Part(np.array(addresses, np.int64), first.page, starts, first.length)
        if bool((np.diff(starts, axis=1) == first.length).all()):
            whole = starts.shape[1] * first.length
            joined = each._replace(starts=starts[:, :1].copy(), length=whole)
        return cls(each, joined, isinstance(first, TokenMinor))


@functools.lru_cache(maxsize=8)
def _turns(rotation: Rotation | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dimensions that turn together, cosines and sines by level, for ``merge_part``."""
    if rotation is None:
        return np.empty((2, 0), np.int64), *np.empty((2, LEVELS, 0), np.float32)
    pairs = np.arange(len(rotation.angles), dtype=np.int64)
    # Two slots of a level are 2**level positions apart; each turns half the way.
    angles = torch.outer(2.0 ** torch.arange(-1, LEVELS - 1), rotation.angles.cpu())
    dimensions = (pairs, pairs + len(pairs)) if rotation.neox else (2 * pairs, 2 * pairs + 1)
    return np.stack(dimensions), angles.cos().numpy(), angles.sin().numpy()


@dataclass(frozen=True)
class CompiledBandPages(BandPages):
    """Pages in runs on the CPU. Same results as the base, which remains the reference."""

    @staticmethod
    def fits(layers: Mapping[int, LayerPages]) -> bool:
        """Whether pages of this layout can be moved by kernels."""
        pages = next(iter(layers.values()))
        return (
            pages.device.type == "cpu"
            and pages.element in FORMATS
            and pages.shape[0] % LANES == 0
            and isinstance(pages.keys, RunPart)
            and isinstance(pages.values, RunPart)
        )

    @functools.cached_property
    def _key_runs(self) -> Runs:
        return Runs.of(cast(list[RunPart], self._keys))

    @functools.cached_property
    def _value_runs(self) -> Runs:
        return Runs.of(cast(list[RunPart], self._values))

    @functools.cached_property
    def _element(self) -> torch.dtype:
        return self._first.element

    @functools.cached_property
    def _raw(self) -> torch.dtype:
        return RAW_DTYPES[self._element.itemsize]

    @functools.cached_property
    def _like(self) -> np.ndarray:
        return torch.empty(0, dtype=self._raw).numpy()

    def warm_up(self, pooling: Pooling | None) -> None:
        """Move the null block onto itself once, so that no request waits for a compiler."""
        null = torch.zeros(1, dtype=torch.int64)
        size, heads, _ = self.shape
        self.read_float_keys(null)
        self.select(self.squared_norms(null), size, 0)
        tokens = torch.arange(size).expand(len(self.layers) * heads, size).contiguous()
        self.move(null, tokens, null)
        if pooling is not None:
            self.read_slots(null)
            self.write(null, self.read_keys(null), self.read_values(null))
            self.merge([0, 0], [Round(0, [0], [1])], [0], [0], pooling, None)

    def read_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._read(self._key_runs, blocks)

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._read(self._value_runs, blocks)

    def read_float_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        # Valid until the next call: fresh memory of this size costs more than the reading.
        runs = self._key_runs
        out = scratch(FLOATS, *self._shape_read(runs, blocks), purpose="keys")
        moves.read_numbers(
            *runs.each[:3], blocks.numpy(), runs.across, self._like, FORMATS[self._element], out
        )
        return self._as_elements(runs, torch.from_numpy(out))

    def read_slots(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size, heads, dim = self.shape
        found = []
        for purpose, runs in (("keys", self._key_runs), ("values", self._value_runs)):
            shape = (len(self.layers), heads, len(blocks) * size, dim)
            out = scratch(FLOATS, *shape, purpose=purpose)
            more = self._like, FORMATS[self._element], out
            if runs.across:
                moves.read_tokens_across(*runs.each, blocks.numpy(), *more)
            else:
                moves.read_numbers(*runs.each[:3], blocks.numpy(), False, *more)
            found.append(torch.from_numpy(out).flatten(0, 1))
        return found[0], found[1]

    def squared_norms(self, blocks: torch.Tensor) -> torch.Tensor:
        runs = self._key_runs
        size, heads, _ = self.shape
        out = torch.empty(len(self.layers) * heads, len(blocks) * size)
        kernel = moves.squared_norms_across if runs.across else moves.squared_norms_along
        format = FORMATS[self._element]
        kernel(*runs.each, blocks.numpy(), self._like, format, out.numpy())
        return out

    def select(self, scores: torch.Tensor, keep: int, sinks: int) -> torch.Tensor:
        if keep <= sinks:
            return select_tokens(scores, keep, sinks)
        # The smallest score that is kept.
        rank = scores.shape[1] - keep + 1
        least = torch.kthvalue(scores[:, sinks:], rank, dim=1).values
        out = torch.empty(len(scores), keep, dtype=torch.int64)
        moves.choose(scores.numpy(), least.numpy(), sinks, out.numpy())
        return out

    def move(self, sources: torch.Tensor, tokens: torch.Tensor, destinations: torch.Tensor) -> None:
        arrays = sources.numpy(), tokens.numpy(), destinations.numpy()
        for runs in (self._key_runs, self._value_runs):
            if runs.across:
                # An odd number of cache lines: rows that are a power of two apart collide.
                per_line = LINE // self._like.itemsize
                lines = (tokens.shape[1] + LANES) // per_line + 1
                width = (lines | 1) * per_line
                room = scratch(self._like.dtype, runs.each.starts.shape[1], width)
                moves.move_across(*runs.each, *arrays, room)
            else:
                room = scratch(self._like.dtype, tokens.shape[1] * runs.each.length)
                moves.move_along(*runs.each, *arrays, room)

    def merge(
        self,
        sources: Sequence[int],
        rounds: Sequence[Round],
        outputs: Sequence[int],
        destinations: Sequence[int],
        pooling: Pooling,
        rotation: Rotation | None,
    ) -> None:
        keys, values = self._key_runs, self._value_runs
        if not keys.across or values.across or type(pooling) not in KERNELS:
            super().merge(sources, rounds, outputs, destinations, pooling, rotation)
            return
        merges = np.array(
            [
                (level, older, newer)
                for level, *pairs in rounds
                for older, newer in zip(*pairs, strict=True)
            ],
            np.int64,
        ).reshape(-1, 3)
        made = len(merges)
        size, heads, dim = self.shape
        rows = len(self.layers) * heads
        blocks = made + len(outputs) + 1
        common = (
            size,
            self._like,
            FORMATS[self._element],
            np.array(sources, np.int64),
            merges.T.copy(),
            np.array(outputs, np.int64),
            np.array(destinations, np.int64),
            KERNELS[type(pooling)],
            *_turns(rotation if pooling.needs_rotation else None),
            scratch(np.dtype(np.bool_), rows, made, size),
            scratch(self._like.dtype, dim * size),
            scratch(FLOATS, blocks, dim * size),
        )
        merge.merge_part(keys.joined, True, *common)
        merge.merge_part(values.joined, False, *common)

    def write(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._write(self._key_runs, blocks, keys)
        self._write(self._value_runs, blocks, values)

    def _read(self, runs: Runs, blocks: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self._shape_read(runs, blocks), dtype=self._raw)
        moves.read_runs(*runs.each[:3], blocks.numpy(), runs.across, out.numpy())
        return self._as_elements(runs, out)

    def _shape_read(self, runs: Runs, blocks: torch.Tensor) -> tuple[int, int, int, int]:
        heads, count = runs.each.starts.shape
        return len(self.layers), heads, count * len(blocks), runs.each.length

    def _as_elements(self, runs: Runs, read: torch.Tensor) -> torch.Tensor:
        heads, count = runs.each.starts.shape
        rows = len(self.layers) * heads
        if runs.across:
            return read.view(rows, count, -1).transpose(1, 2)
        return read.view(rows, -1, runs.each.length)

    def _write(self, runs: Runs, blocks: torch.Tensor, elements: torch.Tensor) -> None:
        if runs.across:
            elements = elements.transpose(1, 2)
        values = elements.reshape(self._shape_read(runs, blocks)).contiguous().numpy()
        moves.write_runs(*runs.each[:3], blocks.numpy(), runs.across, values)
