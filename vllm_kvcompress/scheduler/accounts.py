"""What requests hold and have held: one small record per request, kept at events only.

A request's blocks grow when they are allocated and shrink when it is compacted, preempted or
finished. So the most it ever held is found by looking just before it shrinks, and nothing has
to be done in the steps between. What requests hold *now* is worked out when somebody asks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from vllm_kvcompress.histogram import KV_BYTES, Histogram
from vllm_kvcompress.request import REPORT_KEY
from vllm_kvcompress.scheduler.account import Account, Group, Moment
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.settings import Settings


@dataclass
class Counts:
    """Counts since the engine started; none ever falls.

    Attributes
    ----------
    requests : Counter
        Finished requests by method.
    compactions : Counter
        Compactions of one request in one group by method; plans that a preemption or abort
        dropped included.
    tokens_removed, tokens_merged : int
        Token slots given up by eviction and by pooling, summed over groups.
    blocks_freed : int
        Blocks given up by requests in compactions.
    preemptions : int
    prompt_tokens, output_tokens : int
        Of finished requests; prompt tokens of those that put out a token.
    """

    requests: Counter[str] = field(default_factory=Counter)
    compactions: Counter[str] = field(default_factory=Counter)
    tokens_removed: int = 0
    tokens_merged: int = 0
    blocks_freed: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Accounts:
    """The accounts of one engine.

    Parameters
    ----------
    settings : Settings
        The server's.
    config : KVCacheConfig
        The groups; sizes are those of one rank.
    ranks : int
        Tensor-parallel ranks: every block exists once on each.
    managers : sequence of SingleTypeKVCacheManager
        Managers of the groups.
    in_force : callable, optional
        Settings of a request and its ``context_tokens``; the server's and none if left out.
    """

    def __init__(
        self,
        settings: Settings,
        config: KVCacheConfig,
        ranks: int,
        managers: Sequence[SingleTypeKVCacheManager],
        in_force: Callable[[Request], tuple[Settings, int | None]] | None = None,
    ) -> None:
        self.in_force = in_force or (lambda request: (settings, None))
        self.managers = managers
        self.block_size = managers[0].block_size
        self.block_bytes = ranks * bytes_per_block(config)
        self.groups = [
            Group.of(group.kv_cache_spec, len(group.layer_names))
            for group in config.kv_cache_groups
        ]
        self.live: dict[str, Account] = {}
        self.starting: dict[str, Account] = {}
        """Accounts of requests that were scheduled and have put out no token yet."""
        self.counts = Counts()
        self.peak_bytes, self.finish_bytes = Histogram(KV_BYTES), Histogram(KV_BYTES)
        self.closed: deque[dict[str, Any]] = deque(maxlen=settings.finished_requests)
        """Accounts of finished requests, with their history, oldest first."""
        self.closings = 0
        """Accounts ever closed, those that ``closed`` has forgotten included."""
        self._latest: dict[str, Any] = {}

    # Events

    def scheduled(self, request: Request, cached_tokens: int) -> None:
        """Note that a request starts, or starts again, after a prefix-cache hit."""
        account = self._account(request)
        if account.scheduled is None:
            now = time.time()
            account.scheduled, account.cached_tokens = now, cached_tokens
            account.note(account.moment(now, self._lengths(request)))
            self.starting[request.request_id] = account

    def tokens_arrived(self) -> None:
        """Note which requests have their first token; only those without one are looked at."""
        for account in [a for a in self.starting.values() if a.request.num_output_tokens]:
            self._begin(account)

    def compacted(self, request: Request, plan: CompactionPlan) -> None:
        """Note a planned compaction; it has not changed the length of the request's row."""
        account = self._account(request)
        if account.compacted_at != plan.position:
            before = account.moment(time.time(), self._lengths(request))
            account.note(before)
            account.note(before._replace(blocks=list(before.blocks)))
            account.compacted_at = plan.position
        # Nothing grew since another group was compacted here: all groups are one event.
        account.moments[-1].blocks[plan.group] -= plan.removed
        account.removed[plan.group] += plan.removed
        account.compactions += 1
        counts, slots = self.counts, plan.removed * self.block_size
        counts.compactions[account.method] += 1
        counts.blocks_freed += plan.removed
        if plan.outputs:  # What ranking leaves over is pooled: nothing is lost.
            account.merged[plan.group] += plan.removed
            counts.tokens_merged += slots
        else:
            counts.tokens_removed += slots

    def releasing(self, request: Request) -> None:
        """Note that a request loses its blocks in a moment: it is preempted or finished."""
        account = self._account(request)
        moment = account.moment(time.time(), self._lengths(request))
        account.note(moment)
        if not request.is_finished():
            self.counts.preemptions += 1
            account.removed, account.merged = self._zeros(), self._zeros()
            account.compacted_at = 0
            account.note(Moment(moment.time, 0, self._zeros(), 0))
            return
        if account.first_token is None and request.num_output_tokens:
            self._begin(account)
        self._close(account)

    def _account(self, request: Request) -> Account:
        account = self.live.get(request.request_id)
        if account is None:
            account = self.live[request.request_id] = self.new_account(request)
        return account

    def new_account(self, request: Request) -> Account:
        """An account with the settings in force for a request, not kept anywhere."""
        settings, context_tokens = self.in_force(request)
        shown = {
            "budget": settings.token_budget,
            "keep_ratio": settings.keep_ratio,
            "prune_after": settings.prune_after,
            "context_tokens": context_tokens,
        }
        return Account(request, settings.method, shown, self._zeros(), self._zeros())

    def _zeros(self) -> list[int]:
        return [0] * len(self.groups)

    def _begin(self, account: Account) -> None:
        account.first_token = time.time()
        self.starting.pop(account.request.request_id, None)

    def _close(self, account: Account) -> None:
        counts, request, report = self.counts, account.request, self.report(account)
        del self.live[request.request_id]
        self.starting.pop(request.request_id, None)
        counts.requests[account.method] += 1
        counts.output_tokens += request.num_output_tokens
        if account.first_token is not None:
            counts.prompt_tokens += request.num_prompt_tokens
        if account.scheduled is not None:
            self.peak_bytes.observe(report["bytes_peak"])
            self.finish_bytes.observe(sum(account.moments[-1].blocks) * self.block_bytes)
        self.closed.append(report | {"history": self.history(account)})
        self.closings += 1
        self._latest = report

    # What is asked for

    def rows(self, request_id: str) -> list[Sequence[KVCacheBlock]]:
        """Block lists of a request, one per group."""
        return [manager.req_to_blocks.get(request_id, ()) for manager in self.managers]

    def _lengths(self, request: Request) -> list[int]:
        return [len(row) for row in self.rows(request.request_id)]

    def shares(self, account: Account, rows: Sequence[Sequence[KVCacheBlock]]) -> list[float]:
        """Blocks charged to a request per group: a block with n references counts 1/n of each.

        A row that lists a pooled block several times holds that many of its references, so
        that its listings add up to one.
        """
        shares = []
        for row, removed in zip(rows, account.removed, strict=True):
            # What was given up left holes, or further listings of pooled blocks.
            held = row[removed:] if removed and row and row[0].is_null else row
            references = [block.ref_cnt for block in held]
            own = references.count(1)
            if own < len(references):
                shares.append(own + sum(1 / count for count in references if count > 1))
            else:
                shares.append(own)
        return shares

    def report(self, account: Account) -> dict[str, Any]:
        """What a request holds now and what is known of it."""
        rows = self.rows(account.request.request_id)
        now = account.moment(time.time(), [len(row) for row in rows])
        shares = self.shares(account, rows)
        return account.report(now, shares, self.groups, (self.block_size, self.block_bytes))

    def history(self, account: Account) -> list[dict[str, Any]]:
        """What a request has held, oldest first, up to now."""
        moments = account.moments
        if not account.request.is_finished():
            moments = [*moments, account.moment(time.time(), self._lengths(account.request))]
        return [moment.as_dict(self.block_bytes) for moment in moments]

    def closed_since(self, closings: int) -> list[dict[str, Any]]:
        """Accounts closed after the first so many, newest first, as far as they are kept."""
        return list(islice(reversed(self.closed), max(0, self.closings - closings)))

    def asked_for(self, request: Request) -> dict[str, Any] | None:
        """The account just closed, if it is that of a request that asks for it."""
        params = request.sampling_params
        if params is None or not params.extra_args:
            return None
        asked = params.extra_args.get(REPORT_KEY) in (1, True)
        return self._latest if asked and self._latest.get("id") == request.request_id else None

    def tokens(self) -> Iterable[tuple[int, int]]:
        """Prompt and output tokens of each live request, counted as ``counts`` does."""
        for account in self.live.values():
            prompt = account.request.num_prompt_tokens if account.first_token is not None else 0
            yield prompt, account.request.num_output_tokens


def bytes_per_block(config: KVCacheConfig) -> int:
    """Bytes of one block of the pool on one rank; a block serves all layers of a group."""
    if config.kv_cache_tensors:
        # The groups overlay each other: each tensor gives the size of all.
        return max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
    return max(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in config.kv_cache_groups)
