"""The pages of all layers that share a block table, read and written together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from vllm_kvcompress.worker.pages import LayerPages, PagePart

MAX_SLICE = 1 << 21
"""Most numbers of one kind (keys or values) that are worked on at once."""


@dataclass(frozen=True)
class BandPages:
    """Some layers of a KV cache group, oldest tokens first, heads of all layers in one axis.

    Attributes
    ----------
    layers : mapping of int to LayerPages
        Pages by layer index; all laid out alike.
    """

    layers: Mapping[int, LayerPages]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens per block, KV heads per layer, head size."""
        return next(iter(self.layers.values())).shape

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return next(iter(self.layers.values())).device

    @property
    def _keys(self) -> list[PagePart]:
        return [pages.keys for pages in self.layers.values()]

    @property
    def _values(self) -> list[PagePart]:
        return [pages.values for pages in self.layers.values()]

    def warm_up(self) -> None:
        """Move the null block onto itself once, so that no request waits for a compiler."""
        null = torch.zeros(1, dtype=torch.int64, device=self.device)
        size, heads, _ = self.shape
        tokens = torch.arange(size, device=self.device).expand(len(self.layers) * heads, size)
        tokens = tokens.contiguous()
        self.read_float_keys(null)
        self.write(null, self.read_keys(null), self.read_values(null))
        self.write(null, self.take_keys(null, tokens), self.take_values(null, tokens))

    def slices(self, blocks: int) -> Iterator[BandPages]:
        """Layers by the handful, so that float32 copies of ``blocks`` blocks stay small."""
        size, heads, dim = self.shape
        each = max(1, MAX_SLICE // max(1, blocks * size * heads * dim))
        names = list(self.layers)
        for first in range(0, len(names), each):
            yield BandPages({name: self.layers[name] for name in names[first : first + each]})

    def read_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Raw keys ``[layers * kv_heads, tokens, head_dim]`` of blocks ``[n]``, int64."""
        return self._keys[0].read_layers(self._keys, blocks)

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor:
        """Raw values, as :meth:`read_keys`."""
        return self._values[0].read_layers(self._values, blocks)

    def read_float_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys as float32 numbers (without the layers' fp8 scales), as :meth:`read_keys`."""
        element = next(iter(self.layers.values())).element
        return self._keys[0].read_layers(self._keys, blocks, element)

    def no_keys(self, blocks: int) -> torch.Tensor:
        """Something of the shape of keys, for methods that do not look at them."""
        size, heads, dim = self.shape
        shape = (len(self.layers) * heads, blocks * size, dim)
        return torch.empty(1, dtype=torch.float32, device=self.device).expand(shape)

    def take_keys(self, blocks: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Raw keys of some tokens, ``[layers * kv_heads, kept]``, int64, of some blocks."""
        return self._keys[0].take_layers(self._keys, blocks, tokens)

    def take_values(self, blocks: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Raw values of some tokens, as :meth:`take_keys`."""
        return self._values[0].take_layers(self._values, blocks, tokens)

    def write(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill blocks with raw keys and values ``[layers * kv_heads, tokens, head_dim]``."""
        count = len(self.layers)
        for pages, own_keys, own_values in zip(
            self.layers.values(), keys.chunk(count), values.chunk(count), strict=True
        ):
            pages.keys.write(blocks, own_keys)
            pages.values.write(blocks, own_values)

    def as_float(self, elements: torch.Tensor) -> torch.Tensor:
        """Raw integers as float32 numbers (without the layers' fp8 scales)."""
        return next(iter(self.layers.values())).as_float(elements)

    def as_raw(self, numbers: torch.Tensor) -> torch.Tensor:
        """Float32 numbers as raw integers, rounded to the cache's type."""
        return next(iter(self.layers.values())).as_raw(numbers)
