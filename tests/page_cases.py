"""What tests of kernels, on the CPU and on GPUs, have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_kvcompress.levels import plan_merges
from vllm_kvcompress.scheduler.plan import CompactionPlan

TYPES = {
    "float32": (torch.float32, "auto"),
    "bfloat16": (torch.bfloat16, "auto"),
    "float16": (torch.float16, "auto"),
    "fp8_e4m3": (torch.uint8, "fp8"),
    "fp8_e5m2": (torch.uint8, "fp8_e5m2"),
}
"""Type of a cache in memory and its name in vLLM."""


def ranked_plan(destinations: Sequence[int]) -> CompactionPlan:
    """Of seven blocks two merge whole, one is kept of the others: six merge into three."""
    merges = plan_merges([6], 3)
    return CompactionPlan(
        request_id="",
        group=0,
        position=900,
        sources=[4, 7, 1, 9, 5, 6, 8],
        destinations=list(destinations),
        row_start=0,
        row_ids=[],
        holes=0,
        removed=3,
        method="knorm+merge",
        sinks=3,
        pooled=2,
        rounds=merges.rounds,
        outputs=merges.order,
        exact=3,
        end=900,
    )
