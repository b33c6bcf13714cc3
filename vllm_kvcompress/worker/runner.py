"""Compaction inside vLLM's model runners: one small adapter for each of the two.

Targets: ``get_kv_cache_spec``, ``initialize_kv_cache`` and the method that takes in a
step's block tables (``_update_states`` in V1, ``update_requests`` in V2). Why: a worker
class can be chosen, a runner class cannot. How: :func:`adapt` gives the runner object a
subclass of its own class. Upstream plan: ``patches/`` proposes a place for plugin data in
``SchedulerOutput``; a runner hook beside ``kv_cache_block_copies`` would do the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_kvcompress.attention.holes import HoleCounts
from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE, CompactionPlan
from vllm_kvcompress.settings import SettingsError
from vllm_kvcompress.worker.setup import WorkerState, compressed_specs, connect

if TYPE_CHECKING:
    # Both runners have these; the mixins never stand alone.
    Base: Any = object
else:
    Base = object


class CompressedRunner(Base):
    """What both runners share."""

    kvcompress: WorkerState | None = None
    holes_by_slot = False
    """Whether attention metadata names request slots instead of rows of the batch."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Specs of the layers, those that can be compressed as specs of their band."""
        return compressed_specs(super().get_kv_cache_spec(), self.vllm_config)

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        """Allocate as vLLM does, then learn the pages and take over the attention groups."""
        # Our views would keep a cache alive that vLLM means to give back.
        self.kvcompress = None
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if not is_profiling:
            self.kvcompress = connect(self, self._block_table_widths(), self.holes_by_slot)

    def shutdown(self) -> None:
        """Let go of the cache before vLLM collects it."""
        self.kvcompress = None
        super().shutdown()

    def _run_plans(self, output: SchedulerOutput) -> None:
        plans: list[CompactionPlan] | None = getattr(output, PLANS_ATTRIBUTE, None)
        if plans:
            assert self.kvcompress is not None
            self.kvcompress.compactor.run(plans)
            for plan in plans:
                self._rewrite_row(plan, self.kvcompress.holes)


class CompressedRunnerV1(CompressedRunner):
    """Adapter for ``vllm.v1.worker.gpu_model_runner.GPUModelRunner``."""

    def _block_table_widths(self) -> list[int]:
        return [t.max_num_blocks_per_req for t in self.input_batch.block_table.block_tables]

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        """Compact before blocks are zeroed, copied or appended, and rearrange hole counts."""
        self._run_plans(scheduler_output)
        deferred = super()._update_states(scheduler_output)
        if self.kvcompress is not None:
            holes = self.kvcompress.holes
            holes.drop(scheduler_output.finished_req_ids)
            holes.drop(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
            holes.arrange(self.input_batch.req_ids)
        return deferred

    def _rewrite_row(self, plan: CompactionPlan, holes: HoleCounts) -> None:
        holes.set(plan.request_id, plan.group, plan.holes)
        end = plan.row_start + len(plan.row_ids)
        self.requests[plan.request_id].block_ids[plan.group][plan.row_start : end] = plan.row_ids
        row = self.input_batch.req_id_to_index.get(plan.request_id)
        if row is not None:
            table = self.input_batch.block_table[plan.group].block_table
            table.np[row, plan.row_start : end] = plan.row_ids


class CompressedRunnerV2(CompressedRunner):
    """Adapter for ``vllm.v1.worker.gpu.model_runner.GPUModelRunner``."""

    holes_by_slot = True

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        """Refuse models whose metadata does not name request slots, then as the base."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        if type(self.model_state).prepare_attn is not DefaultModelState.prepare_attn:
            raise SettingsError(
                f"kvcompress: models with their own {type(self.model_state).__name__} cannot be "
                "compressed yet on vLLM's V2 model runner; VLLM_USE_V2_MODEL_RUNNER=0 selects V1."
            )
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)

    def _block_table_widths(self) -> list[int]:
        return [table.gpu.shape[1] for table in self.block_tables.block_tables]

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """New and resumed requests have no holes, whoever had their slot before."""
        super().add_requests(scheduler_output)
        if self.kvcompress is not None:
            for request in scheduler_output.scheduled_new_reqs:
                slot = self.req_states.req_id_to_index[request.req_id]
                self.kvcompress.holes.rows[:, slot] = 0

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Compact before blocks are zeroed, copied or appended."""
        self._run_plans(scheduler_output)
        super().update_requests(scheduler_output)

    def _rewrite_row(self, plan: CompactionPlan, holes: HoleCounts) -> None:
        slot = self.req_states.req_id_to_index[plan.request_id]
        holes.rows[plan.group, slot] = plan.holes
        self.block_tables.block_tables[plan.group].stage_write(slot, plan.row_start, plan.row_ids)


def adapt(runner: Any, use_v2: bool) -> None:
    """Give a runner object the adapter for its kind, in place."""
    adapter = CompressedRunnerV2 if use_v2 else CompressedRunnerV1
    if not isinstance(runner, adapter):
        cls = type(runner)
        runner.__class__ = type(f"KVCompress{cls.__name__}", (adapter, cls), {})
