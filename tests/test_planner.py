"""The planner's choices of blocks, and compactions that have to wait for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_stub import EngineOptions, build_scheduler, make_request
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from vllm_kvcompress.bands import Limits
from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE, CompactionPlan
from vllm_kvcompress.scheduler.planner import Planner
from vllm_kvcompress.scheduler.trajectory import NEVER, Schedule

SIZE = 4
FLAT = Limits(budget=8, ratio=None, sinks=0, recent=0, block_size=SIZE)
WIDE = Limits(budget=16, ratio=None, sinks=0, recent=0, block_size=SIZE)


class Desk:
    """A planner with a pool of its own and requests that are mere numbers."""

    def __init__(self, blocks: int, *limits: Limits | None, **schedule: Any) -> None:
        self.pool = BlockPool(blocks, enable_caching=True, hash_block_size=SIZE)
        self.requests: dict[str, Any] = {}
        settings = {"phase": "after_prefill", "interval": 4, "prune_after": 0}
        self.planner = Planner(
            Schedule(**(settings | schedule), limits=limits, block_size=SIZE, max_position=1000),
            self.requests,
            self.pool,
        )

    def request(self, name: str, prompt: int, computed: int, resumable: bool = False) -> list[Any]:
        """Add a request and return its row of new blocks."""
        self.requests[name] = SimpleNamespace(
            request_id=name,
            num_prompt_tokens=prompt,
            num_computed_tokens=computed,
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


# -- where compact blocks go --------------------------------------------------------------


def test_own_blocks_without_hash_come_first() -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources[:2])
    assert desk.planner._destinations(sources, 2) == sources[2:]
    assert desk.pool.get_num_free_blocks() == 15


def test_fresh_blocks_spare_hashed_ones() -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources)
    chosen = desk.planner._destinations(sources, 3)
    assert not set(ids(chosen)) & set(ids(sources))
    assert all(block.block_hash is not None for block in sources)
    assert all(block.ref_cnt == 1 for block in chosen)


def test_hashed_blocks_are_taken_under_pressure_without_their_hashes() -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources)
    keys = [block.block_hash for block in sources]
    desk.take_the_rest(leave=1)
    chosen = desk.planner._destinations(sources, 3)
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
    chosen = desk.planner._destinations(sources, 2)
    assert not set(ids(chosen)) & set(ids(sources[:3]))
    assert sources[3] in chosen


@pytest.mark.parametrize(("free", "shared"), [(0, 4), (1, 4), (0, 3)])
def test_none_when_too_few_blocks_may_be_written(free: int, shared: int) -> None:
    desk = Desk(20)
    sources = desk.pool.get_new_blocks(4)
    desk.cache(sources)
    desk.pool.touch(sources[:shared])
    desk.take_the_rest(leave=free)
    assert desk.planner._destinations(sources, 2) is None
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

    def needed(group: int) -> int:
        return managers[group].get_num_blocks_to_allocate("0", 21, [], 20, 20, 21)

    # Group 0 finds its two blocks; group 1 wants four and gets none.
    for group in (0, 1, 1):
        managers[group].remove_skipped_blocks("0", 0)
    assert [len(plan.destinations) for plan in planner._plans] == [2]
    assert planner.totals.waits == 2
    assert needed(0) == 1
    assert needed(1) > pool.num_gpu_blocks - 1
    assert scheduler.kv_cache_manager.allocate_slots(scheduler.requests["0"], 1) is None

    # The other request is preempted: its blocks are now written in place.
    scheduler.kv_cache_manager.free(scheduler.requests["1"])
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
