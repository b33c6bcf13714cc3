"""A band's pages on the CPU, moved by compiled kernels."""

from __future__ import annotations

import functools
import math
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import llvmlite.binding
import numpy as np
import torch

from vllm_kvcompress.levels import Round
from vllm_kvcompress.methods import Method, ScoreContext
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.kvdiff import KVDiff
from vllm_kvcompress.methods.pooling import Best, Max, Mean, Pooling, Rotation
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.streaming import Streaming
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.cpu import evict, merge, moves, pool, ranks, runs
from vllm_kvcompress.worker.cpu.intrinsics import LANES, LINE
from vllm_kvcompress.worker.cpu.moves import Part
from vllm_kvcompress.worker.cpu.numbers import SCALES, TAGS
from vllm_kvcompress.worker.cpu.pool import Turns
from vllm_kvcompress.worker.cpu.steps import LEVELS
from vllm_kvcompress.worker.cpu.vectors import WIDTH
from vllm_kvcompress.worker.layout import RAW_DTYPES
from vllm_kvcompress.worker.pages import LayerPages, RunPart, TokenMinor

POOLINGS: dict[type, int] = {Mean: pool.MEAN, Max: pool.MAX, Best: pool.BEST}
METHODS: dict[type, int] = {
    KNorm: evict.KNORM,
    KeyDiff: evict.KEYDIFF,
    KVDiff: evict.KVDIFF,
    Random: evict.RANDOM,
    Streaming: evict.STREAMING,
}
"""What kernels know by themselves; other methods score in torch."""

FLOATS = np.dtype(np.float32)
NO_SCORES, NO_KEYS = np.empty((1, 0), np.float32), np.empty(0, np.int64)

_rooms = threading.local()


def scratch(dtype: np.dtype, *shape: int, purpose: str = "") -> np.ndarray:
    """Room of this shape, for each purpose the same memory at every call of a thread.

    Fresh memory costs more than the moves.
    """
    held: dict[tuple[np.dtype, str], np.ndarray] = _rooms.__dict__.setdefault("held", {})
    key, elements = (dtype, purpose), math.prod(shape)
    if key not in held or len(held[key]) < elements:
        held[key] = np.empty(elements, dtype)
    return held[key][:elements].reshape(shape)


class Runs(NamedTuple):
    """One part (keys or values) of all layers."""

    part: Part
    length: int
    """Elements per run."""

    @classmethod
    def of(cls, parts: list[RunPart]) -> Runs:
        """The runs of parts that are laid out alike."""
        first, addresses = parts[0], [part.runs.data_ptr() for part in parts]
        item = first.runs.element_size()
        starts = np.ascontiguousarray(first.starts.numpy() * item)
        across = isinstance(first, TokenMinor)
        caches = np.array(addresses, np.int64)
        part = Part(caches, first.page * item, starts, first.length * item, across)
        return cls(part, first.length)


@functools.lru_cache(maxsize=8)
def turns_of(rotation: Rotation | None) -> Turns:
    """Dimensions that turn together and how far."""
    if rotation is None:
        none = np.empty((LEVELS, 0), np.float32)
        return Turns(np.empty((2, 0), np.int64), none, none, np.empty(0, np.float32))
    pairs = np.arange(len(rotation.angles), dtype=np.int64)
    # Two slots of a level are 2**level positions apart; each turns half the way.
    angles = torch.outer(2.0 ** torch.arange(-1, LEVELS - 1), rotation.angles.cpu())
    dimensions = (pairs, pairs + len(pairs)) if rotation.neox else (2 * pairs, 2 * pairs + 1)
    halves = (angles.cos() / 2).numpy(), (angles.sin() / 2).numpy()
    return Turns(np.stack(dimensions), *halves, rotation.angles.cpu().numpy())


@functools.cache
def converts_halves() -> bool:
    """Whether the processor turns 16-bit floats into others by itself."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or bool(llvmlite.binding.get_host_cpu_features().get("f16c"))


@dataclass(frozen=True)
class CompiledBandPages(BandPages):
    """Pages in runs on the CPU. Same results as the base, which remains the reference."""

    @staticmethod
    def fits(layers: Mapping[int, LayerPages]) -> bool:
        """Whether pages of this layout can be moved by kernels."""
        pages = next(iter(layers.values()))
        size, _, dim = pages.shape
        return (
            pages.device.type == "cpu"
            and converts_halves()
            and pages.element in TAGS
            and size % LANES == 0
            and dim % WIDTH == 0
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
    def _raw(self) -> torch.dtype:
        return RAW_DTYPES[self._first.element.itemsize]

    @functools.cached_property
    def _like(self) -> np.ndarray:
        return np.empty(0, TAGS[self._first.element])

    @functools.cached_property
    def _scale(self) -> float:
        return SCALES.get(self._first.element, 1.0)

    @functools.cached_property
    def _size(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def _rows(self) -> int:
        return len(self.layers) * self.shape[1]

    def warm_up(self, pooling: Pooling | None, rotation: Rotation | None, ranked: bool) -> None:
        """Move the null block onto itself once, so that no request waits for a compiler."""
        size, heads, _ = self.shape
        self.evict(Streaming(), lambda layer: ScoreContext(layer, size), [0], [0], 0)
        if pooling is None:
            return
        if not ranked:
            self.merge([0], [Round(0, [], [])], [0], [0], pooling, None)
        elif self.merges_ranked(KNorm(), pooling):
            centres = {layer: torch.zeros(1, heads, size) for layer in self.layers}
            turned = {} if rotation is None else centres
            self._merge_ranked([0, 0], 0, 0, size, 0, [], [0], [0, 0], pooling, rotation, turned)

    def _rooms(self, blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Room for moving, and for a head's part of some blocks."""
        size, _, dim = self.shape
        tag = self._like.dtype
        return (
            scratch(tag, dim * (size + LANES) + LINE, purpose="staging"),
            scratch(tag, blocks * dim * size, purpose="whole"),
        )

    def read_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._read(self._key_runs, blocks)

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._read(self._value_runs, blocks)

    def read_float_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        # Valid until the next call: fresh memory of this size costs more than the reading.
        own = self._key_runs
        out = scratch(FLOATS, *self._shape_read(own, blocks), purpose="keys")
        runs.read_numbers(own.part, blocks.numpy(), self._scale, self._like, out)
        return self._as_elements(own, torch.from_numpy(out))

    def squared_norms(self, blocks: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self._rows, len(blocks) * self._size)
        keys = self._key_runs.part
        ranks.all_squared_norms(
            keys, self._size, blocks.numpy(), self._scale, self._like, out.numpy()
        )
        return out

    def select(self, scores: torch.Tensor, keep: int, sinks: int) -> torch.Tensor:
        rows, tokens = scores.shape
        chunks = -(-tokens // LANES)
        masks = np.empty((rows, chunks), np.uint32)
        room = scratch(np.dtype(np.int32), chunks * LANES, purpose="ranks")
        ranks.choose_all(scores.contiguous().numpy(), keep, sinks, room, masks)
        return tokens_of(masks, keep)

    def evict(
        self,
        method: Method,
        context: Callable[[int], ScoreContext],
        sources: Sequence[int],
        destinations: Sequence[int],
        sinks: int,
        kept_wanted: bool = False,
    ) -> torch.Tensor | None:
        size, heads, _ = self.shape
        tokens, keep = len(sources) * size, len(destinations) * size
        keys = self._key_runs.part
        kind = METHODS.get(type(method), evict.GIVEN)
        if kind in (evict.KEYDIFF, evict.KVDIFF) and not keys.across:
            kind = evict.GIVEN
        drawn, read = NO_KEYS, np.array(sources, np.int64)
        if kind == evict.GIVEN:
            scores = self.score(method, context, torch.from_numpy(read)).contiguous().numpy()
        elif kind == evict.STREAMING:
            scores = NO_SCORES
        else:
            scores = scratch(FLOATS, 1 + method.needs_values, tokens, purpose="scores")
        if isinstance(method, Random):
            own = [method.keys_of_heads(context(layer), heads) for layer in self.layers]
            drawn = np.array(own, np.int64).reshape(-1)
        masks = scratch(np.dtype(np.uint32), self._rows, tokens // LANES, purpose="masks")
        evict.evict(
            keys,
            self._value_runs.part,
            size,
            read,
            np.array(destinations, np.int64),
            min(sinks, keep),
            kind,
            drawn,
            self._scale,
            scores,
            masks,
            *self._rooms(len(destinations)),
            self._like,
        )
        return tokens_of(masks, keep) if kept_wanted else None

    def move(self, sources: torch.Tensor, tokens: torch.Tensor, destinations: torch.Tensor) -> None:
        chosen = np.zeros((len(tokens), len(sources) * self._size), np.bool_)
        np.put_along_axis(chosen, tokens.numpy(), True, axis=1)
        masks = np.packbits(chosen, axis=1, bitorder="little").view(np.uint32)
        moves.move(
            self._key_runs.part,
            self._value_runs.part,
            self._size,
            sources.numpy(),
            masks,
            destinations.numpy(),
            *self._rooms(len(destinations)),
            self._like,
        )

    def merge(
        self,
        sources: Sequence[int],
        rounds: Sequence[Round],
        outputs: Sequence[int],
        destinations: Sequence[int],
        pooling: Pooling,
        rotation: Rotation | None,
    ) -> None:
        keys, values = self._key_runs.part, self._value_runs.part
        kind = POOLINGS.get(type(pooling))
        if not keys.across or values.across or kind is None:
            super().merge(sources, rounds, outputs, destinations, pooling, rotation)
            return
        size, _, dim = self.shape
        common = (
            keys,
            values,
            size,
            np.array(sources, np.int64),
            merges_of(rounds),
            np.array(outputs, np.int64),
            np.array(destinations, np.int64),
        )
        staging, whole = self._rooms(len(destinations))
        if kind == pool.BEST:
            merge.keep_best(*common, self._scale, staging, whole, self._like)
            return
        turns = turns_of(rotation if pooling.needs_rotation else None)
        held = scratch(FLOATS, LEVELS, dim * size, purpose="held")
        merge.merge(*common, kind, turns, held, whole, self._like)

    def merges_ranked(self, method: Method, pooling: Pooling) -> bool:
        layout = self._key_runs.part.across and not self._value_runs.part.across
        return layout and type(method) is KNorm and type(pooling) in (Mean, Max)

    def merge_ranked(
        self,
        plan: CompactionPlan,
        pooling: Pooling,
        rotation: Rotation | None,
        centres: Mapping[int, torch.Tensor],
        kept_wanted: bool,
    ) -> torch.Tensor | None:
        kept = (len(plan.destinations) - len(plan.outputs)) * self._size
        masks = self._merge_ranked(
            plan.sources,
            plan.pooled,
            plan.exact,
            plan.end,
            plan.sinks,
            plan.rounds,
            plan.outputs,
            plan.destinations,
            pooling,
            rotation,
            centres,
        )
        return tokens_of(masks, kept) if kept_wanted else None

    def _merge_ranked(
        self,
        sources: Sequence[int],
        pooled: int,
        exact: int,
        end: int,
        sinks: int,
        rounds: Sequence[Round],
        outputs: Sequence[int],
        destinations: Sequence[int],
        pooling: Pooling,
        rotation: Rotation | None,
        centres: Mapping[int, torch.Tensor],
    ) -> np.ndarray:
        """Masks of what was kept."""
        size, _, dim = self.shape
        tag, blocks = self._like.dtype, len(sources)
        places = None
        if centres:
            places = np.array([centres[layer].data_ptr() for layer in self.layers], np.int64)
        chunks = (blocks - pooled) * size // LANES
        masks = scratch(np.dtype(np.uint32), self._rows, chunks, purpose="masks")
        merge.merge_ranked(
            self._key_runs.part,
            self._value_runs.part,
            size,
            np.array(sources, np.int64),
            pooled,
            exact,
            end,
            sinks,
            merges_of(rounds),
            np.array(outputs, np.int64),
            np.array(destinations, np.int64),
            POOLINGS[type(pooling)],
            turns_of(rotation if pooling.needs_rotation else None),
            places,
            self._scale,
            masks,
            scratch(tag, blocks * dim * size, purpose="left keys"),
            scratch(tag, blocks * dim * size, purpose="left values"),
            scratch(FLOATS, LEVELS, dim * size, purpose="held"),
            *self._rooms(len(destinations)),
            self._like,
        )
        return masks

    def write(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._write(self._key_runs, blocks, keys)
        self._write(self._value_runs, blocks, values)

    def _read(self, own: Runs, blocks: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self._shape_read(own, blocks), dtype=self._raw)
        runs.read_runs(own.part, blocks.numpy(), out.numpy())
        return self._as_elements(own, out)

    def _shape_read(self, own: Runs, blocks: torch.Tensor) -> tuple[int, int, int, int]:
        heads, count = own.part.starts.shape
        return len(self.layers), heads, count * len(blocks), own.length

    def _as_elements(self, own: Runs, read: torch.Tensor) -> torch.Tensor:
        if own.part.across:
            return read.view(self._rows, own.part.starts.shape[1], -1).transpose(1, 2)
        return read.view(self._rows, -1, own.length)

    def _write(self, own: Runs, blocks: torch.Tensor, elements: torch.Tensor) -> None:
        if own.part.across:
            elements = elements.transpose(1, 2)
        values = elements.reshape(self._shape_read(own, blocks)).contiguous().numpy()
        runs.write_runs(own.part, blocks.numpy(), values)


def merges_of(rounds: Sequence[Round]) -> np.ndarray:
    """Level, older and newer block of each merge, ``[m, 3]``, int64."""
    merges = [(level, *pair) for level, *pairs in rounds for pair in zip(*pairs, strict=True)]
    return np.array(merges, np.int64).reshape(-1, 3)


def tokens_of(masks: np.ndarray, keep: int) -> torch.Tensor:
    """Tokens ``[rows, keep]``, int64, that are marked in ``[rows, chunks]``."""
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(bits.nonzero()[1].reshape(len(masks), keep))
