"""Trajectories against the rule as written in the design, and their bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
from compaction_rule import Compaction, expected_plans, least_blocks
from engine_stub import EngineOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.levels import Merges, Round
from vllm_kvcompress.limits import Limits, Merging
from vllm_kvcompress.scheduler.due import Grid, first_due
from vllm_kvcompress.scheduler.schedule import NEVER, Schedule
from vllm_kvcompress.scheduler.steps import Pooled, Step
from vllm_kvcompress.scheduler.trajectory import Trajectory, peak_tokens

LONGEST = 600
"""No request here is longer."""

ALL = Merging(None, count=True)
SOME = Merging(Fraction(1, 4), count=True)

SHARES = st.one_of(st.just(Fraction(0)), st.fractions(0, 1, max_denominator=8))
"""Of what is kept: the latest tokens that stay."""


@st.composite
def engines(draw: st.DrawFn) -> EngineOptions:
    """Settings that :mod:`vllm_kvcompress.bands` would let through, and ratios of any kind."""
    size = draw(st.integers(1, 16))
    phase = draw(st.sampled_from(["after_prefill", "during_prefill", "decode"]))
    recent, latest = draw(st.integers(0, 40)), draw(SHARES)
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
            limits.append(Limits(None, share, sinks, recent, size, merging, latest))
        else:
            budget = (least + draw(st.integers(0, 6))) * size
            limits.append(Limits(budget, None, sinks, recent, size, merging, latest))
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


def walk(
    options: EngineOptions, prompt: int, length: int, context: int | None = None
) -> list[Compaction]:
    """Compactions before ``length`` tokens, met by stopping wherever one is due."""
    trajectory = Trajectory(schedule_of(options), prompt, context)
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


lengths = {
    "prompt": st.integers(1, 300),
    "outputs": st.integers(1, 200),
    "part": st.one_of(st.none(), st.integers(1, 300)),
}


def context_of(options: EngineOptions, prompt: int, part: int | None) -> int | None:
    """A context of any length that the prompt has room for."""
    return None if part is None or options.phase == "decode" else min(part, prompt)


@settings(max_examples=1000, deadline=None)
@given(options=engines(), **lengths)
def test_follows_the_rule(
    options: EngineOptions, prompt: int, outputs: int, part: int | None
) -> None:
    length, context = prompt + outputs, context_of(options, prompt, part)
    expected = expected_plans(options, prompt, length, context)
    assert walk(options, prompt, length, context) == expected


@st.composite
def groups(draw: st.DrawFn) -> tuple[Limits, int, int]:
    """Limits of any kind, blocks before what may change, and blocks that are left alone."""
    size = draw(st.integers(1, 8))
    merging = draw(st.sampled_from([None, ALL, SOME]))
    sinks, recent, latest = draw(st.integers(0, 20)), draw(st.integers(0, 20)), draw(SHARES)
    if draw(st.booleans()):
        budget = draw(st.integers(1, 20)) * size
        limits = Limits(budget, None, sinks, recent, size, merging, latest)
    else:
        share = Fraction(draw(st.integers(1, 40)), 40)
        limits = Limits(None, share, sinks, recent, size, merging, latest)
    base = draw(st.integers(0, 6))
    return limits, base + draw(st.integers(0, 6)), base


@settings(max_examples=1000, deadline=None)
@given(
    group=groups(),
    earliest=st.integers(1, 300),
    interval=st.integers(1, 30),
    start=st.integers(1, 200),
    last=st.integers(1, LONGEST),
    during=st.booleans(),
)
def test_first_due_is_where_walking_the_grid_finds_it(
    group: tuple[Limits, int, int],
    earliest: int,
    interval: int,
    start: int,
    last: int,
    during: bool,
) -> None:
    limits, before, base = group
    size = limits.block_size

    def is_due(position: int) -> bool:
        beyond = position - start
        if beyond % interval if beyond >= 0 else not during or position % interval:
            return False
        old, kept = limits.blocks_kept(position - before * size, position, base * size)
        return kept < old

    walked = next((p for p in range(earliest, last + 1) if is_due(p)), NEVER)
    grid = Grid(interval, start, last, during)
    assert first_due(limits, before, base, earliest, grid) == walked


@pytest.mark.parametrize("merging", [None, ALL, SOME])
@pytest.mark.parametrize("latest", [Fraction(0), Fraction(1)])
def test_next_compaction_is_found_without_walking(
    latest: Fraction, merging: Merging | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that keeps nearly all has one to spare per 100,000 tokens, and a block of 32."""
    looked = 0
    least = Limits.least

    def count(limits: Limits, position: int) -> int:
        nonlocal looked
        looked += 1
        return least(limits, position)

    monkeypatch.setattr(Limits, "least", count)
    limits = Limits(None, Fraction(99_999, 100_000), 4, 64, 32, merging, latest)
    schedule = Schedule("knorm", "after_prefill", 1, 0, (limits,) * 30, 32, 10_000_000)
    trajectory = Trajectory(schedule, 500)
    assert trajectory.due == 32 * 100_000
    assert looked < 10


@settings(max_examples=300, deadline=None)
@given(options=engines(), data=st.data(), **lengths)
def test_does_not_depend_on_where_it_is_asked(
    options: EngineOptions, data: st.DataObject, prompt: int, outputs: int, part: int | None
) -> None:
    context = context_of(options, prompt, part)
    trajectory = Trajectory(schedule_of(options), prompt, context)
    length = prompt + outputs
    for position in sorted(data.draw(st.lists(st.integers(0, length), max_size=8))):
        trajectory.advance(position)
        removed = [0] * len(options.limits)
        for plan in expected_plans(options, prompt, position + 1, context):
            removed[plan.group] += plan.old - plan.kept
        assert trajectory.removed == removed
        assert trajectory.due > position


@settings(max_examples=1000, deadline=None)
@given(options=engines(), **lengths)
def test_no_group_holds_more_than_its_bound(
    options: EngineOptions, prompt: int, outputs: int, part: int | None
) -> None:
    length, context = prompt + outputs, context_of(options, prompt, part)
    plans = expected_plans(options, prompt, length, context)
    trajectory = Trajectory(schedule_of(options), prompt, context)
    past = Trajectory(schedule_of(options), prompt, context)
    past.advance(context or 0)
    for group, limits in enumerate(options.limits):
        most = held = after = 0
        for position in range(1, length + 1):
            held += (position - 1) % options.block_size == 0
            most = max(most, held)
            after = max(after, held) if position > (context or 0) else 0
            held -= sum(p.old - p.kept for p in plans if p[:2] == (position, group))
        assert most <= trajectory.peak_blocks(group, length)
        assert after <= past.peak_blocks(group, length), "asked once the context is compact"
        if context is None and options.phase == "during_prefill" and limits is not None:
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


def steps_of(trajectory: Trajectory, length: int) -> list[tuple[int, int, int]]:
    """Position, old and kept blocks of every compaction of the first group."""
    steps = []
    while trajectory.due < length:
        trajectory.advance(trajectory.due)
        steps.append((trajectory.position, *trajectory.steps[0][:2]))
    return steps


def test_context_is_compacted_where_it_ends_and_the_question_never() -> None:
    limits = Limits(16, None, sinks=4, recent=0, block_size=4)
    options = EngineOptions((limits, None), block_size=4, interval=8)
    trajectory = Trajectory(schedule_of(options), 37, context_tokens=30)
    assert trajectory.due == 30
    # 8 blocks are the most of the context. 37 tokens have 10 blocks, at least 3 of which go;
    # generated tokens take 16 + 8.
    assert trajectory.peak_blocks(0, 30) == 8
    assert trajectory.peak_blocks(0, 70) == 10 - 3 + 6
    assert trajectory.peak_blocks(1, 70) == 18

    trajectory.advance(30)
    # 30 tokens: 7 full blocks and 2 beside, so 3 fit the budget of 16.
    assert trajectory.steps == {0: Step(7, 3)}
    assert (trajectory.base, trajectory.limits) == (0, (limits, None))
    assert trajectory.first_entry(0, holes=0) == 0
    assert trajectory.peak_blocks(0, 70) == 10 - 4 + 6
    # Of generated tokens the first 3 lie in the question's last block. At 45 and 53 there are
    # 5 and 13 others, at 61 21: 5 blocks and 1 beside, so 3 fit.
    assert trajectory.due == 61
    trajectory.advance(60)
    assert trajectory.position == 30
    trajectory.advance(61)
    assert trajectory.steps == {0: Step(5, 3)}
    assert trajectory.removed == [6, 0]
    assert (trajectory.base, trajectory.below) == (10, [4, 0])
    assert trajectory.first_entry(0, holes=4) == 10
    assert trajectory.blocks_before(0, 61) == 12
    own = trajectory.limits[0]
    assert own is not None and own.sinks == 0


def test_context_in_chunks() -> None:
    """The grid of during_prefill ends with the context: 32, 40 and so on are the question's."""
    limits = Limits(16, None, sinks=0, recent=0, block_size=4)
    options = EngineOptions((limits,), block_size=4, interval=8, phase="during_prefill")
    walk = Trajectory(schedule_of(options), 60, context_tokens=30)
    # At 30 there are 22 tokens: 5 blocks and 2 beside. The prompt has 15 blocks; at 84 there
    # are 24 generated tokens after them.
    assert steps_of(walk, 90) == [(24, 6, 4), (30, 5, 3), (84, 6, 4)]


def test_share_of_a_context_and_of_what_is_generated() -> None:
    limits = Limits(None, Fraction(1, 2), sinks=0, recent=0, block_size=4)
    options = EngineOptions((limits,), block_size=4, interval=8)
    walk = Trajectory(schedule_of(options), 40, context_tokens=32)
    assert steps_of(walk, 60) == [(32, 8, 4), (48, 2, 1), (56, 3, 2)]


@pytest.mark.parametrize("context", [1, 7, 8])
def test_context_that_is_short_enough_stays(context: int) -> None:
    limits = Limits(8, None, sinks=0, recent=0, block_size=4)
    options = EngineOptions((limits,), block_size=4, interval=4)
    walk = Trajectory(schedule_of(options), 30, context_tokens=context)
    # 30 tokens have 8 blocks; at 42 there are 10 more tokens, 2 blocks and 2 beside.
    assert steps_of(walk, 44) == [(42, 2, 1)]


def test_context_that_is_the_whole_prompt() -> None:
    """As without it, but that what is generated compacts by itself."""
    limits = Limits(8, None, sinks=0, recent=0, block_size=4)
    options = EngineOptions((limits,), block_size=4, interval=4)
    assert steps_of(Trajectory(schedule_of(options), 32), 42) == [
        (32, 8, 2),
        (36, 3, 2),
        (40, 3, 2),
    ]
    walk = Trajectory(schedule_of(options), 32, context_tokens=32)
    assert steps_of(walk, 48) == [(32, 8, 2), (44, 3, 2)]


def test_levels_of_what_is_generated_begin_anew() -> None:
    limits = Limits(32, None, sinks=4, recent=0, block_size=4, merging=ALL)
    options = EngineOptions((limits,), block_size=4, interval=8)
    trajectory = Trajectory(schedule_of(options), 56, context_tokens=50)
    trajectory.advance(50)
    assert trajectory.levels == [[3, 2, 1]]
    trajectory.advance(trajectory.due)
    # At 96 there are 40 tokens after the 14 blocks of the prompt: 10 blocks become 8, none
    # of them of sinks.
    assert trajectory.position == 96
    pooled = trajectory.steps[0].pooled
    assert pooled is not None
    assert (pooled.lead, pooled.before, pooled.fresh, pooled.exact) == (0, [], 10, 10)
