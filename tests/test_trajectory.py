"""Trajectories against the rule as written in the design, and their bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
from compaction_rule import Compaction, expected_plans, least_blocks
from engine_stub import EngineOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.bands import Limits, Merging
from vllm_kvcompress.levels import Merges, Round
from vllm_kvcompress.scheduler.trajectory import (
    Pooled,
    Schedule,
    Step,
    Trajectory,
    peak_tokens,
)

LONGEST = 600
"""No request here is longer."""

ALL = Merging(None, count=True)
SOME = Merging(Fraction(1, 4), count=True)


@st.composite
def engines(draw: st.DrawFn) -> EngineOptions:
    """Settings that :mod:`vllm_kvcompress.bands` would let through, and ratios of any kind."""
    size = draw(st.integers(1, 16))
    phase = draw(st.sampled_from(["after_prefill", "during_prefill", "decode"]))
    recent = draw(st.integers(0, 40))
    sinks = 0 if phase == "decode" else draw(st.integers(0, 40))
    ratio = phase != "decode" and draw(st.booleans())
    merging = draw(st.sampled_from([None, ALL, SOME]))
    tightest = Limits(None, None, sinks, recent, size, merging)
    needed = least_blocks(tightest, LONGEST) * size + recent + size - 1
    least = max(2, -(-needed // size))
    limits: list[Limits | None] = []
    for _ in range(draw(st.integers(1, 3))):
        if ratio:
            share = Fraction(draw(st.integers(1, 40)), 40)
            limits.append(Limits(None, share, sinks, recent, size, merging))
        else:
            budget = (least + draw(st.integers(0, 6))) * size
            limits.append(Limits(budget, None, sinks, recent, size, merging))
    if draw(st.booleans()):
        limits.append(None)
    return EngineOptions(
        limits=tuple(limits),
        block_size=size,
        phase=phase,
        interval=draw(st.integers(1, 50)),
        prune_after=draw(st.sampled_from([0, 0, draw(st.integers(1, 200))])),
    )


def schedule_of(options: EngineOptions, longest: int = LONGEST) -> Schedule:
    return Schedule(
        "knorm",
        options.phase,
        options.interval,
        options.prune_after,
        options.limits,
        options.block_size,
        longest,
    )


def walk(options: EngineOptions, prompt: int, length: int) -> list[Compaction]:
    """Compactions before ``length`` tokens, met by stopping wherever one is due."""
    trajectory = Trajectory(schedule_of(options), prompt)
    plans = []
    while trajectory.due < length:
        trajectory.advance(trajectory.due)
        for group, step in sorted(trajectory.steps.items()):
            plans.append(compaction_of(trajectory, group, step))
    return plans


def compaction_of(trajectory: Trajectory, group: int, step: Step) -> Compaction:
    """A step in the words of the rule."""
    position, old, kept = trajectory.position, step.old, step.kept
    if step.pooled is None:
        return Compaction(position, group, old, kept, 0, (*range(old),), kept, (0,) * kept)
    lead, before, fresh, ranked, _, merges = step.pooled
    assert trajectory.levels[group] == merges.counts
    total, held = sum(before) + fresh, sum(before)
    stored = held if ranked else total
    best = ranked - fresh if ranked else 0
    merged = {n for _, older, newer in merges.rounds for n in (*older, *newer)}
    read = [lead + n for n in range(stored) if n in merged]
    levels = [n for n in reversed(range(len(merges.counts))) for _ in range(merges.counts[n])]
    return Compaction(
        position,
        group,
        old,
        kept,
        lead + len(merges.order),
        (*read, *(range(held, old) if ranked else ())),
        sum(number >= stored for number in merges.order) + best,
        (0,) * lead + tuple(levels) + (0,) * best,
    )


lengths = {"prompt": st.integers(1, 300), "outputs": st.integers(1, 200)}


@settings(max_examples=1000, deadline=None)
@given(options=engines(), **lengths)
def test_follows_the_rule(options: EngineOptions, prompt: int, outputs: int) -> None:
    length = prompt + outputs
    assert walk(options, prompt, length) == expected_plans(options, prompt, length)


@settings(max_examples=300, deadline=None)
@given(options=engines(), data=st.data(), **lengths)
def test_does_not_depend_on_where_it_is_asked(
    options: EngineOptions, data: st.DataObject, prompt: int, outputs: int
) -> None:
    trajectory = Trajectory(schedule_of(options), prompt)
    length = prompt + outputs
    for position in sorted(data.draw(st.lists(st.integers(0, length), max_size=8))):
        trajectory.advance(position)
        removed = [0] * len(options.limits)
        for plan in expected_plans(options, prompt, position + 1):
            removed[plan.group] += plan.old - plan.kept
        assert trajectory.removed == removed
        assert trajectory.due > position


@settings(max_examples=1000, deadline=None)
@given(options=engines(), **lengths)
def test_no_group_holds_more_than_its_bound(
    options: EngineOptions, prompt: int, outputs: int
) -> None:
    length = prompt + outputs
    plans = expected_plans(options, prompt, length)
    trajectory = Trajectory(schedule_of(options), prompt)
    for group, limits in enumerate(options.limits):
        most = held = 0
        for position in range(1, length + 1):
            held += (position - 1) % options.block_size == 0
            most = max(most, held)
            held -= sum(p.old - p.kept for p in plans if p[:2] == (position, group))
        assert most <= trajectory.peak_blocks(group, length)
        if options.phase == "during_prefill" and limits is not None:
            schedule = schedule_of(options, length)
            tokens = peak_tokens(schedule, limits, length)
            assert most <= -(-tokens // options.block_size), (
                "start-up would size the pool too small"
            )


@pytest.mark.parametrize(
    ("merging", "sinks", "first", "second"),
    [
        # At 50 tokens 12 blocks become 7, at 58 again 9 become 7. Of the first 12 one is a
        # sink: 11 -> 9+1 -> 7+2 -> 5+3 -> 3+4 -> 3+2+1 (from level 0 on). Two new blocks
        # then: 5+2+1 -> 3+3+1 -> 3+1+2.
        (
            ALL,
            4,
            Pooled(
                lead=1,
                before=[],
                fresh=11,
                ranked=0,
                exact=12,
                merges=Merges(
                    [Round(0, [0, 2, 4, 6], [1, 3, 5, 7]), Round(1, [11], [12])],
                    [15, 13, 14, 8, 9, 10],
                    [3, 2, 1],
                ),
            ),
            Pooled(
                lead=1,
                before=[3, 2, 1],
                fresh=2,
                ranked=0,
                exact=2,
                merges=Merges(
                    [Round(0, [3], [4]), Round(1, [1], [2])], [0, 9, 8, 5, 6, 7], [3, 1, 2]
                ),
            ),
        ),
        # Of 7 blocks 4 are pooled, one for each binary digit of 12 and of 14 blocks; ranking
        # leaves over 9 of 12: 9 -> 7+1 -> 5+2 -> 3+3 -> 3+1+1 -> 1+2+1, and 2 of 5 later:
        # 3+2+1 -> 1+3+1 -> 1+1+2.
        (
            SOME,
            0,
            Pooled(
                lead=0,
                before=[],
                fresh=9,
                ranked=12,
                exact=12,
                merges=Merges(
                    [Round(0, [0, 2, 4, 6], [1, 3, 5, 7]), Round(1, [9], [10])],
                    [13, 11, 12, 8],
                    [1, 2, 1],
                ),
            ),
            Pooled(
                lead=0,
                before=[1, 2, 1],
                fresh=2,
                ranked=5,
                exact=2,
                merges=Merges([Round(0, [3], [4]), Round(1, [1], [2])], [0, 7, 6, 5], [1, 1, 2]),
            ),
        ),
    ],
    ids=["merge", "knorm+merge"],
)
def test_two_compactions_that_merge(
    merging: Merging, sinks: int, first: Pooled, second: Pooled
) -> None:
    limits = Limits(32, None, sinks, recent=0, block_size=4, merging=merging)
    options = EngineOptions((limits, None), block_size=4, interval=8)
    trajectory = Trajectory(schedule_of(options), 50)
    assert trajectory.due == 50
    trajectory.advance(50)
    assert trajectory.steps == {0: Step(12, 7, first)}
    assert trajectory.levels == [first.merges.counts, []]
    assert trajectory.written == [7, 0]
    assert trajectory.due == 58
    trajectory.advance(60)
    assert trajectory.position == 58
    assert trajectory.steps == {0: Step(9, 7, second)}
    assert trajectory.levels == [second.merges.counts, []]
    assert trajectory.removed == [7, 0]


def test_sinks_stay_unpooled_whatever_the_share() -> None:
    """A quarter of the blocks would take one of 22 that hold the sinks."""
    limits = Limits(464, None, sinks=352, recent=0, block_size=16, merging=SOME)
    trajectory = Trajectory(schedule_of(EngineOptions((limits,), block_size=16)), 500)
    trajectory.advance(500)
    step = trajectory.steps[0]
    assert (step.old, step.kept) == (31, 28)
    assert step.pooled is not None
    assert step.pooled.ranked - step.pooled.fresh == 22
    assert len(step.pooled.merges.order) == 6
