"""What attention sees of a compressed group: rows without holes and shorter lengths.

Target: ``AttentionGroup.build_metadata``. Why there: it knows the group, runs before
manager blocks are split into kernel blocks, and serves both runners and every backend.
Upstream plan: none yet; vLLM would need "holes" as a notion of its block tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils import torch_utils
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_kvcompress.attention.heads import BY_HEADS
from vllm_kvcompress.attention.holes import HoleCounts


class Parts(NamedTuple):
    """Views of a group's buffers for batches of one shape.

    Attributes
    ----------
    shape : tuple of int
        Rows of the batch, columns of its block table, and how many of these matter.
    holes, lengths : torch.Tensor
        ``[rows]``, int32.
    rows, used : torch.Tensor
        ``[rows, columns]``, int32; all columns, and those that matter.
    columns : torch.Tensor
        ``[columns that matter]``, int64, counted from 0.
    """

    shape: tuple[int, int, int]
    holes: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    used: torch.Tensor
    columns: torch.Tensor


class CompressedAttentionGroup(AttentionGroup):
    """An attention group whose block table rows may start with null blocks.

    A row is shifted left by its holes and its length reduced by as many blocks. Causal
    masks are aligned to the end, so the query needs no change; positions stay logical.
    """

    holes: HoleCounts
    by_heads: Mapping[int, Any] = {}
    """Builders for layers that have some of their heads in this group's pages."""

    _last_parts: Parts | None = None

    @classmethod
    def wrap(
        cls, group: AttentionGroup, holes: HoleCounts, max_num_reqs: int, width: int
    ) -> CompressedAttentionGroup:
        """Take the place of vLLM's group object.

        Parameters
        ----------
        group : AttentionGroup
        holes : HoleCounts
        max_num_reqs, width : int
            Rows and columns of the runner's block table.
        """
        wrapped = cls(**{f.name: getattr(group, f.name) for f in fields(group)})
        wrapped.holes = holes
        for builder in wrapped.metadata_builders:
            # It would replace a row without going through build_metadata.
            builder.supports_update_block_table = False
        device = wrapped.metadata_builders[0].device
        wrapped._always = device.type != "cpu"
        wrapped._max_num_reqs = max_num_reqs
        wrapped._columns = torch.arange(width, dtype=torch.int64, device=device)
        # Persistent: CUDA graphs replay these addresses.
        wrapped._holes = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        wrapped._rows = torch.zeros(max_num_reqs, width, dtype=torch.int32, device=device)
        wrapped._lengths = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        return wrapped

    def build_metadata(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        ubatch_idx: int = 0,
        common_prefix_len: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Build the backend's metadata from rows without holes."""
        seen = self._without_holes(common_attn_metadata)
        metadata = super().build_metadata(seen, ubatch_idx, common_prefix_len, **kwargs)
        if self.by_heads:
            parts = {
                heads: builder.build(common_prefix_len, seen, **kwargs)
                for heads, builder in self.by_heads.items()
            }
            setattr(metadata, BY_HEADS, parts)
        return metadata

    def build_metadata_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata, ubatch_idx: int = 0
    ) -> Any:
        """As :meth:`build_metadata`, on the buffers that replays will use."""
        return super().build_metadata_for_cudagraph_capture(
            self._without_holes(common_attn_metadata), ubatch_idx
        )

    def _without_holes(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        num_reqs, width = common.num_reqs, common.block_table_tensor.shape[1]
        holes = self.holes.of_batch(self.kv_cache_group_id, num_reqs, common.req_idx)
        if not self._always and not holes.any():
            return common
        block_size = self.kv_cache_spec.block_size
        # Nothing reads past the longest row: most of a wide table need not be moved.
        used = min(width, cdiv(common.max_seq_len, block_size))
        parts = self._parts(num_reqs, width, used)
        torch_utils.async_tensor_h2d(np.ascontiguousarray(holes), out=parts.holes)

        columns = parts.columns + parts.holes[:, None]
        columns.clamp_(max=width - 1)
        torch.gather(common.block_table_tensor[:num_reqs], 1, columns, out=parts.used)

        # A dummy batch may claim lengths its rows do not have.
        starts = common.query_start_loc
        queries = starts[1 : num_reqs + 1] - starts[:num_reqs]
        torch.sub(common.seq_lens[:num_reqs], parts.holes, alpha=block_size, out=parts.lengths)
        torch.maximum(parts.lengths, queries, out=parts.lengths)

        # As replace() does, which looks at each of some thirty fields.
        seen = copy(common)
        seen.block_table_tensor, seen.seq_lens = parts.rows, parts.lengths
        seen._num_computed_tokens_cache = None
        bound = common.seq_lens_cpu_upper_bound
        if bound is not None:
            first = common.query_start_loc_cpu.numpy()
            shorter = bound[:num_reqs].numpy() - holes * block_size
            seen.seq_lens_cpu_upper_bound = torch.from_numpy(
                np.maximum(shorter, first[1 : num_reqs + 1] - first[:num_reqs])
            )
        return seen

    def _parts(self, num_reqs: int, width: int, used: int) -> Parts:
        """What a batch needs of the buffers; those of the last batch mostly fit the next."""
        shape = (num_reqs, width, used)
        if self._last_parts is None or self._last_parts.shape != shape:
            rows = self._rows[:num_reqs, :width]
            self._last_parts = Parts(
                shape,
                holes=self._holes[:num_reqs],
                lengths=self._lengths[:num_reqs],
                rows=rows,
                used=rows[:, :used],
                columns=self._columns[:used],
            )
        return self._last_parts
