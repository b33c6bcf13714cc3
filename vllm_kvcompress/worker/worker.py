"""vLLM's workers with compaction. Chosen through ``parallel_config.worker_cls``."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.histogram import SECONDS, Histogram
from vllm_kvcompress.worker.runner import adapt


class KVCompressWorkerMixin(Worker):
    """What every worker adds to vLLM's."""

    def init_device(self) -> None:
        """Set up the device, then adapt the runner that this made."""
        super().init_device()
        adapt(self.model_runner, self.use_v2_model_runner)

    def kvcompress_totals(self) -> dict[str, Any]:
        """What this worker has compacted so far; for ``LLM.collective_rpc``.

        Returns
        -------
        dict
            ``compactions``, ``tokens_removed``, ``blocks_freed`` and ``seconds``.
        """
        state = self.model_runner.kvcompress
        return state.compactor.totals.as_dict() if state is not None else {}

    def kvcompress_times(self) -> dict[str, Any]:
        """How long the compactions of a step took on this worker; asked for by the engine.

        Returns
        -------
        dict
            ``bounds`` in seconds, ``counts`` and ``sum`` of a histogram.
        """
        state = self.model_runner.kvcompress
        times: Histogram = state.compactor.times if state is not None else Histogram(SECONDS)
        return times.as_dict()


class KVCompressGPUWorker(KVCompressWorkerMixin, Worker):
    """For CUDA and ROCm."""


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class KVCompressCPUWorker(KVCompressWorkerMixin, CPUWorker):
        """For the CPU build."""
