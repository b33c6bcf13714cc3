"""Pages twice over, for kernels and for torch, in all types and layouts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from page_cases import TYPES

from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.cpu.band import CompiledBandPages
from vllm_kvcompress.worker.layout import FP8_DTYPES
from vllm_kvcompress.worker.pages import LayerPages
from vllm_kvcompress.worker.setup import band_pages

LAYERS, BLOCKS, HEADS, DIM = 3, 11, 2, 16


class Layout(NamedTuple):
    """Axes of a page, outermost first: heads, keys and values, tokens, dimensions."""

    keys: str
    values: str

    def offsets(self, size: int) -> torch.Tensor:
        """Where each element lies, ``[2, size, HEADS, DIM]``."""
        lengths = {"h": HEADS, "p": 2, "t": size, "d": DIM}
        found = []
        for part, axes in enumerate(self):
            count = torch.arange(2 * size * HEADS * DIM).view([lengths[axis] for axis in axes])
            found.append(count.permute([axes.index(axis) for axis in "pthd"])[part])
        return torch.stack(found)


LAYOUTS = {
    "cpu": Layout("hpdt", "hptd"),
    "triton": Layout("htpd", "htpd"),
    "tokens outermost": Layout("tphd", "tphd"),
    "both across": Layout("phdt", "phdt"),
}


class Impl:
    """Writes pages of a layout."""

    def __init__(self, offsets: torch.Tensor, element: torch.dtype) -> None:
        self.offsets, self.element = offsets, element

    def do_kv_cache_update(
        self, layer: Any, keys: Any, values: Any, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        size = self.offsets.shape[1]
        pages = cache.view(cache.shape[0], -1)
        for part, numbers in enumerate((keys, values)):
            raw = numbers.to(self.element).view(cache.dtype)
            for token, slot in zip(raw, slots.tolist(), strict=True):
                pages[slot // size, self.offsets[part, slot % size]] = token


class Case:
    """The same pages twice over: moved by kernels, and by torch."""

    def __init__(self, type_name: str, layout: Layout, size: int = 32) -> None:
        torch.manual_seed(0)
        dtype, cache_dtype = TYPES[type_name]
        element = FP8_DTYPES.get(cache_dtype, dtype)
        layer = SimpleNamespace(impl=Impl(layout.offsets(size), element), dtype=torch.float32)
        numbers = torch.randn(LAYERS, BLOCKS, HEADS, size, 2 * DIM)
        # Every binary place that the types have, also the smallest.
        numbers *= torch.exp2(torch.randint(-12, 8, numbers.shape).float())
        self.size = size
        self.caches = [numbers.to(element).view(dtype).clone() for _ in range(2)]
        mine, reference = (
            {
                index: LayerPages(layer, own, size, HEADS, DIM, cache_dtype)
                for index, own in enumerate(cache)
            }
            for cache in self.caches
        )
        compiled = band_pages(mine)
        assert isinstance(compiled, CompiledBandPages)
        self.compiled, self.torch = compiled, BandPages(reference)

    def both(self, call: Callable[[BandPages], Any]) -> list[Any]:
        """Results of the kernels and of torch."""
        return [call(self.compiled), call(self.torch)]

    def assert_same_bytes(self) -> None:
        """Both caches must be alike, whole."""
        first, second = (cache.view(torch.uint8) for cache in self.caches)
        assert first.equal(second)
