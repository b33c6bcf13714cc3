"""All KV cache groups of a request at once: the same as one after the other, and seldom asked."""

from __future__ import annotations

from typing import Any

import pytest
from engine_stub import EngineOptions, block_rows, build_scheduler, make_request
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.outputs import ModelRunnerOutput

from vllm_kvcompress.limits import Limits
from vllm_kvcompress.scheduler.coordinator import CompressedCoordinator
from vllm_kvcompress.scheduler.manager import CompressedAttentionManager
from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE
from vllm_kvcompress.scheduler.scheduler import KVCompressSchedulerMixin

SIZE = 4
LIMITS = tuple(
    None if budget is None else Limits(budget, None, sinks=0, recent=0, block_size=SIZE)
    for budget in (16, 24, None, 24)
)
SHORTCUTS = (
    "remove_skipped_blocks",
    "get_num_blocks_to_allocate",
    "allocate_new_blocks",
    "cache_blocks",
)


def make_scheduler(**options: Any) -> KVCompressSchedulerMixin:
    """A scheduler with a request of 14 tokens and one of 11, both to compact at 30 and 27."""
    engine = EngineOptions(LIMITS, num_blocks=200, prune_after=20, **options)
    scheduler = build_scheduler(engine)
    scheduler.add_request(make_request(engine, "0", [1] * 14, 60))
    scheduler.add_request(make_request(engine, "1", [1] * 11, 60))
    return scheduler


def step(scheduler: KVCompressSchedulerMixin) -> Any:
    """A step in which every request gets the same token."""
    output = scheduler.schedule()
    names = list(output.num_scheduled_tokens)
    answer = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[1] for _ in names],
    )
    scheduler.update_from_output(output, answer)
    return output


def state(scheduler: KVCompressSchedulerMixin) -> Any:
    """Rows, references and hashes of all groups."""
    pool = scheduler.kv_cache_manager.block_pool
    rows = {
        name: [[block.block_id for block in row] for row in groups]
        for name, groups in block_rows(scheduler).items()
    }
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    blocks = [(block.ref_cnt, block.block_hash) for block in pool.blocks]
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    new = [block for manager in managers for block in manager.take_new_block_ids()]
    return rows, free, blocks, [dict(m.num_cached_block) for m in managers], sorted(new)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("zeroing", [True, False])
def test_the_same_as_one_group_after_the_other(
    caching: bool, zeroing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step against vLLM's coordinator, with our hashes and admission taken out of it."""
    ours = make_scheduler(caching=caching, zeroing=zeroing)
    theirs = make_scheduler(caching=caching, zeroing=zeroing)
    planner, cache = theirs.kvcompress, KVCacheCoordinator.cache_blocks

    def cache_exact(own: Any, request: Any, tokens: int) -> None:
        if not planner.started(request.request_id):
            cache(own, request, tokens)

    for _ in range(50):
        planned = step(ours)
        with monkeypatch.context() as patch:
            for name in SHORTCUTS:
                patch.setattr(CompressedCoordinator, name, getattr(KVCacheCoordinator, name))
            patch.setattr(CompressedCoordinator, "cache_blocks", cache_exact)
            other = step(theirs)
        assert getattr(planned, PLANS_ATTRIBUTE, []) == getattr(other, PLANS_ATTRIBUTE, [])
        assert planned.scheduled_cached_reqs == other.scheduled_cached_reqs
        assert state(ours) == state(theirs)
    assert planner.totals.compactions > 6


def test_most_steps_ask_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler()
    asked: list[str] = []
    for name in ("remove_skipped_blocks", "get_num_blocks_to_allocate", "allocate_new_blocks"):
        original = getattr(CompressedAttentionManager, name)

        def count(*args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
            asked.append(name)
            return original(*args, **kw)

        monkeypatch.setattr(CompressedAttentionManager, name, count)
    step(scheduler)
    assert set(asked) == {"get_num_blocks_to_allocate"}, "admission looks at every group"
    asked.clear()
    while scheduler.kvcompress.totals.compactions == 0:
        assert not asked
        step(scheduler)
    assert asked == ["remove_skipped_blocks"] * len(LIMITS)
