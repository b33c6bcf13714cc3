"""A second bookkeeper: recounts what the accounts say from the block lists alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from vllm.v1.request import Request

from vllm_kvcompress.scheduler.scheduler import KVCompressSchedulerMixin
from vllm_kvcompress.scheduler.snapshot import MAX_WAITING, take_snapshot


def is_near(found: float, expected: float, within: float = 0) -> bool:
    """Equal but for rounding; pytest's own would be slow here."""
    return abs(found - expected) <= max(within, 1e-6 * expected)


class AccountBook:
    """Recounts a scheduler's accounts after every step.

    Attributes
    ----------
    closings : int
        Finished requests whose account was checked.
    """

    def __init__(self, scheduler: KVCompressSchedulerMixin, priority: bool) -> None:
        self.scheduler = scheduler
        self.accounts = scheduler.kvcompress_accounts
        self.pool = scheduler.kv_cache_manager.block_pool
        self.priority = priority
        self.closings = 0
        self._peaks: defaultdict[str, int] = defaultdict(int)
        self._lengths: defaultdict[str, int] = defaultdict(int)
        self._last: dict[str, Any] = {}

    def check(self, rows: Mapping[str, list[list[Any]]], requests: Mapping[str, Request]) -> None:
        """Compare a snapshot with the block lists it was made from."""
        found = take_snapshot(self.scheduler, self.closings)
        self._check_pool(found["pool"], rows)
        self._check_totals(found["totals"])
        holders = Counter(
            block
            for groups in rows.values()
            for block in {block.block_id for row in groups for block in row}
        )
        live = {report["id"]: report for report in found["live"]}
        if len(self.scheduler.requests) <= MAX_WAITING:
            assert live.keys() == self.scheduler.requests.keys()
        charged = 0.0
        for name, groups in rows.items():
            charged += self._check_live(live[name], name, groups, holders, requests[name])
        assert is_near(charged, len(holders.keys() - {0}))
        held = sum(report["bytes_held"] for report in live.values())
        assert is_near(held, found["pool"]["used_bytes"], len(live))
        states = Counter(report["state"] for report in live.values())
        assert states["running"] == found["requests"]["running"]
        assert states["waiting"] == found["requests"]["waiting"]
        for report in found["closed"]:
            self._check_closed(report, requests[report["id"]])

    def _check_pool(self, pool: dict[str, int], rows: Mapping[str, list[list[Any]]]) -> None:
        used = {block.block_id for groups in rows.values() for row in groups for block in row}
        hashed = {block.block_id for block in self.pool.blocks if block.block_hash is not None}
        used.discard(self.pool.null_block.block_id)
        assert pool["used"] == len(used)
        assert pool["cached"] == len(hashed - used)
        assert sum(pool[state] for state in ("used", "cached", "free", "null")) == pool["blocks"]
        size = pool["bytes"] // pool["blocks"]
        for state in ("used", "cached", "free"):
            assert pool[f"{state}_bytes"] == pool[state] * size

    def _check_totals(self, totals: dict[str, Any]) -> None:
        """They never fall, and agree with the planner's own."""
        planned = self.scheduler.kvcompress.totals
        assert sum(totals["compactions"].values()) == planned.compactions
        assert totals["tokens_removed"] + totals["tokens_merged"] == planned.tokens_removed
        assert totals["blocks_freed"] == planned.blocks_freed
        for key, value in totals.items():
            if isinstance(value, dict):
                value = sum(value.values())
            assert value >= self._last.get(key, 0), f"the total of {key} fell"
            self._last[key] = value

    def _check_live(
        self,
        report: dict[str, Any],
        name: str,
        groups: list[list[Any]],
        holders: Counter[int],
        request: Request,
    ) -> float:
        """Compare one report with the request's block lists; returns its share in blocks."""
        size = self.accounts.block_size
        share, whole = 0.0, 0
        for band, row in zip(report["bands"], groups, strict=True):
            own = {block.block_id for block in row} - {0}
            assert band["blocks"] == len(own)
            slots = [band["tokens_kept"], band["tokens_removed"], band["tokens_merged"]]
            if row:
                assert sum(slots) == request.num_computed_tokens
                gone = -(-request.num_computed_tokens // size) - len(own)
                assert sum(slots[1:]) == gone * size
            share += sum(1 / holders[block] for block in own)
            whole += len(own)
        stock = -(-request.num_computed_tokens // size) * len(groups) if any(groups) else 0
        bytes_of = self.accounts.block_bytes
        assert is_near(report["bytes_held"], share * bytes_of, 1)
        uncompressed = share + stock - whole
        assert is_near(report["bytes_uncompressed"], uncompressed * bytes_of, 1)
        self._peaks[name] = max(self._peaks[name], whole)
        self._lengths[name] = max(self._lengths[name], stock)
        return share

    def _check_closed(self, report: dict[str, Any], request: Request) -> None:
        self.closings += 1
        name = report["id"]
        assert report["state"] == "finished"
        assert report["output_tokens"] == request.num_output_tokens
        assert report["preemptions"] == request.num_preemptions
        peak, stock = report["bytes_peak"], report["bytes_uncompressed_peak"]
        size = self.accounts.block_bytes
        assert peak >= self._peaks[name] * size and stock >= self._lengths[name] * size
        # Only priorities let a step take blocks for a request that it then preempts.
        if not self.priority or not request.num_preemptions:
            assert peak == self._peaks[name] * size, "the peak is not what was seen"
            assert stock == self._lengths[name] * size
