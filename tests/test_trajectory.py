"""Trajectories against the rule as written in the design, and their bounds."""

from __future__ import annotations

from fractions import Fraction

from engine_stub import EngineOptions, PlanRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger import expected_plans

from vllm_kvcompress.bands import Limits
from vllm_kvcompress.scheduler.trajectory import (
    Schedule,
    Trajectory,
    peak_tokens,
)


@st.composite
def engines(draw: st.DrawFn) -> EngineOptions:
    """Settings that :mod:`vllm_kvcompress.bands` would let through, and ratios of any kind."""
    size = draw(st.integers(1, 16))
    phase = draw(st.sampled_from(["after_prefill", "during_prefill", "decode"]))
    recent = draw(st.integers(0, 40))
    sinks = 0 if phase == "decode" else draw(st.integers(0, 40))
    ratio = phase != "decode" and draw(st.booleans())
    least = max(2, -(-(max(1, -(-sinks // size)) * size + recent + size - 1) // size))
    limits: list[Limits | None] = []
    for _ in range(draw(st.integers(1, 3))):
        if ratio:
            share = Fraction(draw(st.integers(1, 40)), 40)
            limits.append(Limits(None, share, sinks, recent, size))
        else:
            budget = (least + draw(st.integers(0, 6))) * size
            limits.append(Limits(budget, None, sinks, recent, size))
    if draw(st.booleans()):
        limits.append(None)
    return EngineOptions(
        limits=tuple(limits),
        block_size=size,
        phase=phase,
        interval=draw(st.integers(1, 50)),
        prune_after=draw(st.sampled_from([0, 0, draw(st.integers(1, 200))])),
    )


def schedule_of(options: EngineOptions, longest: int = 1000) -> Schedule:
    return Schedule(
        options.phase,
        options.interval,
        options.prune_after,
        options.limits,
        options.block_size,
        longest,
    )


def walk(options: EngineOptions, prompt: int, length: int) -> list[PlanRecord]:
    """Compactions before ``length`` tokens, met by stopping wherever one is due."""
    trajectory = Trajectory(schedule_of(options), prompt)
    plans = []
    while trajectory.due < length:
        trajectory.advance(trajectory.due)
        for group, step in sorted(trajectory.steps.items()):
            plans.append((trajectory.position, group, step.old, step.kept))
    return plans


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
        for _, group, old, kept in expected_plans(options, prompt, position + 1):
            removed[group] += old - kept
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
            held -= sum(p[2] - p[3] for p in plans if p[:2] == (position, group))
        assert most <= trajectory.peak_blocks(group, length)
        if options.phase == "during_prefill" and limits is not None:
            schedule = schedule_of(options, length)
            tokens = peak_tokens(schedule, limits, length)
            assert most <= -(-tokens // options.block_size), (
                "start-up would size the pool too small"
            )
