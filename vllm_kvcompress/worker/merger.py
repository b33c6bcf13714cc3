"""Merging cached slots in the pages of a worker."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvcompress.methods import take_tokens
from vllm_kvcompress.methods.pooling import Pooling, Rotation
from vllm_kvcompress.methods.select import others
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.worker.band import BandPages


@dataclass(frozen=True)
class Slots:
    """Slots of some layers, heads of all layers in one axis.

    Attributes
    ----------
    keys, values : torch.Tensor
        ``[layers * kv_heads, slots, head_dim]``, float32.
    centres : torch.Tensor or None
        ``[layers * kv_heads, slots]``, float32: position to which each key is turned, where
        it has to be known.
    """

    keys: torch.Tensor
    values: torch.Tensor
    centres: torch.Tensor | None = None

    def take(self, slots: torch.Tensor) -> Slots:
        """Some slots of each head, ``[layers * kv_heads, n]``, int64."""
        return Slots(
            take_tokens(self.keys, slots),
            take_tokens(self.values, slots),
            None if self.centres is None else self.centres.gather(1, slots),
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

    def read(self, plan: CompactionPlan, pages: BandPages, sources: torch.Tensor) -> Slots:
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
        return Slots(*pages.read_slots(sources), centres)

    def pool(
        self, plan: CompactionPlan, pages: BandPages, slots: Slots, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Pool the slots that a plan pools anyway and those that ranking leaves over.

        Parameters
        ----------
        slots : Slots
            Of all sources.
        kept : torch.Tensor
            ``[layers * kv_heads, n]``, int64: what ranking kept of the slots behind the
            plan's pooled ones.

        Returns
        -------
        tuple of torch.Tensor
            Raw keys and values of the plan's outputs, and centres of all that is written.
        """
        first = plan.pooled * pages.shape[0]
        total = slots.keys.shape[1]
        head = torch.arange(first, device=kept.device).expand(len(kept), -1)
        left = torch.cat([head, others(kept, total - first) + first], dim=1)
        pooled = slots.take(left)
        keys, values, centres = pages.merged(
            pooled.keys,
            pooled.values,
            pooled.centres,
            plan.rounds,
            plan.outputs,
            self.pooling,
            self.rotation,
        )
        if centres is not None and slots.centres is not None:
            centres = torch.cat([centres, slots.centres.gather(1, kept + first)], dim=1)
        return keys, values, centres

    def note(self, pages: BandPages, blocks: torch.Tensor, centres: torch.Tensor | None) -> None:
        """Remember the centres ``[layers * kv_heads, slots]`` of what is written into blocks."""
        if centres is None:
            return
        size, heads, _ = pages.shape
        rows = centres.split(heads)
        for layer, own in zip(pages.layers, rows, strict=True):
            self.centres[layer][blocks] = own.reshape(heads, -1, size).transpose(0, 1)
