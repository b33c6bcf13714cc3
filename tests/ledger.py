"""What must hold in an engine after every step, and the rule for compactions written anew.

Nothing here uses :mod:`vllm_kvcompress.scheduler.trajectory`: the rule is written from the
design, position by position.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

from engine_stub import (
    BookkeepingWorker,
    EngineOptions,
    PlanRecord,
    Texts,
    block_rows,
    build_scheduler,
)
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE


def is_grid(options: EngineOptions, prompt: int, position: int) -> bool:
    """Whether ``position`` is a place where compactions may happen."""
    beyond = position - prompt
    if options.phase == "decode":
        return beyond >= options.interval and beyond % options.interval == 0
    if beyond >= 0:
        return beyond % options.interval == 0
    return options.phase == "during_prefill" and position % options.interval == 0


def expected_plans(options: EngineOptions, prompt: int, length: int) -> list[PlanRecord]:
    """All compactions of a request on its way to ``length`` tokens, by the design's rule."""
    size = options.block_size
    base = ceil(prompt / size) if options.phase == "decode" else 0
    removed = [0] * len(options.limits)
    plans = []
    for position in range(1, length):
        if position < options.prune_after or not is_grid(options, prompt, position):
            continue
        for group, limits in enumerate(options.limits):
            if limits is None:
                continue
            live = position - removed[group] - base * size
            old = max(0, live - limits.recent) // size
            rest = live - old * size
            if limits.budget is None:
                kept = ceil((ceil(limits.ratio * position) - rest) / size)
            elif live > limits.budget:
                kept = (limits.budget - rest) // size
            else:
                continue
            kept = max(kept, ceil(limits.sinks / size), 1)
            if kept < old:
                plans.append((position, group, old, kept))
                removed[group] += (old - kept) * size
    return plans


def _checked(method: Callable[..., None]) -> Callable[..., None]:
    """Remember that a check failed, so that no later failure hides it."""

    @functools.wraps(method)
    def wrapper(self: Ledger, *args: Any) -> None:
        try:
            method(self, *args)
        except Exception:
            self.broken = True
            raise

    return wrapper


class Ledger:
    """An engine with a bookkeeping worker, checked after every step.

    Attributes
    ----------
    seen : Counter
        How often things happened that a campaign of tests must not miss.
    broken : bool
        Whether a check failed.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.seen: Counter[str] = Counter()
        self.broken = False
        self.scheduler = build_scheduler(options)
        self.planner = self.scheduler.kvcompress
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.texts = Texts()
        self.worker = BookkeepingWorker(options, self.texts)
        self.requests: dict[str, Request] = {}
        self.histories: dict[str, list[PlanRecord]] = {}
        self._bounds: dict[str, list[int]] = {}
        self._expected: dict[str, list[PlanRecord]] = {}
        self._hash_contents: dict[bytes, list[int]] = {}
        self._unregistered: dict[str, Request] = {}
        self._registered: Counter[str] = Counter()
        self._hashed_at_first_plan: dict[str, set[int]] = {}
        self._flight: list[tuple[SchedulerOutput, Any]] = []
        self._watch_planning()
        self._watch_clipping()

    # -- driving ----------------------------------------------------------------------

    def add(self, request: Request, bounds: list[int]) -> None:
        """Add a request; ``bounds`` are the blocks it may hold at the most, per group."""
        self.requests[request.request_id] = request
        self._unregistered[request.request_id] = request
        self._bounds[request.request_id] = bounds
        prompt_blocks = -(-request.num_prompt_tokens // self.options.block_size)
        self.seen["larger than the pool"] += prompt_blocks * len(bounds) >= self.pool.num_gpu_blocks
        length = request.num_prompt_tokens + request.max_tokens
        self._expected[request.request_id] = expected_plans(
            self.options, request.num_prompt_tokens, length
        )
        self.scheduler.add_request(request)

    @_checked
    def step(self, lag: int = 0) -> None:
        """Schedule and execute a step, then deliver all outputs but the last ``lag``."""
        totals = self.planner.totals
        waits, planned = totals.waits, totals.compactions
        output = self.scheduler.schedule()
        self.seen["steps"] += 1
        self.seen["preemptions"] += len(output.preempted_req_ids)
        self.seen["waits"] += totals.waits - waits
        sent = len(getattr(output, PLANS_ATTRIBUTE, ()))
        self.seen["dropped plans"] += totals.compactions - planned - sent
        self._check_due(output)
        self._flight.append((output, self.worker.execute(output, self.requests)))
        self.check()
        self._check_hashed_contents()
        self._check_tables()
        while len(self._flight) > lag:
            self.deliver()

    @_checked
    def deliver(self) -> None:
        """Hand the oldest undelivered output to the scheduler."""
        if not self._flight:
            return
        self.scheduler.update_from_output(*self._flight.pop(0))
        self.check()

    @_checked
    def abort(self, name: str) -> None:
        """End a request from outside, whatever it is doing."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.seen["aborts"] += 1
        self.check()

    @_checked
    def reset(self) -> None:
        """Preempt every request and empty the prefix cache."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.seen["resets"] += 1
        self.check()

    @_checked
    def drain(self) -> None:
        """Run until every request is finished; a livelock fails."""
        for _ in range(4000):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        else:
            raise AssertionError("the engine does not finish its requests")
        while self._flight:
            self.deliver()
        self.step()
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not self.worker.requests
        assert not self.planner._states
        assert not self.planner._plans

    # -- checks -----------------------------------------------------------------------

    def check(self) -> None:
        """Blocks, references and hashes of the pool and of every request."""
        rows = block_rows(self.scheduler)
        self._check_references(rows)
        for name in [name for name in self._hashed_at_first_plan if not any(rows.get(name, ()))]:
            del self._hashed_at_first_plan[name]
        for name, groups in rows.items():
            self._check_rows(name, groups)
        self._register_hashes()

    def _check_references(self, rows: dict[str, list[list[Any]]]) -> None:
        pool = self.pool
        held = Counter(
            block.block_id
            for groups in rows.values()
            for row in groups
            for block in row
            if not block.is_null
        )
        free = pool.free_block_queue.get_all_free_blocks()
        assert len(free) == pool.get_num_free_blocks() == len({b.block_id for b in free})
        assert len(free) + len(held) + 1 == pool.num_gpu_blocks, "a block leaked"
        for block in free:
            assert block.block_id not in held, "a free block is in use"
        for block in pool.blocks[1:]:
            count = held[block.block_id]
            assert block.ref_cnt == count, f"block {block.block_id}: wrong reference count"
            if count > 1:
                assert block.block_hash is not None, "a block without hash is shared"

    def _check_rows(self, name: str, groups: list[list[Any]]) -> None:
        request = self.requests[name]
        own = [block.block_id for row in groups for block in row if not block.is_null]
        assert len(own) == len(set(own)), "a request holds a block twice"
        if not own:
            return
        length = -(-request.num_computed_tokens // self.options.block_size)
        for group, row in enumerate(groups):
            assert len(row) == length, "a block list lost its logical length"
            held = sum(not block.is_null for block in row)
            assert held <= self._bounds[name][group], "a request holds more than its bound"
        if name in self._hashed_at_first_plan:
            hashed = {b for b in own if self.pool.blocks[b].block_hash is not None}
            new = hashed - self._hashed_at_first_plan[name]
            assert not new, "a block got a hash after the first compaction"

    def _register_hashes(self) -> None:
        """Note which prefixes the hashes of vLLM stand for."""
        size = self.options.block_size
        for name, request in list(self._unregistered.items()):
            if request.is_finished():
                del self._unregistered[name]
            known = self._registered[name]
            if known == len(request.block_hashes):
                continue
            nodes: list[int] = []
            self.texts.extend(nodes, request.all_token_ids)
            for index in range(known, len(request.block_hashes)):
                part = nodes[index * size : (index + 1) * size]
                self._hash_contents[request.block_hashes[index]] = part
            self._registered[name] = len(request.block_hashes)

    def _check_hashed_contents(self) -> None:
        """Every block of the prefix cache holds the exact tokens that its hash stands for."""
        for block in self.pool.blocks[1:]:
            if (key := block.block_hash) is None:
                continue
            assert self.pool.cached_block_hash_to_block.contain(key, block.block_id)
            group = get_group_id(key)
            nodes = self._hash_contents[get_block_hash(key)]
            assert self.worker.pages[block.block_id] == [
                self.worker.exact(node, group) for node in nodes
            ], f"hashed block {block.block_id} holds something else"

    def _check_tables(self) -> None:
        """The worker's block tables are the managers' block lists."""
        rows = block_rows(self.scheduler)
        for request in self.scheduler.running:
            name = request.request_id
            mine = self.worker.requests[name]
            theirs = [[block.block_id for block in row] for row in rows[name]]
            assert mine.rows == theirs, "the worker's block table differs"
            for row, holes in zip(theirs, mine.holes, strict=True):
                assert row[:holes] == [0] * holes
                assert 0 not in row[holes:]

    def _check_due(self, output: SchedulerOutput) -> None:
        """Every compaction due in this step is sent, once, and no other."""
        sent: dict[str, list[PlanRecord]] = {name: [] for name in output.num_scheduled_tokens}
        for plan in getattr(output, PLANS_ATTRIBUTE, ()):
            assert plan.request_id in sent, "a plan for a request that does not run"
            record = (plan.position, plan.group, len(plan.sources), len(plan.destinations))
            sent[plan.request_id].append(record)
            self.seen["plans"] += 1
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        begun = {new.req_id for new in output.scheduled_new_reqs} | cached.resumed_req_ids
        for name, plans in sent.items():
            start, count = starts[name], output.num_scheduled_tokens[name]
            request = self.requests[name]
            if name in begun:
                self.histories[name] = []
                first = next((p[0] for p in self._expected[name]), start + 1)
                assert start < first, "a hit reaches past a compaction"
                self.seen["hits"] += start > 0
                self.seen["replays"] += request.num_preemptions > 0
            done = self.histories[name]
            every = [p for p in self._expected[name] if p[0] < start + count]
            assert [p for p in every if p[0] < start] == done, "a compaction was skipped"
            due = [p for p in every if p[0] == start]
            plans.sort()  # A group that had to wait for blocks comes after the others.
            assert plans == due, f"due {due}, sent {plans}"
            assert len(every) == len(done) + len(due), "a chunk runs past a due compaction"
            done += plans

    # -- the moment of planning -------------------------------------------------------

    def _watch_planning(self) -> None:
        planner, pool = self.planner, self.pool
        original = planner.compact

        def compact(group: int, name: str, row: list[Any]) -> None:
            count = planner.totals.compactions
            before = {b.block_id: (b.ref_cnt, b.block_hash) for b in pool.blocks}
            free = pool.get_num_free_blocks()
            hashed = {
                block.block_id
                for groups in block_rows(self.scheduler).get(name, ())
                for block in groups
                if block.block_hash is not None
            }
            original(group, name, row)
            if planner.totals.compactions == count:
                self._check_wait(group, name, row)
                return
            self._hashed_at_first_plan.setdefault(name, hashed)
            plan = planner._plans[-1]
            unshared = [b for b in plan.sources if before[b][0] == 1]
            for block_id in plan.destinations:
                references = before[block_id][0]
                own = block_id in plan.sources
                assert references == own, "a plan writes a block that others use"
                block = pool.blocks[block_id]
                assert block.ref_cnt == 1
                assert block.block_hash is None, "a plan writes a hashed block"
                self.seen["in place"] += own
                self.seen["in place once hashed"] += own and before[block_id][1] is not None
                self.seen["into fresh blocks"] += not own
            gained = pool.get_num_free_blocks() - free
            assert gained == len(unshared) - len(plan.destinations), "a plan frees too few blocks"
            self.seen["shared sources"] += len(unshared) < len(plan.sources)

        planner.compact = compact

    def _check_wait(self, group: int, name: str, row: list[Any]) -> None:
        """A due compaction was not planned: it was before, or there are too few blocks."""
        mine = self.worker.requests[name]
        holes = mine.holes[group]
        if any(block.is_null for block in row[holes:]):
            return
        for position, its_group, old, kept in self._expected[name]:
            if (position, its_group) == (mine.computed, group):
                prompt = self.requests[name].num_prompt_tokens
                base = -(-prompt // self.options.block_size)
                first = holes + (base if self.options.phase == "decode" else 0)
                sources = row[first : first + old]
                unshared = sum(block.ref_cnt == 1 for block in sources)
                free = self.pool.get_num_free_blocks()
                assert unshared + free < kept, "a compaction waits for no reason"

    def _watch_clipping(self) -> None:
        manager = self.scheduler.kv_cache_manager
        original = manager.truncate_computed_blocks

        def truncate(*args: Any) -> Any:
            self.seen["clipped hits"] += 1
            return original(*args)

        manager.truncate_computed_blocks = truncate
