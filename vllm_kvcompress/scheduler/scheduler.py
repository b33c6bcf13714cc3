"""vLLM's schedulers with compaction: chunks end where a compaction is due, plans travel along."""

from __future__ import annotations

import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvcompress.request import REPORT_KEY, asked, own_keys
from vllm_kvcompress.scheduler import utility
from vllm_kvcompress.scheduler.accounts import Accounts
from vllm_kvcompress.scheduler.coordinator import adapt
from vllm_kvcompress.scheduler.groups import check_groups
from vllm_kvcompress.scheduler.plan import PLANS_ATTRIBUTE
from vllm_kvcompress.scheduler.planner import Planner
from vllm_kvcompress.scheduler.requests import RequestSchedules
from vllm_kvcompress.scheduler.schedule import Schedule
from vllm_kvcompress.scheduler.spec import band_of
from vllm_kvcompress.scheduler.trajectory import Trajectory
from vllm_kvcompress.settings import CONFIG_KEY, Settings, SettingsError, parse_settings

logger = init_logger("vllm.kvcompress")

LOG_INTERVAL = 10.0
"""Seconds between two log lines with totals, while they change."""


class KVCompressSchedulerMixin(Scheduler):
    """What both schedulers add to vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = parse_settings(self.vllm_config.additional_config[CONFIG_KEY])
        limits = check_groups(self.kv_cache_config, self.vllm_config, settings)
        coordinator = self.kv_cache_manager.coordinator
        self.kvcompress = Planner(
            # One block size serves every group: models with several are refused.
            Schedule.of(settings, limits, self.block_size, self.max_model_len),
            self.requests,
            self.kv_cache_manager.block_pool,
            self._trajectory_of,
        )
        self._request_schedules = RequestSchedules(
            settings,
            [band_of(group.kv_cache_spec) for group in self.kv_cache_config.kv_cache_groups],
            self.vllm_config.model_config.get_num_layers(self.vllm_config.parallel_config),
            self.block_size,
            self.max_model_len,
            self.vllm_config.model_config.get_total_num_kv_heads(),
        )
        self.kvcompress_accounts = self.kvcompress.accounts = Accounts(
            settings,
            self.kv_cache_config,
            self.vllm_config.parallel_config.tensor_parallel_size,
            coordinator.single_type_managers,
            self._in_force,
        )
        utility.install()
        self._kvcompress_method = settings.method
        self._logged_compactions = 0
        self._logged_at = time.monotonic()
        adapt(self.kv_cache_manager, self.kvcompress)

    def _trajectory_of(self, request: Request) -> Trajectory:
        """When a request compacts: as the server's settings say, or its own.

        The API process has refused what cannot be used. Who comes here without passing it gets
        the server's settings instead of an error that would end the engine.
        """
        prompt = request.num_prompt_tokens
        if wishes := _wishes(request):
            schedules = self._request_schedules
            try:
                trajectory = schedules.trajectory(prompt, wishes)
            except SettingsError as error:
                logger.warning("kvcompress: request %s: %s", request.request_id, error)
            else:
                most = schedules.most_blocks(trajectory, prompt + request.max_tokens)
                if most < self.kv_cache_manager.block_pool.num_gpu_blocks:
                    return trajectory
                logger.warning(
                    "kvcompress: request %s would never fit the pool with its own settings "
                    "(%d blocks) and gets the server's.",
                    request.request_id,
                    most,
                )
        return Trajectory(self.kvcompress.schedule, prompt)

    def _in_force(self, request: Request) -> tuple[Settings, int | None]:
        """Settings that a request is compressed by, and its context; for its account."""
        if wishes := _wishes(request):
            trajectory = self.kvcompress.state(request).trajectory
            own = trajectory.schedule, trajectory.context_tokens
            if own != (self.kvcompress.schedule, None):
                return asked(self._request_schedules.server, wishes)
        return self._request_schedules.server, None

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step and attach the compactions that must run before its forward."""
        output = super().schedule(throttle_prefills)
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            self.kvcompress_accounts.scheduled(request, new.num_computed_tokens)
        if plans := self.kvcompress.take_plans():
            setattr(output, PLANS_ATTRIBUTE, plans)
            if output.new_block_ids_to_zero:
                # Workers zero after they compact: a block that a request preempted in this
                # very step had taken may be written by a plan by now.
                written = {block for plan in plans for block in plan.destinations}
                output.new_block_ids_to_zero = [
                    block for block in output.new_block_ids_to_zero if block not in written
                ]
        if time.monotonic() - self._logged_at >= LOG_INTERVAL:
            self._log_totals()
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Hand out the step's tokens, and note first tokens in the accounts."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.kvcompress_accounts.starting:
            self.kvcompress_accounts.tokens_arrived()
        return outputs

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Put the account into the response if the request asks for it.

        Target: ``kv_transfer_params``, which vLLM's responses carry beside ``usage`` and which
        only KV connectors fill; those are refused. ``usage`` itself is made in the API server.
        """
        kv_transfer, ec_transfer = super()._free_request(request, delay_free_blocks)
        if report := self.kvcompress_accounts.asked_for(request):
            kv_transfer = {**(kv_transfer or {}), CONFIG_KEY: report}
        return kv_transfer, ec_transfer

    def _free_request_blocks(self, request: Request) -> None:
        """Close or restart the account of a request before its blocks go."""
        self.kvcompress_accounts.releasing(request)
        super()._free_request_blocks(request)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk where the request is due. vLLM calls this last, in both paths."""
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens <= 1:  # Decodes: where a chunk has to end is past its start.
            return num_new_tokens
        room = self.kvcompress.stop(request, num_computed_tokens) - num_computed_tokens
        return min(num_new_tokens, room)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """Cut a prefix-cache hit so that it cannot skip past the first compaction."""
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        limit = self.kvcompress.hit_limit(request)
        if hit > limit:
            hit = limit // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, hit)
        return blocks, hit, boundary, diverged

    def shutdown(self) -> None:
        """Log the totals once more, also if nothing was ever compressed."""
        self._logged_compactions = -1
        self._log_totals()
        super().shutdown()

    def _log_totals(self) -> None:
        """Log the totals if they changed, so that a compressor that does nothing is seen."""
        totals = self.kvcompress.totals
        self._logged_at = time.monotonic()
        if totals.compactions == self._logged_compactions:
            return
        self._logged_compactions = totals.compactions
        logger.info(
            "kvcompress: %s compacted %d requests in %d steps per group, removed %d tokens "
            "and freed %d blocks (%d waits for blocks).",
            self._kvcompress_method,
            totals.requests,
            totals.compactions,
            totals.tokens_removed,
            totals.blocks_freed,
            totals.waits,
        )


def _wishes(request: Request) -> dict[str, Any]:
    """Our keys of a request, if any of them says how it is to be compressed."""
    params = request.sampling_params
    keys = own_keys(params.extra_args if params is not None else None)
    return keys if keys.keys() - {REPORT_KEY} else {}


class KVCompressScheduler(KVCompressSchedulerMixin, Scheduler):
    """For synchronous scheduling (the CPU build)."""


class KVCompressAsyncScheduler(KVCompressSchedulerMixin, AsyncScheduler):
    """For asynchronous scheduling (the default on GPUs)."""
