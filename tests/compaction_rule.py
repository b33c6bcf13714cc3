"""The rule for compactions, written anew from the design, position by position.

Nothing here uses :mod:`vllm_kvcompress.levels` or anything of the scheduler: blocks are a
list, and pairs of them merge one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, floor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vllm_kvcompress.limits import Limits

if TYPE_CHECKING:
    from engine_stub import EngineOptions

T = TypeVar("T")

PlanRecord = tuple[int, int, int, int, int]
"""Position, group, blocks read, written and removed: what a plan says about itself."""


class Compaction(NamedTuple):
    """What a compaction does in one group.

    Attributes
    ----------
    position, group : int
    old, kept : int
        The ``old`` oldest blocks become ``kept``.
    pooled : int
        Blocks at the front that hold pooled tokens afterwards, sinks included where they
        lie before these.
    read : tuple of int
        Blocks that are read, counted from the oldest.
    written : int
        Blocks that are written.
    levels : tuple of int
        Levels of the kept blocks, oldest first.
    """

    position: int
    group: int
    old: int
    kept: int
    pooled: int
    read: tuple[int, ...]
    written: int
    levels: tuple[int, ...]

    @property
    def record(self) -> PlanRecord:
        """What the plan for it says about itself."""
        removed = self.old - self.kept
        return self.position, self.group, len(self.read), self.written, removed


def is_grid(options: EngineOptions, prompt: int, position: int, context: int | None) -> bool:
    """Whether ``position`` is a place where compactions may happen.

    A context is compacted as if it were the prompt; then come generated tokens only.
    """
    generated = options.phase == "decode"
    if context is not None:
        generated = position > context
        prompt = prompt if generated else context
    beyond = position - prompt
    if generated:
        return beyond >= options.interval and beyond % options.interval == 0
    if beyond >= 0:
        return beyond % options.interval == 0
    return options.phase == "during_prefill" and position % options.interval == 0


def expected_plans(
    options: EngineOptions, prompt: int, length: int, context: int | None = None
) -> list[Compaction]:
    """All compactions of a request on its way to ``length`` tokens, by the design's rule."""
    size = options.block_size
    base = ceil(prompt / size) if options.phase == "decode" else 0
    removed = [0] * len(options.limits)
    last: list[Compaction | None] = [None] * len(options.limits)
    plans = []
    for position in range(1, length):
        if context is not None and position == context + 1:
            base = ceil(prompt / size)  # From here on the prompt is left alone.
            removed = [0] * len(options.limits)
            last = [None] * len(options.limits)
        if position < options.prune_after or not is_grid(options, prompt, position, context):
            continue
        for group, limits in enumerate(options.limits):
            if limits is None:
                continue
            if base:
                limits = replace(limits, sinks=0)
            live = position - removed[group] - base * size
            old = max(0, live - window(limits, position, base * size)) // size
            rest = live - old * size
            if limits.budget is None:
                share = ceil(limits.ratio * (position - base * size))
                kept = ceil((share - rest) / size)
            elif live > limits.budget:
                kept = (limits.budget - rest) // size
            else:
                continue
            kept = max(kept, least_blocks(limits, position))
            if kept < old:
                plan = compaction(limits, position, group, old, kept, last[group])
                last[group] = plan
                plans.append(plan)
                removed[group] += (old - kept) * size
    return plans


def window(limits: Limits, position: int, base: int) -> int:
    """Latest tokens that stay: of the tokens kept a share, if it fits beside what must stay."""
    kept = limits.budget
    if kept is None:
        kept = ceil(limits.ratio * (position - base))
    beside = least_blocks(limits, position) * limits.block_size + limits.block_size - 1
    return max(limits.recent, min(floor(kept * limits.recent_share), kept - beside))


def least_blocks(limits: Limits, position: int) -> int:
    """Fewest blocks that may stay."""
    sinks = ceil(limits.sinks / limits.block_size)
    if limits.merging is None:
        return max(sinks, 1)
    beside = sinks if limits.merging.share is None else max(sinks, 1)
    return beside + pool_room(limits, position)


def pool_room(limits: Limits, position: int) -> int:
    """Blocks that suffice for any number of pooled tokens: one per binary digit."""
    return max(1, len(f"{position // limits.block_size:b}"))


def compaction(
    limits: Limits, position: int, group: int, old: int, kept: int, last: Compaction | None
) -> Compaction:
    """Work out a compaction that comes after another one."""
    if limits.merging is None:
        return Compaction(position, group, old, kept, 0, (*range(old),), kept, (0,) * kept)
    before = last.levels[: last.pooled] if last else ()
    if limits.merging.share is None:
        lead, best = ceil(limits.sinks / limits.block_size), 0
        levels = (*before[lead:], *(0,) * (old - max(lead, len(before))))
        stored, ranked = len(levels), ()
    else:
        sinks = max(1, ceil(limits.sinks / limits.block_size))
        pooled = max(int(kept * limits.merging.share), pool_room(limits, position))
        pooled = min(pooled, kept - sinks)  # The sinks stay unpooled, whatever the share.
        assert pooled >= pool_room(limits, position)
        lead, best = 0, kept - pooled
        fresh = old - len(before) - best
        assert fresh >= 0
        levels = (*before, *(0,) * fresh)
        stored, ranked = len(before), range(len(before), old)
    assert sorted(levels, reverse=True) == list(levels), "a newer block has a higher level"
    blocks = [(level, (index,)) for index, level in enumerate(levels)]
    after = merge_pairs(blocks, kept - lead - best, lambda older, newer: older + newer)
    # A block that nobody merged stays where it is, unless ranking has just made it.
    stay = [parts[0] for _, parts in after if len(parts) == 1 and parts[0] < stored]
    read = [lead + index for index in range(stored) if index not in stay]
    return Compaction(
        position,
        group,
        old,
        kept,
        kept - best,
        (*read, *ranked),
        len(after) - len(stay) + best,
        (0,) * lead + tuple(level for level, _ in after) + (0,) * best,
    )


def merge_pairs(
    blocks: Sequence[tuple[int, T]], keep: int, combine: Callable[[T, T], T]
) -> list[tuple[int, T]]:
    """Merge blocks (level and content) one pair at a time until ``keep`` are left.

    The level with most blocks, of several the highest, gives its two oldest; the block that
    they make is the newest of the next level.
    """
    left = list(blocks)
    while len(left) > keep:
        number = Counter(level for level, _ in left)
        level = max(number, key=lambda level: (number[level], level))
        place = next(index for index, block in enumerate(left) if block[0] == level)
        (_, older), (other, newer) = left[place : place + 2]
        assert other == level
        left[place : place + 2] = [(level + 1, combine(older, newer))]
    return left


def best_ranked(items: int, count: int) -> list[int]:
    """The ``count`` of so many items that ranking keeps: any fixed choice would do."""
    return [index * items // count for index in range(count)]
