"""Moving the kept keys and values of a request into fewer blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from vllm.utils import torch_utils

from vllm_kvcompress.methods import Method, ScoreContext, select_tokens
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.worker.pages import LayerPages, take_tokens


@dataclass
class CompactionTotals:
    """What this worker has done since it started.

    ``seconds`` is time on the host; on a GPU the kernels may still be running.
    """

    compactions: int = 0
    tokens_removed: int = 0
    blocks_freed: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class GroupPages:
    """The layers of one compressed KV cache group.

    Attributes
    ----------
    layers : mapping of int to LayerPages
        Pages by layer index.
    sinks : int
        First tokens of a request that always stay.
    """

    layers: Mapping[int, LayerPages]
    sinks: int


class Compactor:
    """Runs the scheduler's plans on the pages of one worker.

    Parameters
    ----------
    groups : mapping of int to GroupPages
        Compressed groups by KV cache group index.
    method : Method
    block_size : int
        Tokens per block.
    first_head, total_heads : int
        First KV head held by this worker and KV heads of the model.
    """

    def __init__(
        self,
        groups: Mapping[int, GroupPages],
        method: Method,
        block_size: int,
        first_head: int,
        total_heads: int,
    ) -> None:
        self.groups = groups
        self.method = method
        self.block_size = block_size
        self.first_head = first_head
        self.total_heads = total_heads
        self.totals = CompactionTotals()
        self.on_kept: Callable[[CompactionPlan, int, torch.Tensor], None] | None = None
        """For tests: called with plan, layer and kept indices ``[kv_heads, kept]``."""

    @torch.inference_mode()
    def run(self, plans: Sequence[CompactionPlan]) -> None:
        """Run plans in order; a later one may write blocks that an earlier one read."""
        started = time.perf_counter()
        for plan in plans:
            self._run(plan)
            freed = len(plan.sources) - len(plan.destinations)
            self.totals.compactions += 1
            self.totals.blocks_freed += freed
            self.totals.tokens_removed += freed * self.block_size
        self.totals.seconds += time.perf_counter() - started

    def _run(self, plan: CompactionPlan) -> None:
        group = self.groups[plan.group]
        device = next(iter(group.layers.values())).device
        # From pinned memory: a copy from pageable memory may wait for the device.
        sources = torch_utils.async_tensor_h2d(plan.sources, device, torch.int64)
        destinations = torch_utils.async_tensor_h2d(plan.destinations, device, torch.int64)
        keep = len(plan.destinations) * self.block_size
        for layer, pages in group.layers.items():
            keys = pages.keys.read(sources)
            context = ScoreContext(layer, plan.position, self.first_head, self.total_heads)
            floats = pages.as_float(keys) if self.method.needs_keys else keys
            kept = select_tokens(self.method.score(floats, context), keep, group.sinks)
            if self.on_kept is not None:
                self.on_kept(plan, layer, kept)
            # Both reads come before the writes: a destination may be a source.
            values = pages.values.take(sources, kept)
            pages.keys.write(destinations, take_tokens(keys, kept))
            pages.values.write(destinations, values)
