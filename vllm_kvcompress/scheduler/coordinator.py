"""What concerns all KV cache groups of a request at once, decided once.

Target: the ``KVCacheCoordinator``, which asks the manager of every group, four times per request
and step. Why: with a group per band that is most of a step's time, and all groups agree: they are
full attention in blocks of one size, and a compacted row keeps its length, so that their rows are
equally long. So the first group answers for all, and the others are asked only where something
changes. How: :func:`adapt` gives the coordinator object a subclass of its own class. Upstream plan:
none yet; equal groups could share their arithmetic in vLLM as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_kvcompress.scheduler.manager import CompressedAttentionManager
from vllm_kvcompress.scheduler.planner import Planner
from vllm_kvcompress.settings import SettingsError


class CompressedCoordinator(KVCacheCoordinator):
    """Mixin for vLLM's coordinators, over managers of compressed groups."""

    planner: Planner
    nothing: tuple[Sequence[KVCacheBlock], ...]
    _first: CompressedAttentionManager

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Compact in every group, if the request is due at all."""
        if self.planner.is_due(request_id):
            super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks to take from the pool; more than it has while a compaction waits for some.

        A request is admitted only beside what compressed requests will yet take before they
        give blocks back.
        """
        first, planner = self._first, self.planner
        if planner.is_due(request_id):
            return self.block_pool.num_gpu_blocks
        row = first.req_to_blocks.get(request_id)
        if row and not apply_admission_cap:
            missing = -(-num_tokens // first.block_size) - len(row)
            return missing * len(self.single_type_managers) if missing > 0 else 0
        blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            num_encoder_tokens,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        if apply_admission_cap:
            blocks += planner.promised(request_id, first.req_to_blocks)
        return blocks

    def allocate_new_blocks(
        self,
        request_id: str,
        num_tokens: int,
        num_tokens_main_model: int,
        num_encoder_tokens: int = 0,
    ) -> tuple[Sequence[KVCacheBlock], ...]:
        """Take new blocks in every group, if the last ones are full.

        All at once, which gives every group the blocks that it would have got by itself.
        """
        first, managers = self._first, self.single_type_managers
        missing = -(-num_tokens // first.block_size) - len(first.req_to_blocks[request_id])
        if missing <= 0:
            return self.nothing
        taken = self.block_pool.get_new_blocks(missing * len(managers))
        parts = tuple(taken[start : start + missing] for start in range(0, len(taken), missing))
        for manager, part in zip(managers, parts, strict=True):
            manager.req_to_blocks[request_id].extend(part)
        if first.records_new_block_ids:
            first.new_block_ids.extend([block.block_id for block in taken])
        return parts

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Hash new full blocks, unless they were computed with a compressed past.

        One place for all groups, compressed or not: past a request's first compaction that is
        so in every layer.
        """
        first, pool, request_id = self._first, self.block_pool, request.request_id
        if not first.enable_caching or self.planner.started(request_id):
            return
        size = first.block_size
        if size != pool.hash_block_size:  # Then vLLM also hashes the prompt's last, partial block.
            super().cache_blocks(request, num_computed_tokens)
            return
        known, full = first.num_cached_block.get(request_id, 0), num_computed_tokens // size
        if full <= known:
            return
        for group, manager in enumerate(self.single_type_managers):
            row = manager.req_to_blocks[request_id]
            pool.cache_full_blocks(request, row, known, full, size, group)
            manager.num_cached_block[request_id] = full


class NoBlocks(KVCacheBlocks):
    """What a request takes in most steps: nothing, in every group."""

    def get_block_ids(
        self, allow_none: bool = False, *, group_ids: Sequence[int] | None = None
    ) -> tuple[list[int], ...] | None:
        """As vLLM's, without looking into every group."""
        if allow_none and group_ids is None:
            return None
        return super().get_block_ids(allow_none, group_ids=group_ids)


def adapt(manager: Any, planner: Planner) -> None:
    """Give a ``KVCacheManager`` our coordinator, and the managers of its groups the planner."""
    coordinator = manager.coordinator
    groups = coordinator.single_type_managers
    sizes = {group.block_size for group in groups}
    kinds = {type(group) for group in groups} - {CompressedAttentionManager}
    if kinds or len(sizes) > 1:  # The worker refuses such layers before vLLM makes groups of them.
        raise SettingsError(
            "kvcompress: vLLM made KV cache groups that cannot be compressed together: block sizes "
            f"{sorted(sizes)}, managed by {sorted(type(group).__name__ for group in groups)}."
        )
    for group in groups:
        group.bind(planner)
    cls = type(coordinator)
    coordinator.__class__ = type(f"Compressed{cls.__name__}", (CompressedCoordinator, cls), {})
    coordinator.planner, coordinator._first = planner, groups[0]
    manager.empty_kv_cache_blocks = NoBlocks(manager.empty_kv_cache_blocks.blocks)
    coordinator.nothing = manager.empty_kv_cache_blocks.blocks
