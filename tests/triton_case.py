"""Pages twice over, for Triton kernels and for torch, in all types and layouts of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from page_cases import TYPES
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.gpu.band import TritonBandPages
from vllm_kvcompress.worker.layout import FP8_DTYPES
from vllm_kvcompress.worker.pages import LayerPages

LAYERS, BLOCKS, HEADS = 2, 11, 2
LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "padded", "halves")
"""vLLM's layouts; pages with room at their end; pages with all keys before all values."""


def make_caches(layout: str, size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Caches of all layers ``[LAYERS, BLOCKS, HEADS, size, 2 * dim]``, as memory has them.

    Everything is filled with one byte, also what belongs to no layer.
    """
    logical = (LAYERS, BLOCKS, HEADS, size, 2 * dim)
    if layout in ("padded", "halves"):
        padding = 2 * dim if layout == "padded" else 0
        pages = torch.empty(LAYERS, BLOCKS, HEADS * size * 2 * dim + padding, dtype=dtype)
        pages.view(torch.uint8).fill_(0x11)
        return pages[:, :, : HEADS * size * 2 * dim].view(logical)
    order = KVCacheLayout[layout].stride_order
    memory = torch.empty([logical[axis] for axis in order], dtype=dtype)
    memory.view(torch.uint8).fill_(0x11)
    return memory.permute([order.index(axis) for axis in range(5)])


class Impl:
    """Writes pages as a backend does."""

    def __init__(self, element: torch.dtype, halves: bool) -> None:
        self.element, self.halves = element, halves

    def do_kv_cache_update(
        self, layer: Any, keys: Any, values: Any, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        blocks, heads, size, both = cache.shape
        raw = [part.to(self.element).view(cache.dtype) for part in (keys, values)]
        page, slot = slots // size, slots % size
        if self.halves:
            pages = cache.view(blocks, 2, size, heads, both // 2)
            pages[page, :, slot] = torch.stack(raw, dim=1)
        else:
            cache[page, :, slot] = torch.cat(raw, dim=-1)


class Case:
    """The same pages twice over: moved by kernels, and by torch."""

    def __init__(self, type_name: str, layout: str = "LBNHC", size: int = 16, dim: int = 32):
        torch.manual_seed(0)
        dtype, cache_dtype = TYPES[type_name]
        element = FP8_DTYPES.get(cache_dtype, dtype)
        layer = SimpleNamespace(impl=Impl(element, layout == "halves"), dtype=torch.float32)
        self.size, self.dim = size, dim
        self.caches = [make_caches(layout, size, dim, dtype) for _ in range(2)]
        mine, reference = (
            {
                index: LayerPages(layer, own, size, HEADS, dim, cache_dtype)
                for index, own in enumerate(caches)
            }
            for caches in self.caches
        )
        assert TritonBandPages.fits(mine)
        self.triton, self.torch = TritonBandPages(mine), BandPages(reference)
        numbers = torch.randn(2, LAYERS * HEADS, BLOCKS * size, dim) + 0.5
        # Every binary place that the types have, also the smallest.
        numbers *= torch.exp2(torch.randint(-12, 8, numbers.shape).float())
        keys, values = self.torch.as_raw(numbers)
        self.both(lambda pages: pages.write(torch.arange(BLOCKS), keys, values))

    def both(self, call: Callable[[BandPages], Any]) -> list[Any]:
        """Results of the kernels and of torch."""
        return [call(self.triton), call(self.torch)]

    def bytes_of(self, index: int) -> torch.Tensor:
        """All memory that a cache is a view of, ``[bytes]``, uint8: kernels' (0) or torch's."""
        return torch.empty(0, dtype=torch.uint8).set_(self.caches[index].untyped_storage())

    def assert_same_bytes(self) -> None:
        """Both memories must be alike, whole."""
        assert self.bytes_of(0).equal(self.bytes_of(1))
