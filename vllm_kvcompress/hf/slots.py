"""Making the slots of one row of one layer fewer: by eviction or by merging. Pure torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_kvcompress.levels import plan_merges
from vllm_kvcompress.methods import Method, ScoreContext, select_tokens, take_tokens
from vllm_kvcompress.methods.pooling import Pooling, Rotation, merge_blocks


@dataclass(frozen=True)
class Slots:
    """Cached slots of one row of one layer, in age order.

    Attributes
    ----------
    keys, values : torch.Tensor
        ``[kv_heads, slots, head_dim]`` as cached; the two head sizes may differ.
    columns : torch.Tensor
        ``[kv_heads, slots]``, int64: index of the token in the row, padding included; of a
        merged slot, that of its newest token.
    counts : torch.Tensor
        ``[slots]``, int64: tokens that a slot stands for, a power of two.
    """

    keys: torch.Tensor
    values: torch.Tensor
    columns: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return self.counts.shape[0]

    def part(self, start: int, stop: int | None) -> Slots:
        """The slots ``[start, stop)``."""
        window = slice(start, stop)
        return Slots(
            self.keys[:, window],
            self.values[:, window],
            self.columns[:, window],
            self.counts[window],
        )

    @classmethod
    def concat(cls, parts: list[Slots]) -> Slots:
        """Slots of several parts, one after the other."""
        keys = torch.cat([part.keys for part in parts], dim=1)
        values = torch.cat([part.values for part in parts], dim=1)
        columns = torch.cat([part.columns for part in parts], dim=1)
        counts = torch.cat([part.counts for part in parts])
        return cls(keys, values, columns, counts)


class Step(NamedTuple):
    """One row's part in a compaction.

    Attributes
    ----------
    first : int
        Slots before those that take part; they are not touched.
    old, kept : int
        The next ``old`` slots become ``kept``; newer ones are not touched.
    sinks : int
        First of the ``old`` slots that always stay as they are.
    """

    first: int
    old: int
    kept: int
    sinks: int


Reduce = Callable[[Slots, int, int, ScoreContext], Slots]
"""Slots, how many of them to keep, how many of them are sinks, and where they come from."""


@dataclass(frozen=True)
class Evict:
    """Keep the slots with the highest scores, per KV head.

    Attributes
    ----------
    method : Method
    """

    method: Method

    def __call__(self, slots: Slots, keep: int, sinks: int, context: ScoreContext) -> Slots:
        """Slots kept, ``[kv_heads, keep, ...]``, in age order."""
        keys = slots.keys.float() if self.method.needs_keys else slots.keys
        values = slots.values.float() if self.method.needs_values else None
        kept = select_tokens(self.method.score(keys, context, values), keep, sinks)
        return Slots(
            take_tokens(slots.keys, kept),
            take_tokens(slots.values, kept),
            slots.columns.gather(1, kept),
            slots.counts[:keep],  # all ones: what was merged is never evicted
        )


@dataclass(frozen=True)
class Merge:
    """Pool neighbouring slots of equal level, behind the sinks, until few enough are left.

    The plan is that of the paged caches with blocks of one slot.

    Attributes
    ----------
    pooling : Pooling
    rotation : Rotation or None
        The model's; ``None`` if it has none.
    """

    pooling: Pooling
    rotation: Rotation | None

    def __call__(self, slots: Slots, keep: int, sinks: int, context: ScoreContext) -> Slots:
        """Slots after merging, ``[kv_heads, keep, ...]``, in age order."""
        old = slots.part(sinks, None)
        merges = plan_merges(_levels(old.counts), keep - sinks)
        # A block is one slot: [kv_heads, slots, 1, head_dim].
        keys, values = merge_blocks(
            old.keys.float().unsqueeze(-2),
            old.values.float().unsqueeze(-2),
            merges.rounds,
            self.pooling,
            self.rotation,
        )[:2]
        columns, counts = old.columns, old.counts
        for _, older, newer in merges.rounds:
            columns = torch.cat([columns, columns[:, newer]], dim=1)
            counts = torch.cat([counts, counts[older] + counts[newer]])
        order = torch.tensor(merges.order, device=keys.device)
        merged = Slots(
            keys.squeeze(-2)[:, order].to(old.keys.dtype),
            values.squeeze(-2)[:, order].to(old.values.dtype),
            columns[:, order],
            counts[order],
        )
        return Slots.concat([slots.part(0, sinks), merged])


def run_step(slots: Slots, step: Step, reduce: Reduce, context: ScoreContext) -> Slots:
    """The slots of a row after a step."""
    stop = step.first + step.old
    kept = reduce(slots.part(step.first, stop), step.kept, step.sinks, context)
    return Slots.concat([slots.part(0, step.first), kept, slots.part(stop, None)])


def _levels(counts: torch.Tensor) -> list[int]:
    """Number of slots by level, from level 0."""
    return torch.bincount(counts.log2().round().long()).tolist()
