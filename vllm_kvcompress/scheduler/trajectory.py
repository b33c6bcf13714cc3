"""When a request compacts and how much stays, from its lengths alone.

Nothing here depends on batch neighbours, chunk sizes, memory pressure or preemption: a
replayed request walks the same trajectory again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_kvcompress.bands import Limits
from vllm_kvcompress.levels import Merges, plan_merges
from vllm_kvcompress.settings import Phase, Settings

NEVER = 1 << 62
"""Position of a compaction that never comes."""


class Schedule(NamedTuple):
    """The server's settings that decide when requests compact.

    Attributes
    ----------
    phase : str
        ``after_prefill``, ``during_prefill`` or ``decode``.
    interval : int
        Tokens between two grid points.
    prune_after : int
        No compaction before this many tokens.
    limits : tuple of (Limits or None)
        One entry per KV cache group; ``None`` for groups that keep every token.
    block_size : int
    max_position : int
        Longest request, in tokens.
    """

    phase: Phase
    interval: int
    prune_after: int
    limits: tuple[Limits | None, ...]
    block_size: int
    max_position: int

    @classmethod
    def of(
        cls,
        settings: Settings,
        limits: Iterable[Limits | None],
        block_size: int,
        max_position: int,
    ) -> Schedule:
        """The schedule that a server's settings make with its groups' limits."""
        return cls(
            phase=settings.phase,
            interval=settings.interval,
            prune_after=settings.prune_after,
            limits=tuple(limits),
            block_size=block_size,
            max_position=max_position,
        )


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


@dataclass
class Trajectory:
    """The compactions of one request, in order of position.

    Attributes
    ----------
    schedule : Schedule
    prompt_tokens : int
    base : int
        Leading blocks that are never compacted (the prompt in the decode phase).
    position : int
        Position of the compaction under way or just done.
    steps : dict of int to Step
        What the compaction at ``position`` does, by KV cache group.
    removed : list of int
        Blocks removed so far per group, those of ``steps`` included.
    levels : list of (list of int)
        Number of pooled blocks by level, per group; empty where nothing merges.
    written : list of int
        Blocks that the last compaction left, per group where something merges.
    due : int
        Position of the next compaction.
    """

    schedule: Schedule
    prompt_tokens: int
    base: int = field(init=False)
    position: int = field(init=False, default=0)
    steps: dict[int, Step] = field(init=False, default_factory=dict)
    removed: list[int] = field(init=False)
    levels: list[list[int]] = field(init=False)
    written: list[int] = field(init=False)
    due: int = field(init=False)

    def __post_init__(self) -> None:
        decode = self.schedule.phase == "decode"
        self.base = -(-self.prompt_tokens // self.schedule.block_size) if decode else 0
        self.removed = [0] * len(self.schedule.limits)
        self.levels = [[] for _ in self.schedule.limits]
        self.written = [0] * len(self.schedule.limits)
        self.due = self._next_due(0)

    def advance(self, computed: int) -> None:
        """Walk on to the compaction at ``computed`` tokens, if there is one.

        Parameters
        ----------
        computed : int
            Tokens of the request whose keys and values are in the cache.
        """
        while self.due <= computed:
            self.position = self.due
            self.steps = self._steps_at(self.due)
            for group, step in self.steps.items():
                limits = self.schedule.limits[group]
                if limits is not None and limits.merging is not None:
                    self.steps[group] = self._merge(group, limits, step)
                self.removed[group] += step.old - step.kept
            self.due = self._next_due(self.position)

    def peak_blocks(self, group: int, position: int) -> int:
        """Upper bound of the blocks a group holds at once on the way to ``position``."""
        size = self.schedule.block_size
        limits = self.schedule.limits[group]
        if limits is None:
            return -(-position // size)
        base = self.base * size
        first = self.due if self.position == 0 else self.position
        if position <= max(first, base):
            return -(-position // size)
        peak = base + limits.peak(position - base, first - base, self.schedule.interval)
        return -(-peak // size)

    def _live(self, group: int, position: int) -> int:
        return position - (self.base + self.removed[group]) * self.schedule.block_size

    def _steps_at(self, position: int) -> dict[int, Step]:
        steps = {}
        for group, limits in enumerate(self.schedule.limits):
            if limits is not None:
                old, kept = limits.blocks_kept(self._live(group, position), position)
                if kept < old:
                    steps[group] = Step(old, kept)
        return steps

    def _merge(self, group: int, limits: Limits, step: Step) -> Step:
        """Plan the merges of a step, and note the levels that they lead to."""
        assert limits.merging is not None
        before = self.levels[group]
        held = sum(before)
        if limits.merging.share is None:
            lead, ranked = limits.sink_blocks, 0
            fresh, pooled = step.old - lead - held, step.kept - lead
        else:
            least = limits.pooled_at_least(self.position)
            pooled = max(int(step.kept * limits.merging.share), least)
            # The sinks stay unpooled; Limits.least leaves room for both.
            pooled = min(pooled, step.kept - max(1, limits.sink_blocks))
            lead, ranked = 0, step.old - held
            fresh = ranked - (step.kept - pooled)
        merges = plan_merges([sum(before[:1]) + fresh, *before[1:]], pooled)
        exact = step.old - self.written[group]
        self.levels[group] = merges.counts
        self.written[group] = step.kept
        return step._replace(pooled=Pooled(lead, before, fresh, ranked, exact, merges))

    def _next_due(self, position: int) -> int:
        """First grid position after ``position`` at which some group is over its budget."""
        earliest = self._earliest(position)
        if earliest >= NEVER:
            return NEVER
        interval = self.schedule.interval
        start = self.prompt_tokens
        if self.schedule.phase == "decode":
            start += interval
        if self.schedule.phase == "during_prefill" and earliest < start:
            grid = -(-earliest // interval) * interval
            while grid < start:
                if self._steps_at(grid):
                    return grid
                grid += interval
        grid = start + max(0, -(-(earliest - start) // interval)) * interval
        while grid <= self.schedule.max_position:
            if self._steps_at(grid):
                return grid
            grid += interval
        return NEVER

    def _earliest(self, position: int) -> int:
        """A position before which nothing can be due (spares walking the grid)."""
        size = self.schedule.block_size
        earliest = NEVER
        for group, limits in enumerate(self.schedule.limits):
            if limits is None or limits.ratio == 1:
                continue
            over = (self.base + self.removed[group]) * size
            over += limits.budget if limits.budget is not None else size
            earliest = min(earliest, over + 1)
        return max(earliest, position + 1, self.schedule.prune_after)


def peak_tokens(schedule: Schedule, limits: Limits, position: int) -> int:
    """Most tokens any request holds at once on the way to ``position`` in ``during_prefill``.

    Used to size the pool at start-up, where no request is known yet.
    """
    first = max(limits.budget or 0, schedule.prune_after) + schedule.interval
    if limits.budget is None:
        alone = Trajectory(schedule._replace(limits=(limits,)), position)
        first = min(position, alone.due + schedule.interval)
    return limits.peak(position, first, schedule.interval)


def blocks_after(schedule: Schedule, prompt_tokens: int) -> Sequence[int]:
    """Blocks each group holds once a prompt has been computed and compacted."""
    walk = Trajectory(schedule, prompt_tokens)
    walk.advance(prompt_tokens)
    total = -(-prompt_tokens // schedule.block_size)
    return [total - removed for removed in walk.removed]
