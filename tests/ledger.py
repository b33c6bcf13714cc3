"""What must hold in an engine after every step.

Nothing here uses :mod:`vllm_kvcompress.scheduler.trajectory`: which compactions are due, and
what they do, comes from :mod:`compaction_rule`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from account_book import AccountBook
from compaction_rule import Compaction, PlanRecord, expected_plans
from engine_stub import (
    BookkeepingWorker,
    EngineOptions,
    Texts,
    Wishes,
    WorkerRequest,
    block_rows,
    build_scheduler,
)
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.limits import Merging
from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE


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


def kind_of_merging(merging: Merging | None) -> str:
    """What the compressed groups of an engine do, in words."""
    if merging is None:
        return "evict"
    method = "merge" if merging.share is None else "knorm+merge"
    return f"{method}, {'count' if merging.count else 'none'}"


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
        self.book = AccountBook(self.scheduler, options.priority)
        self.texts = Texts()
        self.wishes: dict[str, Wishes] = {}
        self.worker = BookkeepingWorker(options, self.texts, self.wishes)
        self.planner.trajectory_of = lambda request: self.wishes[request.request_id].trajectory(
            request.num_prompt_tokens
        )
        self.requests: dict[str, Request] = {}
        self.histories: dict[str, list[Compaction]] = {}
        merging = next(limits.merging for limits in options.limits if limits is not None)
        self._kind = kind_of_merging(merging)
        self._bounds: dict[str, list[int]] = {}
        self._expected: dict[str, list[Compaction]] = {}
        self._hash_contents: dict[bytes, list[list[int]]] = {}
        self._unregistered: dict[str, Request] = {}
        self._registered: Counter[str] = Counter()
        self._hashed_at_first_plan: dict[str, set[int]] = {}
        self._flight: list[tuple[SchedulerOutput, Any]] = []
        self._watch_planning()
        self._watch_clipping()

    # -- driving ----------------------------------------------------------------------

    def add(self, request: Request, bounds: list[int], wishes: Wishes) -> None:
        """Add a request; ``bounds`` are the blocks it may hold at the most, per group."""
        self.wishes[request.request_id] = wishes
        self.requests[request.request_id] = request
        self._unregistered[request.request_id] = request
        self._bounds[request.request_id] = bounds
        prompt_blocks = -(-request.num_prompt_tokens // self.options.block_size)
        self.seen["larger than the pool"] += prompt_blocks * len(bounds) >= self.pool.num_gpu_blocks
        length = request.num_prompt_tokens + request.max_tokens
        self._expected[request.request_id] = expected_plans(
            wishes.options, request.num_prompt_tokens, length, wishes.context
        )
        self.scheduler.add_request(request)

    @_checked
    def step(self, lag: int = 0) -> None:
        """Schedule and execute a step, then deliver all outputs but the last ``lag``."""
        totals = self.planner.totals
        waits, planned = totals.waits, totals.compactions
        output = self.scheduler.schedule()
        self.seen["steps"] += 1
        self._see("preemptions", len(output.preempted_req_ids))
        self._see("waits", totals.waits - waits)
        sent = len(getattr(output, PLANS_ATTRIBUTE, ()))
        self._see("dropped plans", totals.compactions - planned - sent)
        self._check_due(output)
        self._flight.append((output, self.worker.execute(output, self.requests)))
        self.check()
        self._check_done()
        self._check_hashed_contents()
        self._check_tables()
        while len(self._flight) > lag:
            self.deliver()

    @_checked
    def deliver(self) -> None:
        """Hand the oldest undelivered output to the scheduler."""
        if not self._flight:
            return
        known = len(self.scheduler.requests)
        self.scheduler.update_from_output(*self._flight.pop(0))
        if len(self.scheduler.requests) < known:  # Else only tokens were added.
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
        assert not self.scheduler.kvcompress_accounts.live
        assert self.book.closings == len(self.requests)
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
        self.book.check({name: r for name, r in rows.items() if any(r)}, self.requests)
        self._register_hashes()

    def _check_references(self, rows: dict[str, list[list[Any]]]) -> None:
        pool = self.pool
        listings: Counter[int] = Counter()
        holders: Counter[int] = Counter()
        for groups in rows.values():
            own = [block.block_id for row in groups for block in row]
            listings.update(own)
            holders.update(set(own))
        null = pool.null_block.block_id
        del listings[null]
        free = pool.free_block_queue.get_all_free_blocks()
        assert len(free) == pool.get_num_free_blocks() == len({b.block_id for b in free})
        assert len(free) + len(listings) + 1 == pool.num_gpu_blocks, "a block leaked"
        for block in free:
            assert block.block_id not in listings, "a free block is in use"
        for block in pool.blocks[1:]:
            count = listings[block.block_id]
            assert block.ref_cnt == count, f"block {block.block_id}: wrong reference count"
            if count > 1 and holders[block.block_id] > 1:
                assert block.block_hash is not None, "a block without hash is shared"

    def _check_rows(self, name: str, groups: list[list[Any]]) -> None:
        request = self.requests[name]
        if not any(groups):
            return
        mine = self.worker.requests[name]
        length = -(-request.num_computed_tokens // self.options.block_size)
        own: list[int] = []
        for group, row in enumerate(groups):
            assert len(row) == length, "a block list lost its logical length"
            ids = [block.block_id for block in row]
            held = self._held(ids, mine, group)
            assert len(held) <= self._bounds[name][group], "a request holds more than its bound"
            own += held
        assert len(own) == len(set(own)), "a request holds a block twice"
        assert self.pool.null_block.block_id not in own, "a row has holes in its middle"
        if name in self._hashed_at_first_plan:
            hashed = {b for b in own if self.pool.blocks[b].block_hash is not None}
            new = hashed - self._hashed_at_first_plan[name]
            assert not new, "a block got a hash after the first compaction"

    def _held(self, row: list[int], mine: WorkerRequest, group: int) -> list[int]:
        """The blocks in a row, each once; checks that it lists pooled ones often enough."""
        if not mine.listed(group):
            holes = mine.holes[group]
            assert row[:holes] == [self.pool.null_block.block_id] * holes
            return row[holes:]
        parts = [(mine.base, mine.levels(group))]
        if mine.passed:
            parts.insert(0, (0, mine.context_levels[group]))
        held, place = [], 0
        for start, levels in parts:
            held += row[place:start]
            place = start
            for level in levels:
                times = 1 << level
                run = row[place : place + times]
                assert run == run[:1] * times, "a pooled block is not listed for all it stands for"
                held += run[:1]
                place += times
        return held + row[place:]

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
                self._hash_contents[request.block_hashes[index]] = [
                    [self.worker.exact(node, group) for node in part]
                    for group in range(len(self.options.limits))
                ]
            self._registered[name] = len(request.block_hashes)

    def _check_hashed_contents(self) -> None:
        """Every block of the prefix cache holds the exact tokens that its hash stands for."""
        for block in self.pool.blocks[1:]:
            if (key := block.block_hash) is None:
                continue
            assert self.pool.cached_block_hash_to_block.contain(key, block.block_id)
            group = get_group_id(key)
            contents = self._hash_contents[get_block_hash(key)][group]
            assert self.worker.pages[block.block_id] == contents, (
                f"hashed block {block.block_id} holds something else"
            )

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
            sent[plan.request_id].append(
                (
                    plan.position,
                    plan.group,
                    len(plan.sources),
                    len(plan.destinations),
                    plan.removed,
                )
            )
            self._see("plans")
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        begun = {new.req_id for new in output.scheduled_new_reqs} | cached.resumed_req_ids
        for name, plans in sent.items():
            start, count = starts[name], output.num_scheduled_tokens[name]
            request = self.requests[name]
            if name in begun:
                self.histories[name] = []
                first = next((p.position for p in self._expected[name]), start + 1)
                assert start < first, "a hit reaches past a compaction"
                assert start <= (self.wishes[name].context or start), "a hit reaches past N"
                self.seen["hits"] += start > 0
                self._see("replays", request.num_preemptions > 0)
            done = self.histories[name]
            every = [p for p in self._expected[name] if p.position < start + count]
            assert [p for p in every if p.position < start] == done, "a compaction was skipped"
            due = [p for p in every if p.position == start]
            plans.sort()  # A group that had to wait for blocks comes after the others.
            assert plans == [p.record for p in due], f"due {due}, sent {plans}"
            assert len(every) == len(done) + len(due), "a chunk runs past a due compaction"
            done += due
            if (context := self.wishes[name].context) is not None:
                assert not start < context < start + count, "a chunk runs past the context"
                self._see("contexts", any(p.position == context for p in due))
                self._see("generated after a context", any(p.position > context for p in due))

    def _check_done(self) -> None:
        """What the worker did to a request is what the request's lengths alone lead to."""
        for request in self.scheduler.running:
            name = request.request_id
            done = sorted(self.worker.requests[name].plans, key=lambda p: p[:2])
            assert done == self.histories[name], "compactions did something else"

    # -- the moment of planning -------------------------------------------------------

    def _watch_planning(self) -> None:
        planner, pool = self.planner, self.pool
        original = planner.compact

        def compact(group: int, name: str, row: list[Any]) -> None:
            count = planner.totals.compactions
            step = self._due(group, name)
            if step is None:
                original(group, name, row)
                assert planner.totals.compactions == count, "a compaction that is not due"
                return
            before = {b.block_id: (b.ref_cnt, b.block_hash) for b in pool.blocks}
            listings = Counter(block.block_id for block in row)
            blocks = self._region(group, name, row)
            free = pool.get_num_free_blocks()
            hashed = {
                block.block_id
                for groups in block_rows(self.scheduler).get(name, ())
                for block in groups
                if block.block_hash is not None
            }
            original(group, name, row)
            if planner.totals.compactions == count:
                self._check_wait(step, name, row)
                return
            self._hashed_at_first_plan.setdefault(name, hashed)
            plan = planner._plans[-1]
            assert plan.sources == [blocks[i] for i in step.read], "wrong blocks are read"
            unshared = [b for b in plan.sources if before[b][0] == listings[b]]
            after = Counter(block.block_id for block in row)
            for block_id in plan.destinations:
                references, key = before[block_id]
                own = block_id in plan.sources
                expected = listings[block_id] if own else 0
                assert references == expected, "a plan writes a block that others use"
                block = pool.blocks[block_id]
                assert block.ref_cnt == after[block_id], "a written block: wrong reference count"
                assert block.block_hash is None, "a plan writes a hashed block"
                self._see("in place", own)
                self._see("in place once hashed", own and key is not None)
                self._see("in place of pooled blocks", own and references > 1)
                self._see("into fresh blocks", not own)
            gained = pool.get_num_free_blocks() - free
            assert gained == len(unshared) - len(plan.destinations), "a plan frees too few blocks"
            self._see("shared sources", len(unshared) < len(plan.sources))
            self._see("plans of pooled blocks", any(mine > 0 for mine in step.levels))
            self._see("high levels", max(step.levels) > 1)
            self._see("blocks left alone", len(step.read) < step.old)

        planner.compact = compact

    def _due(self, group: int, name: str) -> Compaction | None:
        """The compaction that a request has come to in a group."""
        computed = self.requests[name].num_computed_tokens
        for step in self._expected[name]:
            if step.position >= computed:
                if step.position > computed:
                    break
                if step.group == group:
                    return step
        return None

    def _region(self, group: int, name: str, row: list[Any]) -> list[int]:
        """The blocks of a row that compaction may change, each once, oldest first."""
        ids = [block.block_id for block in row]
        return list(dict.fromkeys(ids[self.worker.requests[name].first_entry(group) :]))

    def _check_wait(self, step: Compaction, name: str, row: list[Any]) -> None:
        """A due compaction was not planned: it was before, or there are too few blocks."""
        known = self.worker.requests[name].rows[step.group]
        if [block.block_id for block in row[: len(known)]] != known:
            return
        blocks = self._region(step.group, name, row)
        sources = [blocks[index] for index in step.read]
        listings = Counter(block.block_id for block in row)
        unshared = sum(self.pool.blocks[block].ref_cnt == listings[block] for block in sources)
        free = self.pool.get_num_free_blocks()
        assert unshared + free < step.written, "a compaction waits for no reason"
        self._see("compactions that wait")

    def _see(self, what: str, times: int = 1) -> None:
        """Count a situation, for all engines and for those of this kind."""
        self.seen[what] += times
        self.seen[f"{self._kind}: {what}"] += times

    def _watch_clipping(self) -> None:
        manager = self.scheduler.kv_cache_manager
        original = manager.truncate_computed_blocks

        def truncate(*args: Any) -> Any:
            self.seen["clipped hits"] += 1
            return original(*args)

        manager.truncate_computed_blocks = truncate
