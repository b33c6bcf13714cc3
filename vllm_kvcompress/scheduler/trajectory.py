"""When a request compacts and how much stays, from its lengths alone.

Nothing here depends on batch neighbours, chunk sizes, memory pressure or preemption: a
replayed request walks the same trajectory again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vllm_kvcompress.levels import plan_merges
from vllm_kvcompress.limits import Limits
from vllm_kvcompress.scheduler.due import Grid, first_due
from vllm_kvcompress.scheduler.schedule import NEVER, Schedule
from vllm_kvcompress.scheduler.steps import Pooled, Step


@dataclass
class Trajectory:
    """The compactions of one request, in order of position.

    A request with a context compacts twice over: the context as a prompt of its own, and the
    generated tokens among themselves. What is left of the context, and the rest of the prompt,
    then stay as they are.

    Attributes
    ----------
    schedule : Schedule
    prompt_tokens : int
    context_tokens : int or None
        First tokens of the prompt that are compressed before the others are computed.
    base : int
        Leading entries of the row that the compaction at ``position`` leaves alone: those of
        the prompt in the decode phase, and after the compactions of the context.
    below : list of int
        Blocks removed from within these entries, per group.
    limits : tuple of (Limits or None)
        Those of the schedule; generated tokens after a context have no sinks.
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
    context_tokens: int | None = None
    base: int = field(init=False)
    below: list[int] = field(init=False)
    limits: tuple[Limits | None, ...] = field(init=False)
    position: int = field(init=False, default=0)
    steps: dict[int, Step] = field(init=False, default_factory=dict)
    removed: list[int] = field(init=False)
    levels: list[list[int]] = field(init=False)
    written: list[int] = field(init=False)
    due: int = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.schedule.limits)
        self.removed = [0] * count
        self._begin(self.prompt_blocks if self.schedule.phase == "decode" else 0)
        self.limits = self.schedule.limits
        self.due = self._next_due(0)

    @property
    def prompt_blocks(self) -> int:
        """Blocks of the prompt, a last one that is not full included."""
        return -(-self.prompt_tokens // self.schedule.block_size)

    def advance(self, computed: int) -> None:
        """Walk on to the compaction at ``computed`` tokens, if there is one.

        Parameters
        ----------
        computed : int
            Tokens of the request whose keys and values are in the cache.
        """
        while self.due <= computed:
            if self._leaves_context(self.due):
                self.limits = self.schedule.limits_without_sinks
                self._begin(self.prompt_blocks)
            self.position = self.due
            self.steps = {}
            for groups in self.schedule.kinds:
                self._compact(groups)
            self.due = self._next_due(self.position)

    def _compact(self, groups: Sequence[int]) -> None:
        """Work out the compaction at ``position`` of groups with equal limits."""
        first, size = groups[0], self.schedule.block_size
        limits = self.limits[first]
        assert limits is not None
        live = self.position - self.blocks_before(first, self.position) * size
        old, kept = limits.blocks_kept(live, self.position, self.base * size)
        if kept >= old:
            return
        step = Step(old, kept)
        if limits.merging is not None:
            step = self._merge(first, limits, step)
        for group in groups:
            self.steps[group] = step
            self.removed[group] += old - kept
            self.levels[group], self.written[group] = self.levels[first], self.written[first]

    def _begin(self, base: int) -> None:
        """Leave so many entries of the row alone from now on."""
        self.base, self.below = base, list(self.removed)
        self.levels = [[] for _ in self.removed]
        self.written = [0] * len(self.removed)

    def _leaves_context(self, position: int) -> bool:
        """Whether a compaction at ``position`` is the first one after those of the context."""
        context = self.context_tokens
        return context is not None and self.position <= context < position

    def first_entry(self, group: int, holes: int) -> int:
        """First entry of a row with so many holes that the compaction at ``position`` changes.

        Rows that list pooled blocks several times have no holes: there it is ``base``.
        """
        return max(self.base, self.base - self.below[group] + holes)

    def peak_blocks(self, group: int, position: int) -> int:
        """Upper bound of the blocks a group holds at once on the way to ``position``."""
        size, interval = self.schedule.block_size, self.schedule.interval
        limits, whole = self.schedule.limits[group], -(-position // size)
        if limits is None:
            return whole
        if self.context_tokens is not None and position > self.context_tokens:
            return min(whole, self._peak_past_context(group, limits, position))
        base = self.base * size
        first = self.due if self.position == 0 else self.position
        if position <= max(first, base):
            return whole
        return -(-(base + limits.peak(position - base, first - base, interval)) // size)

    def _peak_past_context(self, group: int, limits: Limits, position: int) -> int:
        assert self.context_tokens is not None
        size, interval = self.schedule.block_size, self.schedule.interval
        context, prune_after = self.context_tokens, self.schedule.prune_after
        if self.position < context:
            peak = self.peak_blocks(group, context)
            left = limits.most_left(context) if context >= prune_after else context
            removed = max(0, context - left) // size
        else:
            peak, removed = 0, (self.below if self.base else self.removed)[group]
        base = self.prompt_blocks * size
        # Grid positions before this one pass without compaction.
        first = self.prompt_tokens + interval
        first += max(0, -(-(prune_after - first) // interval)) * interval
        generated = max(first - base, limits.most_left(position, base) + interval)
        generated = min(max(0, position - base), generated)
        return max(peak, self.prompt_blocks - removed - (-generated // size))

    def blocks_before(self, group: int, position: int) -> int:
        """Blocks' worth of tokens before what a compaction at ``position`` may change."""
        if self._leaves_context(position):
            return self.prompt_blocks
        return self.base + self.removed[group] - self.below[group]

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
        """First grid position after ``position`` at which some group is over its limits."""
        schedule, context = self.schedule, self.context_tokens
        interval, start = schedule.interval, self.prompt_tokens
        during = schedule.phase == "during_prefill"
        if context is not None:
            if position < context:
                due = self._first_due(position, Grid(interval, context, context, during))
                if due < NEVER:
                    return due
            position, during = max(position, context), False
        if schedule.phase == "decode" or context is not None:
            start += interval
        return self._first_due(position, Grid(interval, start, schedule.max_position, during))

    def _first_due(self, position: int, grid: Grid) -> int:
        """First position of a grid after another at which some group is over its limits."""
        base, every = self.base, self.limits
        if self._leaves_context(position + 1):
            base, every = self.prompt_blocks, self.schedule.limits_without_sinks
        earliest = max(position + 1, self.schedule.prune_after)
        due = NEVER
        for first, *_ in self.schedule.kinds:
            limits = every[first]
            assert limits is not None
            before = self.blocks_before(first, position + 1)
            due = min(due, first_due(limits, before, base, earliest, grid))
        return due


def peak_tokens(schedule: Schedule, limits: Limits, position: int) -> int:
    """Most tokens any request holds at once on the way to ``position`` in ``during_prefill``.

    Used to size the pool at start-up, where no request is known yet.
    """
    first = max(limits.budget or 0, schedule.prune_after) + schedule.interval
    if limits.budget is None:
        alone = Trajectory(replace(schedule, limits=(limits,)), position)
        first = min(position, alone.due + schedule.interval)
    return limits.peak(position, first, schedule.interval)


def blocks_after(schedule: Schedule, prompt_tokens: int) -> Sequence[int]:
    """Blocks each group holds once a prompt has been computed and compacted."""
    walk = Trajectory(schedule, prompt_tokens)
    walk.advance(prompt_tokens)
    total = -(-prompt_tokens // schedule.block_size)
    return [total - removed for removed in walk.removed]
