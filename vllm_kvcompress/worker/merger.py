"""Merging cached slots in the pages of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_kvcompress.methods import take_tokens
from vllm_kvcompress.methods.pooling import Pooling, Rotation
from vllm_kvcompress.methods.select import others
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.worker.band import BandPages


@dataclass(frozen=True)
class Contents:
    """Slots of some layers, heads of all layers in one axis.

    Attributes
    ----------
    keys, values : torch.Tensor
        ``[layers * kv_heads, slots, head_dim]``, raw.
    centres : torch.Tensor or None
        ``[layers * kv_heads, slots]``, float32: position to which each key is turned, where
        it has to be known.
    """

    keys: torch.Tensor
    values: torch.Tensor
    centres: torch.Tensor | None = None

    def split(self, slots: int) -> tuple[Contents, Contents]:
        """The first slots, and the others."""
        parts = (slice(None, slots), slice(slots, None))
        first, second = (
            Contents(
                self.keys[:, part],
                self.values[:, part],
                None if self.centres is None else self.centres[:, part],
            )
            for part in parts
        )
        return first, second

    def take(self, slots: torch.Tensor) -> Contents:
        """Some slots of each head, ``[layers * kv_heads, n]``, int64."""
        return Contents(
            take_tokens(self.keys, slots),
            take_tokens(self.values, slots),
            None if self.centres is None else self.centres.gather(1, slots),
        )

    def without(self, slots: torch.Tensor) -> Contents:
        """The other slots of each head."""
        return self.take(others(slots, self.keys.shape[1]))

    @staticmethod
    def join(parts: Sequence[Contents]) -> Contents:
        """Slots of all parts in order."""
        if len(parts) == 1:
            return parts[0]
        centres = [part.centres for part in parts if part.centres is not None]
        return Contents(
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.values for part in parts], dim=1),
            torch.cat(centres, dim=1) if centres else None,
        )


class Merger:
    """Pools blocks of a worker's pages.

    Parameters
    ----------
    pooling : Pooling
    rotation : Rotation or None
        The model's, ``None`` if it has none.
    centres : mapping of int to torch.Tensor
        By layer, ``[blocks, kv_heads, block_size]``, float32: position to which the key in
        each slot is turned. Only where tokens are ranked and pooled means are turned: the
        spans of pooled slots then differ by head, and nobody but this worker knows them.
    """

    def __init__(
        self,
        pooling: Pooling,
        rotation: Rotation | None,
        centres: dict[int, torch.Tensor] | None = None,
    ) -> None:
        self.pooling = pooling
        self.rotation = rotation
        self.centres = centres or {}

    def read(self, plan: CompactionPlan, pages: BandPages, sources: torch.Tensor) -> Contents:
        """All slots of a plan's sources."""
        centres = None
        if self.centres:
            size = pages.shape[0]
            # Blocks that nobody compacted yet hold the latest tokens, one after another.
            exact = plan.exact * size
            computed = torch.arange(plan.end - exact, plan.end, device=sources.device)
            known = sources[: len(plan.sources) - plan.exact]
            centres = torch.cat(
                [
                    torch.cat(
                        [
                            self.centres[layer][known].transpose(0, 1).flatten(1),
                            computed.float().expand(pages.shape[1], -1),
                        ],
                        dim=1,
                    )
                    for layer in pages.layers
                ]
            )
        return Contents(pages.read_keys(sources), pages.read_values(sources), centres)

    def merge(self, plan: CompactionPlan, pages: BandPages, slots: Contents) -> Contents:
        """Outputs of a plan's rounds over these slots."""
        merged = pages.merged(
            slots.keys,
            slots.values,
            slots.centres,
            plan.rounds,
            plan.outputs,
            self.pooling,
            self.rotation,
        )
        return Contents(*merged)

    def note(self, pages: BandPages, blocks: torch.Tensor, contents: Contents) -> None:
        """Remember the centres of what is written into blocks."""
        if contents.centres is None:
            return
        size, heads, _ = pages.shape
        rows = contents.centres.split(heads)
        for layer, own in zip(pages.layers, rows, strict=True):
            self.centres[layer][blocks] = own.reshape(heads, -1, size).transpose(0, 1)
