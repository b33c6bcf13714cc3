"""What an engine says about itself when asked: built on demand, plain data only."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.scheduler.account import state_of
from vllm_kvcompress.scheduler.accounts import Accounts
from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec, band_of

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_kvcompress.scheduler.scheduler import KVCompressSchedulerMixin

layer_index = functools.cache(extract_layer_index)

MAX_WAITING = 256
"""Waiting requests shown one by one, in the order of their arrival; all are counted."""


def take_snapshot(
    scheduler: KVCompressSchedulerMixin, closings: int = 0, wanted: Collection[str] = ()
) -> dict[str, Any]:
    """State of one engine between two steps.

    Takes time in proportion to the requests, the entries of their block lists and the blocks
    of the pool. Nothing of it is done unless somebody asks.

    Parameters
    ----------
    scheduler : KVCompressSchedulerMixin
    closings : int
        ``closings`` of the last snapshot that the caller has: of requests finished before
        it, nothing is said.
    wanted : collection of str
        Live requests whose history is asked for.

    Returns
    -------
    dict
        Of strings, numbers, lists and dicts.
    """
    accounts = scheduler.kvcompress_accounts
    live: list[dict[str, Any]] = []
    histories: dict[str, list[dict[str, Any]]] = {}
    waiting = preempted = 0
    for request_id, request in scheduler.requests.items():
        if state_of(request) != "running":
            waiting += 1
            preempted += request.num_preemptions > 0
            if waiting > MAX_WAITING:
                continue
        account = accounts.live.get(request_id) or accounts.new_account(request)
        live.append(accounts.report(account))
        if request_id in wanted:
            histories[request_id] = accounts.history(account)
    return {
        "engine": scheduler.vllm_config.parallel_config.data_parallel_index,
        "time": time.time(),
        "layout": _layout(scheduler.kv_cache_config, accounts),
        "pool": _pool(scheduler.kv_cache_manager.block_pool, accounts.block_bytes),
        "requests": {
            "running": len(scheduler.running),
            "waiting": waiting,
            "preempted": preempted,
        },
        "totals": _totals(accounts),
        "histograms": {
            "peak": accounts.peak_bytes.as_dict(),
            "finish": accounts.finish_bytes.as_dict(),
        },
        "live": live,
        "histories": histories,
        "closed": accounts.closed_since(closings),
        "closings": accounts.closings,
    }


def _layout(config: KVCacheConfig, accounts: Accounts) -> dict[str, Any]:
    groups = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        limits = spec.limits if isinstance(spec, CompressedAttentionSpec) else None
        groups.append(
            {
                "band": band_of(spec),
                "layers": [layer_index(name) for name in group.layer_names],
                "budget": limits.budget if limits else None,
                "keep_ratio": float(limits.ratio) if limits and limits.ratio else None,
            }
        )
    return {
        "block_size": accounts.block_size,
        "bytes_per_block": accounts.block_bytes,
        "groups": groups,
    }


def _pool(pool: BlockPool, block_bytes: int) -> dict[str, int]:
    total, idle = pool.num_gpu_blocks, pool.get_num_free_blocks()
    # vLLM keeps no count of them: its table of hashes has blocks in use as well.
    cached = sum(1 for b in pool.blocks if not b.ref_cnt and b.block_hash is not None)
    counts = {"used": total - 1 - idle, "cached": cached, "free": idle - cached}
    sizes = {f"{state}_bytes": count * block_bytes for state, count in counts.items()}
    return {"blocks": total, **counts, "null": 1, "bytes": total * block_bytes, **sizes}


def _totals(accounts: Accounts) -> dict[str, Any]:
    counts, live = accounts.counts, list(accounts.tokens())
    return {
        "requests": dict(counts.requests),
        "compactions": dict(counts.compactions),
        "tokens_removed": counts.tokens_removed,
        "tokens_merged": counts.tokens_merged,
        "blocks_freed": counts.blocks_freed,
        "preemptions": counts.preemptions,
        "prompt_tokens": counts.prompt_tokens + sum(prompt for prompt, _ in live),
        "output_tokens": counts.output_tokens + sum(output for _, output in live),
    }
