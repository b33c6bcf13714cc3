"""A way to ask an engine for its snapshot: one more utility method of vLLM's engine core.

Target: ``EngineCore``, which answers any public method by name between two steps (a "utility"
call), also while it is idle and whether it shares its process with the caller or not. How:
one attribute, added when our scheduler is made, in the engine core's own process. Why not
``collective_rpc``: the workers do not know what the scheduler knows, what travels to them with
a step is out of date once the engine is idle, and with data parallelism one engine answers.
Upstream plan: none yet; a scheduler method reachable by name would do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_kvcompress.scheduler.snapshot import take_snapshot

METHOD = "kvcompress_snapshot"
"""Name of the utility method."""

TIMES = "kvcompress_times"
"""Name of the workers' method that returns how long compactions took."""


def kvcompress_snapshot(
    self: Any, closings: Mapping[int, int] | None = None, wanted: Sequence[str] = ()
) -> dict[str, Any]:
    """Snapshot of an engine core's scheduler, and how long its compactions took.

    Workers are asked only if something was compacted since they last were: to ask them is a
    barrier between steps.

    Parameters
    ----------
    self : EngineCore
    closings : mapping of int to int, optional
        ``closings`` of the last snapshot that the caller has, by engine.
    wanted : sequence of str
        As in :func:`~vllm_kvcompress.scheduler.snapshot.take_snapshot`.
    """
    scheduler = self.scheduler
    accounts = scheduler.kvcompress_accounts
    engine = scheduler.vllm_config.parallel_config.data_parallel_index
    found = take_snapshot(scheduler, (closings or {}).get(engine, 0), wanted)
    planned, times = getattr(self, "_kvcompress_times", (0, None))
    done = sum(accounts.counts.compactions.values())
    if done != planned or times is None:
        # All ranks run the same plans; the first one speaks for them.
        times = self.model_executor.collective_rpc(TIMES)[0]
        self._kvcompress_times = (done, times)
    found["histograms"]["compaction_seconds"] = times
    found["totals"]["compaction_seconds"] = times["sum"]
    return found


def install() -> None:
    """Make :func:`kvcompress_snapshot` a method of the engine core. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, METHOD, kvcompress_snapshot)
