"""The pages of all layers that share a block table, read and written together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from vllm.utils import torch_utils

from vllm_kvcompress.levels import Round
from vllm_kvcompress.methods import Method, NormMethod, ScoreContext, select_tokens
from vllm_kvcompress.methods.pooling import Pooling, Rotation, merge_blocks
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.worker.pages import LayerPages, PagePart


def tensor_of(blocks: Sequence[int], device: torch.device) -> torch.Tensor:
    """Block ids on a device, int64, without waiting for it."""
    return torch_utils.async_tensor_h2d(list(blocks), device, torch.int64)


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
    def _first(self) -> LayerPages:
        return next(iter(self.layers.values()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens per block, KV heads per layer, head size."""
        return self._first.shape

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._first.device

    @property
    def _keys(self) -> list[PagePart]:
        return [pages.keys for pages in self.layers.values()]

    @property
    def _values(self) -> list[PagePart]:
        return [pages.values for pages in self.layers.values()]

    def slices(self, blocks: int) -> Iterator[Self]:
        """Layers by the handful, so that float32 copies of ``blocks`` blocks stay small."""
        size, heads, dim = self.shape
        each = max(1, MAX_SLICE // max(1, blocks * size * heads * dim))
        names = list(self.layers)
        for first in range(0, len(names), each):
            yield self.part(names[first : first + each])

    def part(self, layers: Sequence[int]) -> Self:
        """Some of the layers."""
        return type(self)({layer: self.layers[layer] for layer in layers})

    def read_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Raw keys ``[layers * kv_heads, tokens, head_dim]`` of blocks ``[n]``, int64."""
        return self._keys[0].read_layers(self._keys, blocks)

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor:
        """Raw values, as :meth:`read_keys`."""
        return self._values[0].read_layers(self._values, blocks)

    def read_float_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys as float32 numbers (without the layers' fp8 scales), as :meth:`read_keys`."""
        return self.as_float(self.read_keys(blocks))

    def read_slots(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as float32 numbers, in one piece, valid until the next call."""
        elements = self.read_keys(blocks), self.read_values(blocks)
        keys, values = (self.as_float(part).contiguous() for part in elements)
        return keys, values

    def warm_up(self, pooling: Pooling | None, rotation: Rotation | None, ranked: bool) -> None:
        """Do once what the first request would wait for.

        ``pooling`` is ``None`` if nothing is pooled; ``ranked`` if tokens are ranked first.
        """

    def squared_norms(self, blocks: torch.Tensor) -> torch.Tensor:
        """Squared L2 norms of keys (without scales), ``[layers * kv_heads, tokens]``, float32."""
        keys = (part.read_float_keys(blocks) for part in self.slices(len(blocks)))
        return torch.cat([torch.linalg.vecdot(part, part) for part in keys])

    def select(self, scores: torch.Tensor, keep: int, sinks: int) -> torch.Tensor:
        """As :func:`~vllm_kvcompress.methods.select_tokens`, on the pages' device."""
        return select_tokens(scores, keep, sinks)

    def score(
        self, method: Method, context: Callable[[int], ScoreContext], blocks: torch.Tensor
    ) -> torch.Tensor:
        """Scores of all tokens of some blocks, ``[layers * kv_heads, tokens]``, float32.

        ``context`` by layer.
        """
        if isinstance(method, NormMethod):
            return method.score_norms(self.squared_norms(blocks))
        scores = []
        for part in self.slices(len(blocks)):
            layers = list(part.layers)
            if method.needs_values:
                assert method.same_for_all_layers, "no method needs values and tells layers apart"
                keys, values = part.read_slots(blocks)
                scores.append(method.score(keys, context(layers[0]), values))
                continue
            keys = part.read_float_keys(blocks) if method.needs_keys else part.no_keys(len(blocks))
            if method.same_for_all_layers:
                scores.append(method.score(keys, context(layers[0])))
                continue
            for layer, own in zip(layers, keys.split(self.shape[1]), strict=True):
                scores.append(method.score(own, context(layer)))
        return torch.cat(scores)

    def evict(
        self,
        method: Method,
        context: Callable[[int], ScoreContext],
        sources: Sequence[int],
        destinations: Sequence[int],
        sinks: int,
        kept_wanted: bool = False,
    ) -> torch.Tensor | None:
        """Keep the tokens with the highest scores of each head, as many as fill other blocks.

        Parameters
        ----------
        method : Method
        context : callable
            Of a layer, by its index.
        sources : sequence of int
            Blocks, oldest first.
        destinations : sequence of int
            Where kept tokens go; may be among the sources.
        sinks : int
            First tokens that stay whatever their score.
        kept_wanted : bool
            Whether to return what was kept.

        Returns
        -------
        torch.Tensor or None
            ``[layers * kv_heads, kept]``, int64, ascending indices into the sources' tokens.
        """
        read = tensor_of(sources, self.device)
        scores = self.score(method, context, read)
        kept = self.select(scores, len(destinations) * self.shape[0], sinks)
        self.move(read, kept, tensor_of(destinations, self.device))
        return kept if kept_wanted else None

    def no_keys(self, blocks: int) -> torch.Tensor:
        """Something of the shape of keys, for methods that do not look at them."""
        size, heads, dim = self.shape
        shape = (len(self.layers) * heads, blocks * size, dim)
        return torch.empty(1, dtype=torch.float32, device=self.device).expand(shape)

    def move(self, sources: torch.Tensor, tokens: torch.Tensor, destinations: torch.Tensor) -> None:
        """Move some tokens of some blocks to other blocks, which may be among them.

        Parameters
        ----------
        sources : torch.Tensor
            ``[n]``, int64.
        tokens : torch.Tensor
            ``[layers * kv_heads, kept]``, int64, ascending indices into the sources' tokens.
        destinations : torch.Tensor
            ``[kept / block_size]``, int64.
        """
        parts = list(self.slices(len(sources)))
        rows = [len(part.layers) * self.shape[1] for part in parts]
        for part, own in zip(parts, tokens.split(rows), strict=True):
            # All reads come before the writes.
            keys = part._keys[0].take_layers(part._keys, sources, own)
            values = part._values[0].take_layers(part._values, sources, own)
            part.write(destinations, keys, values)

    def merge(
        self,
        sources: Sequence[int],
        rounds: Sequence[Round],
        outputs: Sequence[int],
        destinations: Sequence[int],
        pooling: Pooling,
        rotation: Rotation | None,
    ) -> None:
        """Merge blocks, all slots of a level standing for equally many consecutive tokens.

        Parameters
        ----------
        sources : sequence of int
            Blocks that merge or move, oldest first.
        rounds : sequence of Round
            Merges over them and those made on the way.
        outputs : sequence of int
            Blocks that stay, by the numbers of the rounds.
        destinations : sequence of int
            Where these go; may be among the sources.
        pooling : Pooling
        rotation : Rotation or None
            The model's, ``None`` if it has none.
        """
        read = tensor_of(sources, self.device)
        written = tensor_of(destinations, self.device)
        for part in self.slices(len(sources)):
            slots = part.read_slots(read)
            kept = part.merged(*slots, None, rounds, outputs, pooling, rotation)
            part.write(written, kept[0], kept[1])

    def merges_ranked(self, method: Method, pooling: Pooling) -> bool:
        """Whether :meth:`merge_ranked` can do what a ranking method and a pooling do together."""
        return False

    def merge_ranked(
        self,
        plan: CompactionPlan,
        pooling: Pooling,
        rotation: Rotation | None,
        centres: Mapping[int, torch.Tensor],
        kept_wanted: bool,
    ) -> torch.Tensor | None:
        """Keep the tokens that rank highest and pool the others, in one go.

        ``centres`` by layer, as :class:`~vllm_kvcompress.worker.merger.Merger` has them.
        Returns what was kept as :meth:`evict` does.
        """
        raise NotImplementedError

    def merged(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        centres: torch.Tensor | None,
        rounds: Sequence[Round],
        outputs: Sequence[int],
        pooling: Pooling,
        rotation: Rotation | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Outputs of rounds over slots, as read; keys and values raw.

        ``centres`` as :func:`~vllm_kvcompress.methods.pooling.merge_blocks` has them, by slot.
        """
        size, heads, dim = self.shape
        rows = len(self.layers) * heads
        made = merge_blocks(
            keys.reshape(rows, -1, size, dim),
            values.reshape(rows, -1, size, dim),
            rounds,
            pooling,
            rotation,
            None if centres is None else centres.reshape(rows, -1, size),
        )
        kept = torch.tensor(outputs, device=self.device)
        return (
            self.as_raw(made[0][:, kept]).reshape(rows, -1, dim),
            self.as_raw(made[1][:, kept]).reshape(rows, -1, dim),
            None if made[2] is None else made[2][:, kept].reshape(rows, -1),
        )

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
        return self._first.as_float(elements)

    def as_raw(self, numbers: torch.Tensor) -> torch.Tensor:
        """Float32 numbers as raw integers, rounded to the cache's type."""
        return self._first.as_raw(numbers)
