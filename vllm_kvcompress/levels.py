"""Which blocks of a band merge into which: an exponential histogram, from counts alone.

A block of level ``l`` stands for ``2**l`` blocks' worth of consecutive tokens. Two adjacent
blocks of equal level merge into one of the next. Levels never decrease with age, so the
number of blocks of each level says everything about a band. Pure arithmetic, used by the
scheduler and by the Hugging Face caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Round(NamedTuple):
    """Merges of one level.

    Blocks are numbered: those that the band held before from 0, oldest first, then the
    merged ones in the order of their making.

    Attributes
    ----------
    level : int
        Level of the blocks that merge.
    older, newer : list of int
        Blocks that merge, pair by pair.
    """

    level: int
    older: list[int]
    newer: list[int]


@dataclass(frozen=True)
class Merges:
    """What one compaction merges.

    Attributes
    ----------
    rounds : list of Round
        In the order in which they must run: a round may merge what the last one made.
    order : list of int
        The blocks held afterwards, oldest first, numbered as in :class:`Round`.
    counts : list of int
        Number of blocks held afterwards by level, from level 0.
    """

    rounds: list[Round]
    order: list[int]
    counts: list[int]


def plan_merges(counts: list[int], keep: int) -> Merges:
    """Merge until ``keep`` blocks are left.

    Each merge takes the two oldest blocks of the level that has most blocks, the highest
    such level if several have: resolution falls off evenly with age, and no level stays
    crowded while another is thinned out.

    Parameters
    ----------
    counts : list of int
        Number of blocks by level, from level 0; higher levels are older.
    keep : int
        Blocks to keep.

    Raises
    ------
    ValueError
        If fewer than :func:`fewest_blocks` are to be kept.
    """
    if keep < fewest_blocks(counts):
        raise ValueError(f"{counts} blocks by level cannot be merged into {keep}")
    made = sum(counts)
    queues: list[list[int]] = [[] for _ in counts]
    first = 0
    for level in reversed(range(len(counts))):
        queues[level] = list(range(first, first + counts[level]))
        first += counts[level]

    after = merged_counts(counts, keep)
    rounds = []
    for level in range(len(after)):
        if level == len(queues):
            queues.append([])
        queue = queues[level]
        merges = (len(queue) - after[level]) // 2
        if not merges:
            continue
        # Those made in the last round are the newest of their level.
        rounds.append(Round(level, queue[0 : 2 * merges : 2], queue[1 : 2 * merges : 2]))
        if level + 1 == len(queues):
            queues.append([])
        queues[level + 1] += range(made, made + merges)
        made += merges
        del queue[: 2 * merges]
    return Merges(rounds, [block for queue in reversed(queues) for block in queue], after)


def merged_counts(counts: list[int], keep: int) -> list[int]:
    """Number of blocks by level after merging until ``keep`` are left."""
    after = list(counts)
    for _ in range(sum(counts) - keep):
        # The last of the largest: the highest level.
        level = max(range(len(after)), key=lambda index: (after[index], index))
        if level + 1 == len(after):
            after.append(0)
        after[level] -= 2
        after[level + 1] += 1
    return after


def fewest_blocks(counts: list[int]) -> int:
    """Fewest blocks that merging can leave: one per binary digit of the tokens held."""
    return tokens_held(counts).bit_count()


def tokens_held(counts: list[int]) -> int:
    """Blocks' worth of tokens that blocks of these levels stand for."""
    return sum(count << level for level, count in enumerate(counts))
