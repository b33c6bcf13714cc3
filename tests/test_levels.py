"""Which blocks merge: plans by hand, and a slow reference that merges one pair at a time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_kvcompress.levels import (
    Merges,
    Round,
    fewest_blocks,
    merged_counts,
    plan_merges,
    tokens_held,
)


class Block(NamedTuple):
    """A block of the reference: its level and the original blocks in it, in their order."""

    level: int
    leaves: list[int]


def blocks_of(counts: Sequence[int]) -> list[Block]:
    """Blocks of these counts by level, oldest first, over leaves numbered by age."""
    blocks: list[Block] = []
    for level in reversed(range(len(counts))):
        for _ in range(counts[level]):
            first = blocks[-1].leaves[-1] + 1 if blocks else 0
            blocks.append(Block(level, list(range(first, first + 2**level))))
    return blocks


def merged_literally(blocks: list[Block], keep: int) -> list[Block]:
    """The rule word for word: the fullest level, of several the highest, its two oldest."""
    blocks = list(blocks)
    while len(blocks) > keep:
        levels = [block.level for block in blocks]
        fullest = max(levels, key=lambda level: (levels.count(level), level))
        older = levels.index(fullest)
        newer = levels.index(fullest, older + 1)
        assert newer == older + 1
        leaves = blocks[older].leaves + blocks[newer].leaves
        blocks[older : newer + 1] = [Block(fullest + 1, leaves)]
    return blocks


def carried_out(blocks: list[Block], merges: Merges) -> list[Block]:
    """Run the rounds one by one, as a worker does, and take the blocks of ``order``."""
    numbered = list(blocks)
    used: set[int] = set()
    for level, older, newer in merges.rounds:
        existing = len(numbered)
        assert older
        for pair in zip(older, newer, strict=True):
            assert all(0 <= number < existing for number in pair)
            assert used.isdisjoint(pair) and pair[0] != pair[1]
            assert [numbered[number].level for number in pair] == [level, level]
            used.update(pair)
            leaves = numbered[pair[0]].leaves + numbered[pair[1]].leaves
            numbered.append(Block(level + 1, leaves))
    assert sorted(merges.order) == [n for n in range(len(numbered)) if n not in used]
    return [numbered[number] for number in merges.order]


def assert_in_order(blocks: list[Block]) -> None:
    """Levels never decrease with age, and blocks are contiguous runs of ``2**level`` leaves."""
    levels = [block.level for block in blocks]
    assert levels == sorted(levels, reverse=True)
    assert all(len(block.leaves) == 2**block.level for block in blocks)
    leaves = [leaf for block in blocks for leaf in block.leaves]
    assert leaves == list(range(len(leaves)))


def by_level(counts: Sequence[int]) -> dict[int, int]:
    """Counts without the levels that hold nothing."""
    return {level: count for level, count in enumerate(counts) if count}


any_counts = st.lists(st.integers(0, 20), max_size=6)


@st.composite
def plans(draw) -> tuple[list[int], int]:
    """Counts by level and how many blocks to keep."""
    counts = draw(any_counts)
    return counts, draw(st.integers(tokens_held(counts).bit_count(), sum(counts)))


histories = st.lists(st.tuples(st.integers(0, 24), st.floats(0, 1)), min_size=1, max_size=60)
"""Compactions: new blocks since the last one, and where between fewest and all to stop."""


def kept_of(counts: list[int], share: float) -> int:
    """How many of these blocks to keep: near the fewest, as in use, or anywhere."""
    fewest = tokens_held(counts).bit_count()
    return fewest + int(share**3 * (sum(counts) - fewest))


# -- by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "keep", "rounds", "order", "after"),
    [
        ([], 0, [], [], []),
        ([1], 1, [], [0], [1]),
        ([5], 5, [], [0, 1, 2, 3, 4], [5]),
        ([5], 9, [], [0, 1, 2, 3, 4], [5]),
        ([2], 1, [Round(0, [0], [1])], [2], [0, 1]),
        # The two oldest of four.
        ([4], 3, [Round(0, [0], [1])], [4, 2, 3], [2, 1]),
        # Then level 0 still has more than level 1.
        ([4], 2, [Round(0, [0, 2], [1, 3])], [4, 5], [0, 2]),
        ([4], 1, [Round(0, [0, 2], [1, 3]), Round(1, [4], [5])], [6], [0, 0, 1]),
        # 8 -> 6+1 -> 4+2 -> 2+3 -> 2+1+1.
        ([8], 5, [Round(0, [0, 2, 4], [1, 3, 5])], [8, 9, 10, 6, 7], [2, 3]),
        (
            [8],
            4,
            [Round(0, [0, 2, 4], [1, 3, 5]), Round(1, [8], [9])],
            [11, 10, 6, 7],
            [2, 1, 1],
        ),
        # Of levels with equally many the highest: its blocks 0 and 1 are the oldest.
        ([2, 2], 3, [Round(1, [0], [1])], [4, 2, 3], [2, 0, 1]),
        ([3, 3], 5, [Round(1, [0], [1])], [6, 2, 3, 4, 5], [3, 1, 1]),
        # Five new ones behind levels 2 and 1: two merges of level 0, whose results are newer
        # than the level 1 that was there.
        ([5, 1, 1], 5, [Round(0, [2, 4], [3, 5])], [0, 1, 7, 8, 6], [1, 3, 1]),
        # 1+3 -> 1+1+1: an old level merges although there are newer ones.
        ([1, 3], 3, [Round(1, [0], [1])], [4, 2, 3], [1, 1, 1]),
        # 1+5 -> 1+3+1 -> 1+1+2 -> 1+1+0+1: what the first round made merges again.
        (
            [1, 5],
            3,
            [Round(1, [0, 2], [1, 3]), Round(2, [6], [7])],
            [8, 4, 5],
            [1, 1, 0, 1],
        ),
    ],
)
def test_plans_by_hand(counts, keep, rounds, order, after):
    assert plan_merges(counts, keep) == Merges(rounds, order, after)
    assert merged_counts(counts, keep) == after


def test_tokens_and_fewest_blocks_by_hand():
    assert [tokens_held(counts) for counts in ([], [0], [3], [1, 2, 3])] == [0, 0, 3, 17]
    assert [fewest_blocks(counts) for counts in ([], [0], [3], [8], [1, 2, 3])] == [0, 0, 2, 1, 2]


def test_too_few_blocks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\[3, 1\] blocks by level cannot be merged into 1"):
        plan_merges([3, 1], 1)


# -- against the rule word for word --------------------------------------------------------


@given(plans())
@hypothesis_settings(max_examples=300, deadline=None)
def test_plan_is_the_rule_word_for_word(plan):
    counts, keep = plan
    blocks = blocks_of(counts)
    merges = plan_merges(list(counts), keep)
    expected = merged_literally(blocks, keep)
    assert carried_out(blocks, merges) == expected
    assert by_level(merges.counts) == Counter(block.level for block in expected)
    assert merges.counts == merged_counts(counts, keep)
    assert_in_order(expected)


@given(plans())
@hypothesis_settings(max_examples=200, deadline=None)
def test_plan_keeps_as_many_as_asked_and_loses_nothing(plan):
    counts, keep = plan
    given_counts = list(counts)
    merges = plan_merges(counts, keep)
    assert counts == given_counts
    assert sum(merges.counts) == len(merges.order) == keep
    assert min(merges.counts, default=0) >= 0
    assert tokens_held(merges.counts) == tokens_held(counts)


@given(plans())
@hypothesis_settings(max_examples=200, deadline=None)
def test_only_what_goes_is_touched(plan):
    """One merge for each block less; rounds rise in level; no round is empty."""
    counts, keep = plan
    merges = plan_merges(counts, keep)
    assert sum(len(older) for _, older, _ in merges.rounds) == sum(counts) - keep
    levels = [level for level, _, _ in merges.rounds]
    assert levels == sorted(set(levels))
    numbers = [n for _, older, newer in merges.rounds for n in (*older, *newer)]
    assert len(numbers) == len(set(numbers)) == 2 * (sum(counts) - keep)


@given(any_counts)
@hypothesis_settings(max_examples=200, deadline=None)
def test_fewest_blocks_can_be_had_and_no_fewer(counts):
    fewest = fewest_blocks(counts)
    assert fewest == bin(sum(2**block.level for block in blocks_of(counts))).count("1")
    merges = plan_merges(counts, fewest)
    assert set(merges.counts) <= {0, 1}
    assert len(merges.order) == fewest
    for keep in (fewest - 1, -1):
        with pytest.raises(ValueError, match="cannot be merged"):
            plan_merges(counts, keep)


@given(plans(), st.floats(0, 1))
@hypothesis_settings(max_examples=200, deadline=None)
def test_stopping_on_the_way_changes_nothing(plan, share):
    """Merging to a number in two goes is merging to it in one."""
    counts, keep = plan
    blocks = blocks_of(counts)
    first = plan_merges(counts, keep + int(share * (sum(counts) - keep)))
    second = plan_merges(first.counts, keep)
    at_once = plan_merges(counts, keep)
    assert carried_out(carried_out(blocks, first), second) == carried_out(blocks, at_once)
    assert by_level(second.counts) == by_level(at_once.counts)


# -- many compactions ----------------------------------------------------------------------


def assert_compactions_follow_the_rule(history: Iterable[tuple[int, float]]) -> None:
    """Compact after every batch of new blocks, beside the reference."""
    counts = [0]
    blocks: list[Block] = []
    total = 0
    for new, share in history:
        blocks = [*blocks, *(Block(0, [leaf]) for leaf in range(total, total + new))]
        total += new
        counts[0] += new
        keep = kept_of(counts, share)
        merges = plan_merges(counts, keep)
        assert sum(len(older) for _, older, _ in merges.rounds) == len(blocks) - keep
        expected = merged_literally(blocks, keep)
        blocks = carried_out(blocks, merges)
        counts = merges.counts
        assert blocks == expected
        assert_in_order(blocks)
        assert len(blocks) == sum(counts) == keep
        assert tokens_held(counts) == total
        assert by_level(counts) == Counter(block.level for block in blocks)


@given(histories)
@hypothesis_settings(max_examples=60, deadline=None)
def test_many_compactions_are_the_rule_word_for_word(history):
    assert_compactions_follow_the_rule(history)


@pytest.mark.parametrize("seed", range(6))
def test_sixty_compactions_are_the_rule_word_for_word(seed):
    random = Random(seed)
    assert_compactions_follow_the_rule((random.randint(0, 24), random.random()) for _ in range(60))


@pytest.mark.parametrize(("new", "keep"), [(4, 8), (12, 24), (1, 7), (32, 12)])
def test_steady_compactions_are_the_rule_word_for_word(new, keep):
    """A long request: as many new blocks each time, always down to the same number."""
    counts = [0]
    blocks: list[Block] = []
    for done in range(60):
        blocks += [Block(0, [leaf]) for leaf in range(done * new, (done + 1) * new)]
        counts[0] += new
        blocks_kept = min(keep, len(blocks))
        merges = plan_merges(counts, blocks_kept)
        expected = merged_literally(blocks, blocks_kept)
        blocks, counts = carried_out(blocks, merges), merges.counts
        assert blocks == expected
        assert_in_order(blocks)
    assert len(blocks) == keep
    assert tokens_held(counts) == 60 * new


def test_importing_levels_imports_no_torch():
    """The scheduler plans merges without tensors."""
    code = (
        "import sys\n"
        "import vllm_kvcompress.levels\n"
        "print(sorted({'torch', 'vllm', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
