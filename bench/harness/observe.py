"""What happens in the scheduler of an engine while a tool of vLLM's drives it."""

from __future__ import annotations

import time
from typing import Any

from bench.harness.engines import greedy, make_prompts, scheduler_of


class Watch:
    """Counts what a scheduler does from now on; one short call per step.

    Attributes
    ----------
    preemptions, steps : int
    peak : int
        Most requests that ever ran at once.
    seconds : float
        Time spent scheduling, that is in ``Scheduler.schedule``.
    """

    def __init__(self, engine: Any, block_bytes: int) -> None:
        self.engine, self.scheduler = engine, scheduler_of(engine)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.block_bytes = block_bytes / len(self.scheduler.kv_cache_config.kv_cache_groups)
        """Of a block of one group; the bench's models have groups of equal size."""
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request
        self.restart()

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = schedule(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            self.look()
            return output

        def watched_preempt(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        self.scheduler.schedule = watched_schedule
        self.scheduler._preempt_request = watched_preempt

    def restart(self) -> None:
        """Count from zero."""
        self.preemptions = self.steps = self.peak = 0
        self.seconds = 0.0
        self._running = self._blocks = 0
        self._compacting = self._totals().get("seconds", 0.0)

    def look(self) -> None:
        """Note how many requests run and what they hold."""
        running = len(self.scheduler.running)
        self.steps += 1
        self.peak = max(self.peak, running)
        self._running += running
        self._blocks += self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    def figures(self, seconds: float) -> dict[str, Any]:
        """What was counted during so many seconds."""
        totals = self._totals()
        return {
            "preemptions": self.preemptions,
            "peak_concurrency": self.peak,
            "mean_concurrency": self._running / max(1, self.steps),
            "kv_bytes_per_request": self.block_bytes * self._blocks / max(1, self._running),
            "pool_blocks": self.pool.num_gpu_blocks - 1,
            "groups": len(self.scheduler.kv_cache_config.kv_cache_groups),
            "steps": self.steps,
            "scheduling_share": self.seconds / seconds,
            "compaction_share": (totals.get("seconds", 0.0) - self._compacting) / seconds,
        }

    def _totals(self) -> dict[str, Any]:
        if not hasattr(self.scheduler, "kvcompress"):
            return {}
        return self.engine.collective_rpc("kvcompress_totals")[0]


def watch_next_llm(block_bytes: int) -> list[Watch]:
    """Make ``vllm.LLM`` watch its scheduler and warm up; the list gets the watch."""
    import vllm

    watches: list[Watch] = []

    class WatchedLLM(vllm.LLM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.generate(make_prompts(2, 64), greedy(8), use_tqdm=False)
            watches.append(Watch(self, block_bytes))

    vllm.LLM = WatchedLLM
    return watches
