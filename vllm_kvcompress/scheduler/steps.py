"""What a compaction does to the blocks of a request, in counts."""

from __future__ import annotations

from typing import NamedTuple

from vllm_kvcompress.levels import Merges


class Pooled(NamedTuple):
    """What a compaction merges in one group.

    Attributes
    ----------
    lead : int
        Blocks before the pooled ones that are left alone (sinks).
    before : list of int
        Number of pooled blocks by level before this compaction.
    fresh : int
        Blocks' worth of tokens that join the pooled ones at level 0: blocks that left the
        recent window, or tokens that ranking leaves over.
    ranked : int
        Blocks whose tokens are ranked by a score, after the pooled ones; 0 if none are.
    exact : int
        Latest of the old blocks that no compaction has written yet.
    merges : Merges
        Over the pooled blocks and, after them, the fresh ones.
    """

    lead: int
    before: list[int]
    fresh: int
    ranked: int
    exact: int
    merges: Merges

    @property
    def stored(self) -> int:
        """How many of the blocks that may merge are blocks of the request already."""
        return sum(self.before) + (0 if self.ranked else self.fresh)


class Step(NamedTuple):
    """One group's part in a compaction: its ``old`` oldest blocks become ``kept``."""

    old: int
    kept: int
    pooled: Pooled | None = None
