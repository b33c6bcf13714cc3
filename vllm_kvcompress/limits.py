"""How many tokens and blocks of a band a request keeps, and what it must not touch.

Pure arithmetic, used by every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil


@dataclass(frozen=True)
class Merging:
    """How a band merges.

    Attributes
    ----------
    share : Fraction or None
        Share of the kept blocks that hold pooled tokens; ``None`` if all but the sinks do.
    count : bool
        Whether a pooled block is listed as often as it stands for blocks.
    """

    share: Fraction | None
    count: bool


@dataclass(frozen=True)
class Limits:
    """How many tokens a band may hold for one request, and what it must not touch.

    Attributes
    ----------
    budget : int or None
        Tokens kept per layer, a multiple of the block size.
    ratio : Fraction or None
        Share of the request's tokens kept per layer, where no budget is set.
    sinks, recent : int
        Protected tokens at the start and at the end.
    block_size : int
        Tokens per block.
    merging : Merging or None
        ``None`` for methods that evict.
    recent_share : Fraction
        Share of the tokens kept that is protected at the end, where that is more than ``recent``.
    """

    budget: int | None
    ratio: Fraction | None
    sinks: int
    recent: int
    block_size: int
    merging: Merging | None = None
    recent_share: Fraction = Fraction(0)

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold the sinks."""
        return -(-self.sinks // self.block_size)

    def pooled_at_least(self, position: int) -> int:
        """Blocks into which all pooled tokens can be merged, whatever their levels.

        Blocks that can merge no further have distinct levels: one per binary digit.
        """
        return max(1, (position // self.block_size).bit_length())

    def least(self, position: int) -> int:
        """Fewest blocks that a compaction may leave."""
        if self.merging is None:
            return max(1, self.sink_blocks)
        beside = self.sink_blocks if self.merging.share is None else max(1, self.sink_blocks)
        return beside + self.pooled_at_least(position)

    def target(self, position: int, base: int = 0) -> int:
        """Tokens to keep; parameters as for :meth:`blocks_kept`."""
        if self.budget is not None:
            return self.budget
        assert self.ratio is not None
        return ceil(self.ratio * (position - base))

    def window(self, position: int, base: int = 0) -> int:
        """Latest tokens that are protected; parameters as for :meth:`blocks_kept`."""
        if not self.recent_share:
            return self.recent
        target = self.target(position, base)
        # A share never asks for more than the target, whatever must stay beside the window.
        room = target - (self.least(position) + 1) * self.block_size + 1
        return max(self.recent, min(int(self.recent_share * target), room))

    def blocks_kept(self, live: int, position: int, base: int = 0) -> tuple[int, int]:
        """Full blocks that take part in a compaction, and how many of them stay.

        Parameters
        ----------
        live : int
            Tokens in the cache that may be compressed.
        position : int
            Tokens of the request computed so far, including removed ones.
        base : int
            First tokens of the request that compression leaves alone; ``ratio`` is a share of
            the others.

        Returns
        -------
        tuple of int
            ``(e, k)``: the oldest ``e`` blocks become ``k``. Nothing is due if ``k >= e``.
        """
        size = self.block_size
        old = max(0, live - self.window(position, base)) // size
        untouched = live - old * size
        target = self.target(position, base)
        if self.budget is not None:
            kept = (target - untouched) // size if live > target else old
        else:
            kept = -((untouched - target) // size)
        return old, max(kept, self.least(position))

    def most_left(self, position: int, base: int = 0) -> int:
        """Upper bound of the tokens that a chance to compact leaves; as :meth:`blocks_kept`."""
        if self.budget is not None:
            return self.budget
        # A window that is larger than ``recent`` lies within the target.
        least = self.least(position) * self.block_size
        return self.target(position, base) + self.recent + self.block_size + least

    def peak(self, position: int, first: int, interval: int) -> int:
        """Upper bound of the tokens held at once on the way to ``position``.

        Parameters
        ----------
        position : int
            Tokens the request will have.
        first : int
            Position of its first compaction.
        interval : int
            Tokens between two chances to compact.
        """
        if position <= first:
            return position
        return min(position, max(first, self.most_left(position) + interval))
