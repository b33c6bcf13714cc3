"""The compactions under way in one engine, shared by its KV cache managers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_kvcompress.scheduler.accounts import Accounts
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.scheduler.promises import promised_blocks
from vllm_kvcompress.scheduler.region import Change, Region, levels_before
from vllm_kvcompress.scheduler.schedule import NEVER, Schedule
from vllm_kvcompress.scheduler.state import RequestState, Totals
from vllm_kvcompress.scheduler.trajectory import Trajectory


class Planner:
    """Plans compactions from lengths, one state per request.

    Parameters
    ----------
    schedule : Schedule
        When to compact and the limits of each KV cache group, by the server's settings.
    requests : mapping of str to Request
        The scheduler's requests (its own dict, not a copy).
    block_pool : BlockPool
        The pool all groups draw on.
    trajectory_of : callable or None
        Trajectory of a request that has not begun; ``None`` if the server's settings are
        every request's.
    """

    def __init__(
        self,
        schedule: Schedule,
        requests: Mapping[str, Request],
        block_pool: BlockPool,
        trajectory_of: Callable[[Request], Trajectory] | None = None,
    ) -> None:
        self.schedule = schedule
        self.trajectory_of = trajectory_of or self._as_the_server
        self.requests = requests
        self.block_pool = block_pool
        self.totals = Totals()
        self.accounts: Accounts | None = None
        self._states: dict[str, RequestState] = {}
        self._plans: list[CompactionPlan] = []

    def state(self, request: Request) -> RequestState:
        """State of a request, made on first use and after every preemption."""
        state = self._states.get(request.request_id)
        if state is None:
            trajectory = self.trajectory_of(request)
            # The prompt of a streaming session grows: it has no trajectory of its own.
            if request.resumable:
                trajectory.due = NEVER
            state = self._states[request.request_id] = RequestState(trajectory)
        return state

    def _as_the_server(self, request: Request) -> Trajectory:
        return Trajectory(self.schedule, request.num_prompt_tokens)

    def drop(self, request_id: str) -> None:
        """Forget a request that was finished, aborted or preempted, and its open plans."""
        if self._states.pop(request_id, None) is not None and self._plans:
            self._plans = [plan for plan in self._plans if plan.request_id != request_id]

    def started(self, request_id: str) -> bool:
        """Whether the request has compacted, so that its blocks may not be hashed."""
        state = self._states.get(request_id)
        return state is not None and state.started

    def stop(self, request: Request, computed: int) -> int:
        """Position at which the chunk that starts at ``computed`` has to end, at the latest."""
        trajectory = self.state(request).trajectory
        if trajectory.due <= computed:
            trajectory.advance(computed)
        context = trajectory.context_tokens
        # Also where nothing of the context is removed.
        return min(trajectory.due, context if context and computed < context else NEVER)

    def hit_limit(self, request: Request) -> int:
        """Longest prefix-cache hit that does not reach past context or first compaction."""
        trajectory = self.state(request).trajectory
        return min(trajectory.due - 1, trajectory.context_tokens or NEVER)

    def is_due(self, request_id: str) -> bool:
        """Whether a request has yet to compact before it goes on; where not all could: waits."""
        request, state = self.requests.get(request_id), self._states.get(request_id)
        if request is None:
            return False
        if state is None:
            if not request.num_computed_tokens:
                return False
            state = self.state(request)
        return state.is_due(request.num_computed_tokens)

    def promised(self, besides: str, rows: Mapping[str, Sequence[KVCacheBlock]]) -> int:
        """Blocks that compressed requests will yet take before they give some back.

        Parameters
        ----------
        besides : str
            Request that does not count, the one to be admitted.
        rows : mapping of str to sequence of KVCacheBlock
            Block lists of any group by request: all groups' are equally long.
        """
        states = (
            (self.requests[request_id], state, len(row))
            for request_id, state in self._states.items()
            if request_id != besides and (row := rows.get(request_id))
        )
        groups, phase = len(self.schedule.limits), self.schedule.phase
        return promised_blocks(states, groups, phase == "during_prefill")

    def compact(self, group: int, request_id: str, row: list[KVCacheBlock]) -> None:
        """Plan the compaction due now for a request in one group, if there is one.

        Rewrites ``row`` (the manager's block list) and returns blocks to the pool.

        Parameters
        ----------
        group : int
            KV cache group.
        request_id : str
        row : list of KVCacheBlock
            The request's blocks in that group, changed in place.
        """
        request = self.requests.get(request_id)
        if request is None:
            return
        computed = request.num_computed_tokens
        state = self._states.get(request_id)
        if state is None:
            if not computed:
                return
            state = self.state(request)
        if computed < state.trajectory.due and computed != state.trajectory.position:
            return
        if group not in state.open_groups(computed):
            return
        trajectory = state.trajectory
        step, limits = trajectory.steps[group], trajectory.limits[group]
        freed, size = step.old - step.kept, self.schedule.block_size
        assert limits is not None, "a group that keeps every token compacts"
        listed = limits.merging is not None and limits.merging.count
        # A row that lists pooled blocks several times keeps its length without holes.
        new_holes = 0 if listed else trajectory.removed[group]
        holes = 0 if listed else new_holes - freed
        first = trajectory.first_entry(group, holes)
        before = Region.of_row(row, first, levels_before(step), listed)
        change = Change.of_step(before, step)
        references = before.references()
        destinations = self._destinations(change.sources, change.written, references)
        if destinations is None:
            self.totals.waits += 1
            return

        after = change.after(destinations)
        nulls = [self.block_pool.null_block] * (new_holes - holes)
        entries = nulls + row[holes:first] + after.entries()
        row[holes : holes + len(entries)] = entries
        state.done.add(group)
        self._plans.append(
            CompactionPlan(
                request_id=request_id,
                group=group,
                position=computed,
                sources=[block.block_id for block in change.sources],
                destinations=[block.block_id for block in destinations],
                row_start=holes,
                row_ids=[block.block_id for block in entries],
                holes=new_holes,
                removed=freed,
                method=trajectory.schedule.method,
                sinks=limits.sinks,
                pooled=change.pooled,
                rounds=change.rounds,
                outputs=change.outputs,
                exact=step.pooled.exact if step.pooled and step.pooled.ranked else 0,
                end=(trajectory.blocks_before(group, computed) + step.kept) * size,
            )
        )
        self.totals.requests += not state.started
        self.totals.compactions += 1
        self.totals.blocks_freed += freed
        self.totals.tokens_removed += freed * size
        state.started = True
        if self.accounts is not None:
            self.accounts.compacted(request, self._plans[-1])
        self._give_up(change.sources, destinations, references, after.references())

    def take_plans(self) -> list[CompactionPlan]:
        """The plans made since the last call, in the order in which they must run."""
        plans, self._plans = self._plans, []
        return plans

    def _destinations(
        self, sources: Sequence[KVCacheBlock], count: int, references: Mapping[int, int]
    ) -> list[KVCacheBlock] | None:
        """Blocks to compact into, or ``None`` if there are not enough.

        A block that another request references or that the prefix cache knows is never
        written. Own unhashed blocks come first (they need no room), then fresh ones, so
        that hashed blocks return to the pool with their hashes; own hashed blocks are
        taken out of the prefix cache only when the pool has no fresh ones. ``references``
        are the request's own, by block id.
        """
        pool = self.block_pool
        own = [block for block in sources if block.ref_cnt == references[block.block_id]]
        chosen = [block for block in own if block.block_hash is None][:count]
        missing = count - len(chosen)
        if not missing:
            return chosen
        fresh = min(missing, pool.get_num_free_blocks())
        in_place = missing - fresh
        if in_place:
            hashed = [block for block in own if block.block_hash is not None]
            if in_place > len(hashed):
                return None
            # The latest ones: the start of the prompt stays findable.
            taken = hashed[-in_place:]
            pool.evict_blocks({block.block_id for block in taken})
            chosen += taken
        return chosen + pool.get_new_blocks(fresh)

    def _give_up(
        self,
        sources: Sequence[KVCacheBlock],
        destinations: Sequence[KVCacheBlock],
        before: Mapping[int, int],
        after: Mapping[int, int],
    ) -> None:
        """Set the references of written blocks and return the others that were read."""
        gone = [block for block in sources if block.block_id not in after]
        for block in gone:
            # Freeing takes one reference away; a pooled block may have several.
            block.ref_cnt -= before[block.block_id] - 1
        for block in destinations:
            block.ref_cnt = after[block.block_id]
        # Reversed, as vLLM frees: the start of a prompt is the last to leave the cache.
        self.block_pool.free_blocks(reversed(gone))
