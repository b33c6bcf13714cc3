"""The position at which a group is next over its limits, by arithmetic instead of walking.

A compaction is due at a position if :meth:`~vllm_kvcompress.limits.Limits.blocks_kept` keeps fewer
blocks than there are. Written out, that is two conditions, and both hold from some position on:

- There is more than the limits allow: ``live > budget``, or with a share at least one block more
  than ``ceil(ratio * tokens)``. Rounding to whole blocks cancels, since old and kept blocks have
  the same rest beside them.
- More than the fewest blocks that may stay are old enough. How many may stay grows with the
  position where blocks merge, so this condition may fail again at a power of two. A recent window
  that is a share of the limits does not matter here: it leaves room for these blocks and one
  more within what the limits allow, so that the first condition implies this one.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_kvcompress.limits import Limits
from vllm_kvcompress.scheduler.schedule import NEVER


class Grid(NamedTuple):
    """Positions where compactions may happen.

    Attributes
    ----------
    interval : int
        Tokens between two of them.
    start, last : int
        From where on there is one every ``interval`` tokens, and up to where.
    before : bool
        Whether multiples of ``interval`` below ``start`` belong to it.
    """

    interval: int
    start: int
    last: int
    before: bool = False

    def at_or_after(self, position: int) -> int:
        """First of them that is not before ``position``; ``NEVER`` if there is none."""
        if self.before and position < self.start:
            multiple = -(-position // self.interval) * self.interval
            position = min(multiple, self.start)
            return position if position <= self.last else NEVER
        beyond = max(0, position - self.start)
        position = self.start - (-beyond // self.interval) * self.interval
        return position if position <= self.last else NEVER


def first_due(limits: Limits, before: int, base: int, earliest: int, grid: Grid) -> int:
    """First position on a grid at which a group is over its limits.

    Parameters
    ----------
    limits : Limits
    before : int
        Blocks' worth of tokens that are gone or left alone.
    base : int
        Leading blocks of the request that are left alone; ``ratio`` is a share of the others.
    earliest : int
        The position is not before this one.
    grid : Grid

    Returns
    -------
    int
        ``NEVER`` if there is none.
    """
    position = grid.at_or_after(max(earliest, _first_over(limits, before, base)))
    while position < NEVER:
        enough = _first_with_room(limits, before, position)
        if enough == position:
            break
        position = grid.at_or_after(enough)
    return position


def _first_over(limits: Limits, before: int, base: int) -> int:
    """First position with more tokens than the limits allow."""
    size = limits.block_size
    if limits.budget is not None:
        return before * size + limits.budget + 1
    assert limits.ratio is not None
    kept, whole = limits.ratio.as_integer_ratio()
    if kept == whole:
        return NEVER
    # Of n tokens behind the base floor(n * (1 - ratio)) may go: a block, and what is gone.
    spare = (before + 1 - base) * size
    return base * size - (-spare * whole // (whole - kept))


def _first_with_room(limits: Limits, before: int, position: int) -> int:
    """First position from ``position`` on with an old block more than may stay at the least."""
    size = limits.block_size
    while True:
        # What must stay never shrinks, so that no position before this one will do.
        enough = (before + limits.least(position) + 1) * size + limits.recent
        if position >= enough:
            return position
        position = enough
