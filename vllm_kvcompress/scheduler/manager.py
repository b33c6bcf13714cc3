"""The KV cache manager of compressed groups: vLLM's own, with compaction before allocation."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_kvcompress.scheduler.planner import Planner


class CompressedAttentionManager(FullAttentionManager):
    """Full attention blocks of one group, some of them replaced by fewer compact ones.

    A block list keeps its logical length: removed blocks become null blocks at its start,
    so vLLM's arithmetic on lengths and slots stays right.
    """

    planner: Planner | None = None

    def bind(self, planner: Planner) -> None:
        """Connect the manager to the engine's planner; until then it is a stock manager."""
        self.planner = planner

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Compact the request if it is due.

        vLLM calls this before every allocation, our coordinator where something is due.
        ``processed_computed_tokens`` lags under async scheduling; the planner uses the
        request's own count, which decides the same on every scheduler.
        """
        if self.planner is not None and (row := self.req_to_blocks.get(request_id)):
            self.planner.compact(self.kv_cache_group_id, request_id, row)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks to take from the pool.

        A request is admitted by the most it will hold at once, not by its length.
        """
        if apply_admission_cap and self.planner is not None:
            state = self.planner.state(self.planner.requests[request_id])
            peak = state.trajectory.peak_blocks(self.kv_cache_group_id, num_tokens)
            num_tokens = min(num_tokens, peak * self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=False,
            prefill_end=prefill_end,
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request and return its blocks; a preempted request starts anew."""
        if self.planner is not None:
            self.planner.drop(request_id)
        return super().pop_blocks_for_free(request_id)
