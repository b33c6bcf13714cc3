"""The planner's choices of blocks, and compactions that have to wait for them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from engine_stub import EngineOptions, build_scheduler, make_request
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from vllm_kvcompress.levels import Round
from vllm_kvcompress.limits import Limits, Merging
from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE, CompactionPlan
from vllm_kvcompress.scheduler.planner import Planner
from vllm_kvcompress.scheduler.schedule import NEVER, Schedule

SIZE = 4
FLAT = Limits(budget=8, ratio=None, sinks=0, recent=0, block_size=SIZE)
WIDE = Limits(budget=16, ratio=None, sinks=0, recent=0, block_size=SIZE)


class Desk:
    """A planner with a pool of its own and requests that are mere numbers."""

    def __init__(self, blocks: int, *limits: Limits | None, **schedule: Any) -> None:
        self.pool = BlockPool(blocks, enable_caching=True, hash_block_size=SIZE)
        self.requests: dict[str, Any] = {}
        settings = {"method": "knorm", "phase": "after_prefill", "interval": 4, "prune_after": 0}
        self.planner = Planner(
            Schedule(**(settings | schedule), limits=limits, block_size=SIZE, max_position=1000),
            self.requests,
            self.pool,
        )

    def request(
        self,
        name: str,
        prompt: int,
        computed: int,
        resumable: bool = False,
        max_tokens: int = 100,
    ) -> list[Any]:
        """Add a request and return its row of new blocks."""
        self.requests[name] = SimpleNamespace(
            request_id=name,
            num_prompt_tokens=prompt,
            num_computed_tokens=computed,
            num_tokens=max(prompt, computed + 1),
            max_tokens=max_tokens,
            resumable=resumable,
        )
        return self.pool.get_new_blocks(-(-computed // SIZE))

    def cache(self, blocks: list[Any]) -> None:
        """Give blocks a hash, as the prefix cache would."""
        for block in blocks:
            key = make_block_hash_with_group_id(BlockHash(block.block_id.to_bytes(32, "big")), 0)
            self.pool._insert_block_hash(key, block, num_tokens=SIZE)

    def take_the_rest(self, leave: int = 0) -> list[Any]:
        """Leave only so many free blocks."""
        return self.pool.get_new_blocks(self.pool.get_num_free_blocks() - leave)


def ids(blocks: list[Any]) -> list[int]:
    return [block.block_id for block in blocks]


def destinations(desk: Desk, sources: list[Any], count: int) -> list[Any] | None:
    return desk.planner._destinations(sources, count, {b.block_id: 1 for b in sources})


# -- where compact blocks go --------------------------------------------------------------


def test_own_blocks_without_hash_come_first() -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources[:2])
    assert destinations(desk, sources, 2) == sources[2:]
    assert desk.pool.get_num_free_blocks() == 15


def test_fresh_blocks_spare_hashed_ones() -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources)
    chosen = destinations(desk, sources, 3)
    assert not set(ids(chosen)) & set(ids(sources))
    assert all(block.block_hash is not None for block in sources)
    assert all(block.ref_cnt == 1 for block in chosen)


def test_hashed_blocks_are_taken_under_pressure_without_their_hashes() -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources)
    keys = [block.block_hash for block in sources]
    desk.take_the_rest(leave=1)
    chosen = destinations(desk, sources, 3)
    own = [block for block in chosen if block in sources]
    assert len(own) == 2
    for block, key in zip(sources, keys, strict=True):
        assert (block.block_hash is None) == (block in own)
        assert desk.pool.cached_block_hash_to_block.contain(key, block.block_id) != (block in own)


def test_shared_blocks_are_never_written() -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources)
    desk.pool.touch(sources[:3])
    desk.take_the_rest(leave=1)
    chosen = destinations(desk, sources, 2)
    assert not set(ids(chosen)) & set(ids(sources[:3]))
    assert sources[3] in chosen


@pytest.mark.parametrize(("free", "shared"), [(0, 4), (1, 4), (0, 3)])
def test_none_when_too_few_blocks_may_be_written(free: int, shared: int) -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources)
    desk.pool.touch(sources[:shared])
    desk.take_the_rest(leave=free)
    assert destinations(desk, sources, 2) is None
    assert desk.pool.get_num_free_blocks() == free
    assert all(block.block_hash is not None for block in sources)


# -- plans --------------------------------------------------------------------------------


def test_plan_of_two_compactions() -> None:
    desk = Desk(40, FLAT)
    row = desk.request("a", prompt=18, computed=18)
    before = ids(row)
    desk.planner.compact(0, "a", row)
    # 18 tokens: 2 beside the 4 full blocks, so 1 block fits the budget of 8.
    assert desk.planner.take_plans() == [
        CompactionPlan(
            request_id="a",
            group=0,
            position=18,
            sources=before[:4],
            destinations=before[:1],
            row_start=0,
            row_ids=[0, 0, 0, before[0]],
            holes=3,
            removed=3,
            method="knorm",
            sinks=0,
            end=16,
        )
    ]
    assert ids(row) == [0, 0, 0, before[0], before[4]]
    assert desk.pool.get_num_free_blocks() == 39 - 2

    row += desk.pool.get_new_blocks(1)
    before = ids(row)
    desk.requests["a"].num_computed_tokens = 22
    desk.planner.compact(0, "a", row)
    (plan,) = desk.planner.take_plans()
    # 10 tokens live, 2 beside 2 full blocks: again 1 block stays.
    assert (plan.sources, plan.row_start, plan.holes) == (before[3:5], 3, 4)
    assert plan.row_ids == [0, *plan.destinations]
    assert ids(row) == [0, 0, 0, 0, plan.destinations[0], before[5]]
    totals = desk.planner.totals
    assert (totals.compactions, totals.requests, totals.waits) == (2, 1, 0)
    assert (totals.blocks_freed, totals.tokens_removed) == (4, 16)


def test_decode_leaves_the_prompt_alone() -> None:
    desk = Desk(40, FLAT, phase="decode")
    row = desk.request("a", prompt=6, computed=18)
    before = ids(row)
    desk.planner.compact(0, "a", row)
    (plan,) = desk.planner.take_plans()
    # 8 prompt slots stay; of the 10 tokens after them, 2 blocks become 1.
    assert plan.sources == before[2:4]
    assert plan.row_ids == [0, *before[:2], *plan.destinations]
    assert ids(row) == [*plan.row_ids, before[4]]


def test_only_at_the_trigger_and_only_once() -> None:
    desk = Desk(40, FLAT)
    row = desk.request("a", prompt=18, computed=17)
    desk.planner.compact(0, "a", row)
    assert desk.planner.stop(desk.requests["a"], 17) == 18
    desk.requests["a"].num_computed_tokens = 18
    for _ in range(3):
        desk.planner.compact(0, "a", row)
    assert desk.planner.stop(desk.requests["a"], 18) == 22
    desk.requests["a"].num_computed_tokens = 19
    desk.planner.compact(0, "a", row)
    assert len(desk.planner.take_plans()) == 1


def test_groups_compact_apart() -> None:
    desk = Desk(40, FLAT, None, WIDE)
    rows = [desk.request("a", prompt=18, computed=18) for _ in range(3)]
    for group in (2, 1, 0):
        desk.planner.compact(group, "a", rows[group])
    plans = desk.planner.take_plans()
    assert [(plan.group, plan.holes) for plan in plans] == [(2, 1), (0, 3)]
    assert not any(block.is_null for block in rows[1])


def test_hits_end_before_the_first_compaction() -> None:
    desk = Desk(40, FLAT, prune_after=25)
    desk.request("a", prompt=18, computed=0)
    assert desk.planner.hit_limit(desk.requests["a"]) == 25


def test_sessions_never_compact() -> None:
    desk = Desk(40, FLAT)
    row = desk.request("a", prompt=18, computed=18, resumable=True)
    desk.planner.compact(0, "a", row)
    assert not desk.planner.take_plans()
    assert desk.planner.stop(desk.requests["a"], 18) == NEVER


def test_unknown_requests_are_left_alone() -> None:
    desk = Desk(40, FLAT)
    desk.planner.compact(0, "gone", desk.pool.get_new_blocks(5))
    desk.planner.drop("gone")
    assert not desk.planner.take_plans()


def test_dropping_forgets_state_and_open_plans_of_one_request() -> None:
    desk = Desk(40, FLAT)
    rows = {name: desk.request(name, prompt=18, computed=18) for name in "ab"}
    for name, row in rows.items():
        desk.planner.compact(0, name, row)
    desk.planner.drop("a")
    assert [plan.request_id for plan in desk.planner.take_plans()] == ["b"]
    assert not desk.planner.started("a")
    assert desk.planner.started("b")


# -- plans that merge ---------------------------------------------------------------------


def pooling(share: Fraction | None, count: bool, sinks: int = 0) -> Limits:
    """Of 50 tokens 12 blocks become 7, of 58 again 9: see test_two_compactions_that_merge."""
    return Limits(32, None, sinks, recent=0, block_size=SIZE, merging=Merging(share, count))


def compact_twice(desk: Desk, between: Any = lambda row: None) -> tuple[list[Any], list[Any]]:
    """The plans at 50 and at 58 tokens, and all blocks that the request ever had."""
    row = desk.request("a", prompt=50, computed=50)
    blocks = list(row)
    desk.planner.compact(0, "a", row)
    between(row)
    row += desk.pool.get_new_blocks(2)
    blocks += row[-2:]
    desk.requests["a"].num_computed_tokens = 58
    desk.planner.compact(0, "a", row)
    plans = desk.planner.take_plans()
    holes = plans[1].holes
    assert len(row) == 15
    assert [block.is_null for block in row] == [True] * holes + [False] * (15 - holes)
    listings = Counter(block.block_id for block in row if not block.is_null)
    assert plans[1].row_ids == ids(row)[plans[1].row_start : 14]
    assert [b.ref_cnt for b in blocks if b.block_id in listings] == [
        listings[b.block_id] for b in blocks if b.block_id in listings
    ]
    return plans, blocks


@pytest.mark.parametrize("count", [True, False])
def test_plans_that_merge_all_but_the_sinks(count: bool) -> None:
    desk = Desk(40, pooling(None, count, sinks=4), interval=8)

    def share(row: list[Any]) -> None:
        """Another request uses the tenth block, and the first merged one is only ours."""
        nonlocal between
        between = ids(row)
        desk.cache([row[-4]])
        desk.pool.touch([row[-4]])

    between: list[int] = []
    (first, second), blocks = compact_twice(desk, share)
    b = ids(blocks)
    # Blocks 1 to 8 become one of level 2 and two of level 1; 0 is a sink, 9 to 11 stay.
    merged = [b[1]] * 4 + [b[2]] * 2 + [b[3]] * 2 if count else b[1:4]
    assert first == CompactionPlan(
        request_id="a",
        group=0,
        position=50,
        sources=b[1:9],
        destinations=b[1:4],
        row_start=0,
        row_ids=[0] * (0 if count else 5) + [b[0], *merged, *b[9:12]],
        holes=0 if count else 5,
        removed=5,
        method="knorm",
        sinks=4,
        pooled=8,
        # As in the trajectory, but for what is made: 8 blocks are given, not 11.
        rounds=[Round(0, [0, 2, 4, 6], [1, 3, 5, 7]), Round(1, [8], [9])],
        outputs=[12, 10, 11],
        exact=first.exact,
        end=48,
    )
    assert between == [*first.row_ids, b[12]]
    # The two of level 1 become one of level 2, and 9 and 10 one of level 1. The pooled ones
    # are ours however often we list them; 9 is also another's.
    merged = [b[1]] * 4 + [b[2]] * 4 + [b[3]] * 2 if count else b[1:4]
    assert second == CompactionPlan(
        request_id="a",
        group=0,
        position=58,
        sources=[b[2], b[3], b[9], b[10]],
        destinations=[b[2], b[3]],
        row_start=0 if count else 5,
        row_ids=[0] * (0 if count else 2) + [b[0], *merged, b[11], b[12], b[13]],
        holes=0 if count else 7,
        removed=2,
        method="knorm",
        sinks=4,
        pooled=4,
        rounds=[Round(0, [2], [3]), Round(1, [0], [1])],
        outputs=[5, 4],
        exact=second.exact,
        end=56,
    )
    assert (blocks[9].ref_cnt, blocks[10].ref_cnt) == (1, 0)
    assert blocks[9].block_hash is not None
    # 39 blocks but for 8 of the request's and the one that another still uses.
    assert desk.pool.get_num_free_blocks() == 39 - 8 - 1


@pytest.mark.parametrize("count", [True, False])
def test_plans_that_merge_what_ranking_leaves_over(count: bool) -> None:
    desk = Desk(40, pooling(Fraction(1, 4), count), interval=8)
    (first, second), blocks = compact_twice(desk)
    b = ids(blocks)
    merged = [b[0]] * 4 + [b[1]] * 2 + [b[2]] * 2 + [b[3]] if count else b[:4]
    assert first == CompactionPlan(
        request_id="a",
        group=0,
        position=50,
        sources=b[:12],
        destinations=b[:7],
        row_start=0,
        row_ids=[0] * (0 if count else 5) + merged + b[4:7],
        holes=0 if count else 5,
        removed=5,
        method="knorm",
        sinks=0,
        pooled=0,
        rounds=[Round(0, [0, 2, 4, 6], [1, 3, 5, 7]), Round(1, [9], [10])],
        outputs=[13, 11, 12, 8],
        exact=12,
        end=48,
    )
    # The block of level 2 is left alone; the other three pooled ones are read, and with
    # them five ranked ones, of which three stay.
    merged = [b[0]] * 4 + [b[1]] * 4 + [b[2]] * 2 + [b[3]] if count else b[:4]
    assert second == CompactionPlan(
        request_id="a",
        group=0,
        position=58,
        sources=[*b[1:7], b[12], b[13]],
        destinations=b[1:7],
        row_start=0 if count else 5,
        row_ids=[0] * (0 if count else 2) + merged + b[4:7],
        holes=0 if count else 7,
        removed=2,
        method="knorm",
        sinks=0,
        pooled=3,
        rounds=[Round(0, [2], [3]), Round(1, [0], [1])],
        outputs=[6, 5, 4],
        exact=2,
        end=56,
    )
    assert desk.pool.get_num_free_blocks() == 39 - 8


def test_pooled_blocks_move_when_their_own_room_is_shared() -> None:
    """All sources of a merge are another's too: fresh blocks get all the references."""
    desk = Desk(40, pooling(None, count=True), interval=8)
    row = desk.request("a", prompt=50, computed=50)
    blocks = list(row)
    desk.cache(row)
    desk.pool.touch(row)
    desk.planner.compact(0, "a", row)
    (plan,) = desk.planner.take_plans()
    assert not set(plan.destinations) & set(ids(blocks))
    assert [desk.pool.blocks[block].ref_cnt for block in plan.destinations] == [
        plan.row_ids.count(block) for block in plan.destinations
    ]
    # What was merged is only the other's now, what was left alone is both's.
    assert [b.ref_cnt for b in blocks] == [2 if b in row else 1 for b in blocks]
    assert len(plan.sources) == sum(b not in row for b in blocks) > 0


# -- blocks that others will take ---------------------------------------------------------


def promised(desk: Desk, besides: str = "none", **rows: list[Any]) -> int:
    return desk.planner.promised(besides, rows)


def test_promised_after_prefill_is_what_leads_to_the_next_compaction() -> None:
    desk = Desk(40, FLAT, None)
    rows = [desk.request("a", prompt=18, computed=18) for _ in range(2)]
    desk.planner.state(desk.requests["a"])
    assert promised(desk, a=rows[0]) == 0
    desk.planner.compact(0, "a", rows[0])
    # 22 tokens are due next: 6 blocks, of which the row has 5, in each of both groups.
    assert promised(desk, a=rows[0]) == 2
    assert promised(desk, a=rows[0], besides="a") == 0
    assert promised(desk, b=rows[0]) == promised(desk, a=[]) == 0
    row = [*rows[0], *desk.pool.get_new_blocks(1)]
    assert promised(desk, a=row) == 0
    # It ends before that.
    desk.requests["a"].max_tokens = 2
    assert promised(desk, a=rows[0]) == 0


def test_prompts_under_way_are_promised_nothing_after_prefill() -> None:
    desk = Desk(40, FLAT)
    row = desk.request("a", prompt=30, computed=8)
    desk.planner.state(desk.requests["a"])
    assert promised(desk, a=row) == 0


def test_promised_during_prefill_is_what_leads_to_the_peak() -> None:
    desk = Desk(40, FLAT, None, phase="during_prefill")
    row = desk.request("a", prompt=30, computed=8)
    desk.planner.state(desk.requests["a"])
    # 12 tokens, 3 blocks, are held at the most; all 30, 8 blocks, where nothing compacts.
    assert promised(desk, a=row) == (3 - 2) + (8 - 2)
    assert promised(desk, a=row, besides="a") == 0
    row += desk.pool.get_new_blocks(1)
    assert promised(desk, a=row) == 8 - 3
    desk.requests["a"].num_computed_tokens = 12
    desk.planner.compact(0, "a", row)
    assert ids(row)[0] == 0
    assert promised(desk, a=row) == (3 - 2) + (8 - 3)

    # A request past its prompt counts as after prefill: 14 tokens, 4 blocks, are due next.
    other = desk.request("b", prompt=10, computed=10)
    desk.planner.compact(0, "b", other)
    assert promised(desk, b=other) == 2 * (4 - 3)
    assert promised(desk, a=row, b=other) == 6 + 2
    assert promised(desk, "b", a=row, b=other) == 6
    desk.requests["b"].max_tokens = 1
    assert promised(desk, b=other) == 0


def test_promised_counts_listed_blocks_once() -> None:
    limits = pooling(None, count=True, sinks=4)
    desk = Desk(40, limits, phase="during_prefill", interval=10, prune_after=50)
    row = desk.request("a", prompt=100, computed=50)
    desk.planner.compact(0, "a", row)
    # 50 tokens, 13 blocks, are the peak; the row lists 8 blocks in 13 entries.
    assert (len(row), len(set(ids(row)))) == (13, 8)
    assert promised(desk, a=row) == 13 - 8


# -- waiting ------------------------------------------------------------------------------


def test_blocked_compaction_waits_until_blocks_are_freed() -> None:
    scheduler = build_scheduler(EngineOptions((FLAT, WIDE), num_blocks=30))
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool, planner = scheduler.kv_cache_manager.block_pool, scheduler.kvcompress
    for name in ("0", "1"):
        request = make_request(EngineOptions((FLAT,)), name, [1] * 20, 8)
        request.num_computed_tokens = 20
        scheduler.requests[name] = request
    for manager in managers:  # Both requests hold the same 5 blocks in each group.
        manager.req_to_blocks["0"] = pool.get_new_blocks(5)
        manager.req_to_blocks["1"] = list(manager.req_to_blocks["0"])
        pool.touch(manager.req_to_blocks["1"])
        manager.num_cached_block |= {"0": 5, "1": 5}
    others = pool.get_new_blocks(pool.get_num_free_blocks() - 2)

    coordinator = scheduler.kv_cache_manager.coordinator

    def needed() -> int:
        return coordinator.get_num_blocks_to_allocate("0", 21, ([], []), 0, 20, 20, 21)

    # Group 0 finds its two blocks; group 1 wants four and gets none.
    for group in (0, 1, 1):
        managers[group].remove_skipped_blocks("0", 0)
    assert [len(plan.destinations) for plan in planner._plans] == [2]
    assert planner.totals.waits == 2
    assert needed() > pool.num_gpu_blocks - 1
    assert scheduler.kv_cache_manager.allocate_slots(scheduler.requests["0"], 1) is None

    # The other request is preempted: its blocks are now written in place.
    scheduler.kv_cache_manager.free(scheduler.requests["1"])
    coordinator.remove_skipped_blocks("0", 0)
    assert needed() == 2
    assert scheduler.kv_cache_manager.allocate_slots(scheduler.requests["0"], 1) is not None
    assert [(plan.group, plan.holes) for plan in planner.take_plans()] == [(0, 3), (1, 1)]
    assert [len(manager.req_to_blocks["0"]) for manager in managers] == [6, 6]
    scheduler.kv_cache_manager.free(scheduler.requests["0"])
    pool.free_blocks(others)
    assert pool.get_num_free_blocks() == 29


def test_plans_travel_with_the_step_that_needs_them() -> None:
    options = EngineOptions((FLAT,), num_blocks=30, tokens_per_step=32)
    scheduler = build_scheduler(options)
    scheduler.add_request(make_request(options, "0", [1] * 20, 8))
    first = scheduler.schedule()
    assert first.num_scheduled_tokens == {"0": 20}
    assert not hasattr(first, PLANS_ATTRIBUTE)
    scheduler.requests["0"].append_output_token_ids(1)
    second = scheduler.schedule()
    assert [plan.position for plan in getattr(second, PLANS_ATTRIBUTE)] == [20]
