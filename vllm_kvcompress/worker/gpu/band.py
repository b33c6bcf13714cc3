"""A band's pages on a GPU, scored and moved by Triton kernels, all layers in one launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON, tl, triton

from vllm_kvcompress.methods import Method, ScoreContext
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.kvdiff import KVDiff
from vllm_kvcompress.methods.pooling import Pooling, Rotation
from vllm_kvcompress.worker.band import BandPages, tensor_of
from vllm_kvcompress.worker.gpu import kernels
from vllm_kvcompress.worker.layout import RAW_DTYPES
from vllm_kvcompress.worker.pages import LayerPages, RunPart, TokenMajor

logger = init_logger("vllm.kvcompress")

MAX_ROOM = 1 << 24
"""Most numbers of one kind (keys or values) that are moved by one pair of launches."""

TILE_NUMBERS = 4096
"""Numbers that a program of a kernel works on at once."""

TILES = 8
"""Tiles whose unit keys one program adds up."""

ELEMENTS: dict[torch.dtype, tuple[str, str]] = {
    torch.float32: ("float32", ""),
    torch.float16: ("float16", ""),
    torch.bfloat16: ("bfloat16", ""),
    torch.float8_e4m3fn: ("uint8", "e4m3"),
    torch.float8_e5m2: ("uint8", "e5m2"),
}
"""What Triton loads elements as, and the fp8 format that these bytes are decoded from."""

WORDS = {8: "int64", 4: "int32", 2: "int16", 1: "int8"}


class Runs(NamedTuple):
    """Where the runs of all layers are, as :mod:`~vllm_kvcompress.worker.gpu.kernels` takes it."""

    addresses: torch.Tensor
    """``[2, layers]``, int64."""
    starts: torch.Tensor
    """``[2, kv_heads, block_size]``, int64, in bytes."""
    page: int
    """Bytes."""
    word: int
    """Bytes of the widest words that all runs consist of, whole and aligned."""

    @classmethod
    def of(cls, keys: list[RunPart], values: list[RunPart], device: torch.device) -> Runs:
        """The runs of layers that are laid out alike."""
        item = keys[0].runs.element_size()
        addresses = [part.runs.data_ptr() for part in (*keys, *values)]
        starts = torch.stack([keys[0].starts, values[0].starts]) * item
        page, length = keys[0].page * item, keys[0].length * item
        word = math.gcd(max(WORDS), page, length, *addresses, *starts.flatten().tolist())
        on_device = tensor_of(starts.flatten().tolist(), device).view(starts.shape)
        return cls(tensor_of(addresses, device).view(2, -1), on_device, page, word)


@dataclass(frozen=True)
class TritonBandPages(BandPages):
    """Token-major pages on a GPU. Same results as the base, which remains the reference.

    Elements may be float32, float16, bfloat16 or fp8 of both kinds, which is decoded from its
    bits by the kernels. Merging, the choice by scores, and methods other than those by norms
    and directions are left to the base. Nothing here waits for the GPU.
    """

    working: ClassVar[bool] = True
    """Whether kernels are used; :meth:`warm_up` turns them off, for the life of the process."""

    @staticmethod
    def fits(layers: Mapping[int, LayerPages]) -> bool:
        """Whether pages of this layout can be moved by kernels, on a GPU or in the interpreter."""
        pages = next(iter(layers.values()))
        return (
            TritonBandPages.working
            and HAS_TRITON
            and (pages.device.type == "cuda" or bool(triton.knobs.runtime.interpret))
            and pages.element in ELEMENTS
            and isinstance(pages.keys, TokenMajor)
            and isinstance(pages.values, TokenMajor)
        )

    @functools.cached_property
    def _runs(self) -> Runs:
        keys, values = cast(list[RunPart], self._keys), cast(list[RunPart], self._values)
        return Runs.of(keys, values, self.device)

    @functools.cached_property
    def _parts(self) -> dict[tuple[int, ...], Self]:
        return {}

    def part(self, layers: Sequence[int]) -> Self:
        # Kept: addresses are copied to the GPU once.
        key = tuple(layers)
        if key not in self._parts:
            self._parts[key] = super().part(layers)
        return self._parts[key]

    @functools.cached_property
    def _tile(self) -> int:
        """Tokens to a program."""
        return max(1, TILE_NUMBERS // triton.next_power_of_2(self.shape[2]))

    @functools.cached_property
    def _numbers(self) -> dict[str, Any]:
        """What kernels that read numbers are compiled for."""
        size, heads, dim = self.shape
        loaded, fp8 = ELEMENTS[self._first.element]
        wide = triton.next_power_of_2(dim)
        common = {"HEADS": heads, "SIZE": size, "DIM": dim, "WIDE": wide, "TILE": self._tile}
        return {**common, "TYPE": getattr(tl, loaded), "FP8": fp8}

    @functools.cached_property
    def _moves(self) -> dict[str, Any]:
        """What kernels that move words are compiled for."""
        size, heads, dim = self.shape
        word = self._runs.word
        words = dim * self._first.element.itemsize // word
        wide = triton.next_power_of_2(words)
        common = {"HEADS": heads, "SIZE": size, "WORDS": words, "WIDE": wide, "TILE": self._tile}
        return {**common, "TYPE": getattr(tl, WORDS[word])}

    @property
    def _rows(self) -> int:
        return len(self.layers) * self.shape[1]

    def warm_up(self, pooling: Pooling | None, rotation: Rotation | None, ranked: bool) -> None:
        """Compile the kernels, and never use them if they do something else than torch does.

        What is compiled here differs by the GPU, and so may its mistakes.
        """
        # Imported late: it imports this module.
        from vllm_kvcompress.worker.gpu.trial import first_difference

        if not TritonBandPages.working:
            return
        try:
            wrong = first_difference(self)
        except Exception as error:
            # Whatever a compiler or a driver may raise; what torch does is always right.
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            TritonBandPages.working = False
            logger.warning(
                "kvcompress: TritonBandPages is not used and compactions run in torch: %s",
                wrong,
            )

    def squared_norms(self, blocks: torch.Tensor) -> torch.Tensor:
        if not self.working:
            return super().squared_norms(blocks)
        return self._squared_norms(blocks, 0)

    def _squared_norms(self, blocks: torch.Tensor, part: int) -> torch.Tensor:
        """Squared norms of keys (part 0) or values (1), ``[layers * kv_heads, tokens]``."""
        out = self._by_token(blocks)
        kernels.squared_norms[self._grid(out)](
            *self._where(blocks), out, out.shape[1], len(self.layers), part, self._runs.page,
            **self._numbers,
        )  # fmt: skip
        return out

    def _cosines(self, blocks: torch.Tensor) -> torch.Tensor:
        """Cosines of keys to the mean of the unit keys, ``[layers * kv_heads, tokens]``."""
        out, (rows, dim) = self._by_token(blocks), (self._rows, self.shape[2])
        counts = out.shape[1], len(self.layers), self._runs.page
        programs = triton.cdiv(out.shape[1], self._tile * TILES)
        sums = torch.empty(rows, programs, dim, device=self.device)
        kernels.add_unit_keys[programs, rows](
            *self._where(blocks), out, sums, *counts, TILES=TILES, **self._numbers
        )
        means = F.normalize(sums.sum(1), dim=-1)
        kernels.cosines[self._grid(out)](*self._where(blocks), means, out, *counts, **self._numbers)
        return out

    def _by_token(self, blocks: torch.Tensor) -> torch.Tensor:
        shape = self._rows, len(blocks) * self.shape[0]
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _grid(self, out: torch.Tensor) -> tuple[int, int]:
        return triton.cdiv(out.shape[1], self._tile), out.shape[0]

    def _where(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._runs.addresses, self._runs.starts, blocks

    def score(
        self, method: Method, context: Callable[[int], ScoreContext], blocks: torch.Tensor
    ) -> torch.Tensor:
        if self.working and type(method) is KeyDiff:
            return method.score_cosines(self._cosines(blocks))
        if self.working and type(method) is KVDiff:
            return method.score_parts(self._cosines(blocks), self._squared_norms(blocks, 1))
        return super().score(method, context, blocks)

    def move(self, sources: torch.Tensor, tokens: torch.Tensor, destinations: torch.Tensor) -> None:
        if not self.working:
            super().move(sources, tokens, destinations)
            return
        tokens = tokens.contiguous()
        for first, room in self._rooms(tokens.shape[1]):
            # All reads come before the writes: one launch ends before the next one begins.
            self._gather(sources, tokens, first, room)
            self._scatter(destinations, first, room)

    def _rooms(self, kept: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows by the handful: the first one, and room ``[2, rows, kept, head_dim]``, raw.

        No two rows share a byte of the pages, so that they can be moved one after the other.
        """
        if not kept:
            return
        dim, raw = self.shape[2], RAW_DTYPES[self._first.element.itemsize]
        each = max(1, MAX_ROOM // (kept * dim))
        for first in range(0, self._rows, each):
            rows = min(each, self._rows - first)
            yield first, torch.empty(2, rows, kept, dim, dtype=raw, device=self.device)

    def _gather(
        self, blocks: torch.Tensor, tokens: torch.Tensor, first: int, room: torch.Tensor
    ) -> None:
        _, rows, kept, _ = room.shape
        words = room.view(getattr(torch, WORDS[self._runs.word]))
        kernels.gather[triton.cdiv(kept, self._tile), rows, 2](
            *self._where(blocks), tokens, words, first, rows, kept, len(self.layers),
            self._runs.page, **self._moves,
        )  # fmt: skip

    def _scatter(self, blocks: torch.Tensor, first: int, room: torch.Tensor) -> None:
        _, rows, kept, _ = room.shape
        words = room.view(getattr(torch, WORDS[self._runs.word]))
        kernels.scatter[triton.cdiv(kept, self._tile), rows, 2](
            *self._where(blocks), words, first, rows, kept, len(self.layers), self._runs.page,
            **self._moves,
        )  # fmt: skip
