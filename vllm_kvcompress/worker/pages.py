"""Reading and writing keys and values in the pages of a layer.

What :mod:`~vllm_kvcompress.worker.layout` has learned about a page decides how elements
are moved: in contiguous runs where there are any, one by one where there are none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from vllm_kvcompress.methods import take_tokens
from vllm_kvcompress.worker.layout import (
    FP8_DTYPES,
    RAW_DTYPES,
    PageLayoutError,
    learn_offsets,
)


class LayerPages:
    """Keys and values in the pages of one layer.

    Parameters
    ----------
    layer : torch.nn.Module
        vLLM attention layer, with its ``impl`` and its bound ``kv_cache``.
    cache : torch.Tensor
        The layer's cache ``[blocks, head_slots, block_size, content]`` in manager blocks.
    block_size, num_heads, head_dim : int
        Tokens per block, KV heads held here, elements per key.
    cache_dtype : str
        vLLM's name of the cache type.

    Attributes
    ----------
    keys, values : PagePart
    shape : tuple of int
        ``(block_size, num_heads, head_dim)``.

    Raises
    ------
    PageLayoutError
        If an element cannot be found, or the layout is not regular.
    """

    def __init__(
        self,
        layer: Any,
        cache: torch.Tensor,
        block_size: int,
        num_heads: int,
        head_dim: int,
        cache_dtype: str,
    ) -> None:
        self.element = FP8_DTYPES.get(cache_dtype, cache.dtype)
        self.shape = (block_size, num_heads, head_dim)
        self.device = cache.device
        raw = cache.view(RAW_DTYPES[cache.element_size()])
        keys, values = learn_offsets(layer, cache, self.element, self.shape)
        self.keys = _part(raw, keys)
        self.values = _part(raw, values)
        self._offsets = torch.stack([keys, values])
        self._page = raw.stride(0)

    def lie_like(self, other: LayerPages) -> bool:
        """Whether each element is at the same place of its page as in another layer."""
        same = self.element == other.element and self._page == other._page
        return same and torch.equal(self._offsets, other._offsets)

    def as_float(self, elements: torch.Tensor) -> torch.Tensor:
        """Raw integers as float32 numbers (without the layer's fp8 scale)."""
        return elements.view(self.element).float()

    def as_raw(self, numbers: torch.Tensor) -> torch.Tensor:
        """Float32 numbers as raw integers of the cache's type, the inverse of as_float."""
        if self.element.itemsize == 1:
            # Turning a key may lead past the largest fp8 number, which is no number any more.
            most = torch.finfo(self.element).max
            numbers = numbers.clamp(-most, most)
        return numbers.to(self.element).view(RAW_DTYPES[self.element.itemsize])


class PagePart(ABC):
    """The keys or the values in the pages of one layer.

    Blocks are given as ``[n]``, int64, on the cache's device; elements are raw integers
    ``[kv_heads, n * block_size, head_dim]`` in block order, not always contiguous. Methods
    on several layers take their parts, this one first, and have heads of all in one axis.
    """

    @abstractmethod
    def read_layers(self, parts: Sequence[Any], blocks: torch.Tensor) -> torch.Tensor:
        """Copy the elements of some blocks."""

    @abstractmethod
    def take_layers(
        self, parts: Sequence[Any], blocks: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Copy some tokens of some blocks.

        Parameters
        ----------
        parts : sequence of PagePart
        blocks : torch.Tensor
            ``[n]``, int64.
        tokens : torch.Tensor
            ``[layers * kv_heads, kept]``, int64, indices into the blocks' tokens.

        Returns
        -------
        torch.Tensor
            ``[layers * kv_heads, kept, head_dim]``.
        """

    @abstractmethod
    def write(self, blocks: torch.Tensor, elements: torch.Tensor) -> None:
        """Fill blocks with elements."""

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Copy the elements of some blocks of this layer."""
        return self.read_layers([self], blocks)

    def take(self, blocks: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Copy some tokens ``[kv_heads, kept]`` of some blocks of this layer."""
        return self.take_layers([self], blocks, tokens)


class RunPart(PagePart):
    """A part whose elements lie in contiguous runs.

    Parameters
    ----------
    raw : torch.Tensor
        The layer's cache in manager blocks, raw.
    table : torch.Tensor
        ``[kv_heads, runs]``: start of each run in its page, a multiple of ``length``.
    length : int
        Elements per run.
    """

    def __init__(self, raw: torch.Tensor, table: torch.Tensor, length: int) -> None:
        self.heads = table.shape[0]
        self.length = length
        self.runs = _runs(raw, length)
        self.page_runs = raw.stride(0) // length
        self.table = (table // length).contiguous().to(raw.device)
        self.page = raw.stride(0)
        self.starts = table.contiguous()

    run_first: ClassVar[bool]
    """Whether elements in block order are ordered by run, then block, or the other way."""

    @classmethod
    @abstractmethod
    def shaped(cls, rows: torch.Tensor, heads: int, runs: int) -> torch.Tensor:
        """Runs in the part's order, ``[heads * runs * n, length]``, as elements."""

    def read_layers(self, parts: Sequence[RunPart], blocks: torch.Tensor) -> torch.Tensor:
        heads, runs = self.table.shape
        ids = self._ids(blocks)
        rows = torch.cat([part.runs.index_select(0, ids) for part in parts])
        return self.shaped(rows, len(parts) * heads, runs)

    def write(self, blocks: torch.Tensor, elements: torch.Tensor) -> None:
        self.runs.index_copy_(0, self._ids(blocks), self._in_runs(elements))

    @abstractmethod
    def _in_runs(self, elements: torch.Tensor) -> torch.Tensor:
        """Elements as runs ``[kv_heads * runs * n, length]`` in the part's order."""

    def _ids(self, blocks: torch.Tensor) -> torch.Tensor:
        if self.run_first:
            return (blocks * self.page_runs + self.table[:, :, None]).flatten()
        return (blocks[:, None] * self.page_runs + self.table[:, None, :]).flatten()


class TokenMajor(RunPart):
    """Each token's elements of a head are contiguous: a run is one key or value."""

    run_first = False

    def __init__(self, raw: torch.Tensor, offsets: torch.Tensor) -> None:
        super().__init__(raw, offsets[..., 0].T, offsets.shape[2])

    @classmethod
    def shaped(cls, rows: torch.Tensor, heads: int, runs: int) -> torch.Tensor:
        return rows.view(heads, -1, rows.shape[-1])

    def take_layers(
        self, parts: Sequence[RunPart], blocks: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        shape = (*tokens.shape, self.length)
        ids = self._ids(blocks).view(self.heads, -1)
        taken = [
            part.runs.index_select(0, ids.gather(1, own).flatten())
            for part, own in zip(parts, tokens.chunk(len(parts)), strict=True)
        ]
        return torch.cat(taken).view(shape)

    def _in_runs(self, elements: torch.Tensor) -> torch.Tensor:
        return elements.reshape(-1, self.length)


class TokenMinor(RunPart):
    """Each dimension's elements of a head are contiguous: a run is one dimension of a block."""

    run_first = True

    def __init__(self, raw: torch.Tensor, offsets: torch.Tensor) -> None:
        super().__init__(raw, offsets[0], offsets.shape[0])

    @classmethod
    def shaped(cls, rows: torch.Tensor, heads: int, runs: int) -> torch.Tensor:
        return rows.view(heads, runs, -1).transpose(1, 2)

    def take_layers(
        self, parts: Sequence[RunPart], blocks: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        return take_tokens(self.read_layers(parts, blocks), tokens)

    def _in_runs(self, elements: torch.Tensor) -> torch.Tensor:
        return elements.transpose(1, 2).reshape(-1, self.length)


class Packed(PagePart):
    """Tokens and dimensions are interleaved: moved through a strided view.

    The view is ``[blocks, H, N1, N2, D1, D2]``: tokens and dimensions may each be split.
    """

    def __init__(self, raw: torch.Tensor, offsets: torch.Tensor) -> None:
        self.block_size, self.heads, self.dim = offsets.shape
        self.pages = _strided_view(raw, offsets)

    def read_layers(self, parts: Sequence[Packed], blocks: torch.Tensor) -> torch.Tensor:
        shape = (self.heads, len(blocks) * self.block_size, self.dim)
        return torch.cat([part.pages[blocks].transpose(0, 1).reshape(shape) for part in parts])

    def take_layers(
        self, parts: Sequence[Packed], blocks: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        return take_tokens(self.read_layers(parts, blocks), tokens)

    def write(self, blocks: torch.Tensor, elements: torch.Tensor) -> None:
        shape = (self.heads, len(blocks), *self.pages.shape[2:])
        self.pages[blocks] = elements.reshape(shape).transpose(0, 1)


def _part(raw: torch.Tensor, offsets: torch.Tensor) -> PagePart:
    """Choose how to move a part from the offsets ``[N, H, D]`` of its elements."""
    block_size, _, dim = offsets.shape
    if _in_runs(offsets, raw.stride(0)) and dim > 1:
        return TokenMajor(raw, offsets)
    if _in_runs(offsets.permute(2, 1, 0), raw.stride(0)) and block_size > 1:
        return TokenMinor(raw, offsets)
    return Packed(raw, offsets)


def _in_runs(offsets: torch.Tensor, page: int) -> bool:
    """Whether the last axis is contiguous, with every run at a multiple of its length."""
    first, length = offsets[..., :1], offsets.shape[-1]
    contiguous = torch.equal(offsets, first + torch.arange(length))
    return contiguous and page % length == 0 and not bool((first % length).any())


def _runs(raw: torch.Tensor, length: int) -> torch.Tensor:
    """A layer's cache as rows of ``length`` elements."""
    last_page = 1 + sum((n - 1) * s for n, s in zip(raw.shape[1:], raw.stride()[1:], strict=True))
    elements = (raw.shape[0] - 1) * raw.stride(0) + last_page
    return torch.as_strided(raw, (elements // length, length), (length, 1))


def _strided_view(raw: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """View a layer's cache by the learned offsets.

    Tokens and dimensions may each be split in two (packed layouts); the view is
    ``[blocks, H, N1, N2, D1, D2]`` and must reproduce every offset.
    """
    block_size, heads, dim = offsets.shape
    start = int(offsets[0, 0, 0])
    head_step = int(offsets[0, 1, 0]) - start if heads > 1 else 0
    for n2 in _divisors(block_size):
        for d2 in _divisors(dim):
            sizes = (heads, block_size // n2, n2, dim // d2, d2)
            split = offsets.permute(1, 0, 2).reshape(sizes)
            steps = [head_step, *(_step(split, axis) for axis in range(1, 5))]
            grid = torch.full((1,) * 5, start)
            for axis, (n, step) in enumerate(zip(sizes, steps, strict=True)):
                shape = [-1 if a == axis else 1 for a in range(5)]
                grid = grid + (torch.arange(n) * step).view(shape)
            if torch.equal(grid, split):
                return torch.as_strided(
                    raw,
                    (raw.shape[0], *sizes),
                    (raw.stride(0), *steps),
                    raw.storage_offset() + start,
                )
    raise PageLayoutError("kvcompress: the page layout is not regular, so it is not supported.")


def _step(offsets: torch.Tensor, axis: int) -> int:
    if offsets.shape[axis] == 1:
        return 0
    first = [0] * offsets.dim()
    second = list(first)
    second[axis] = 1
    return int(offsets[tuple(second)] - offsets[tuple(first)])


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
