"""Moving or merging the keys and values of a request into fewer blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from vllm.utils import torch_utils

from vllm_kvcompress.methods import MERGING, Method, ScoreContext, select_tokens
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.merger import Contents, Merger


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
class Band:
    """The layers of one compressed KV cache group.

    Attributes
    ----------
    pages : BandPages
    sinks : int
        First tokens of a request that always stay.
    """

    pages: BandPages
    sinks: int


class Compactor:
    """Runs the scheduler's plans on the pages of one worker.

    Parameters
    ----------
    groups : mapping of int to Band
        Compressed groups by KV cache group index.
    methods : mapping of str to Method
        What may rank tokens, by name; a plan says which one does.
    merger : Merger or None
        ``None`` if no request may ask for merging.
    first_head, total_heads : int
        First KV head held by this worker and KV heads of the model.
    """

    def __init__(
        self,
        groups: Mapping[int, Band],
        methods: Mapping[str, Method],
        merger: Merger | None,
        first_head: int,
        total_heads: int,
    ) -> None:
        self.groups = groups
        self.methods = methods
        self.merger = merger
        self.first_head = first_head
        self.total_heads = total_heads
        self.block_size, self.heads, _ = next(iter(groups.values())).pages.shape
        self.totals = CompactionTotals()
        self.on_kept: Callable[[CompactionPlan, int, torch.Tensor], None] | None = None
        """For tests: called with plan, layer and kept indices ``[kv_heads, kept]``."""
        self.on_written: Callable[[CompactionPlan, int, torch.Tensor], None] | None = None
        """For tests: called with plan, layer and raw keys ``[kv_heads, tokens, head_dim]``."""

    @torch.inference_mode()
    def run(self, plans: Sequence[CompactionPlan]) -> None:
        """Run plans in order; a later one may write blocks that an earlier one read."""
        started = time.perf_counter()
        for plan in plans:
            self._run(plan)
            self.totals.compactions += 1
            self.totals.blocks_freed += plan.removed
            self.totals.tokens_removed += plan.removed * self.block_size
        self.totals.seconds += time.perf_counter() - started

    def _run(self, plan: CompactionPlan) -> None:
        band = self.groups[plan.group]
        device = band.pages.device
        # From pinned memory: a copy from pageable memory may wait for the device.
        sources = torch_utils.async_tensor_h2d(plan.sources, device, torch.int64)
        destinations = torch_utils.async_tensor_h2d(plan.destinations, device, torch.int64)
        for pages in band.pages.slices(len(plan.sources)):
            # All reads come before the writes: a destination may be a source.
            if plan.method not in MERGING:
                contents = self._evict(plan, pages, sources, plan.sinks)
            else:
                assert self.merger is not None
                contents = self._merge(plan, pages, sources, plan.sinks)
                self.merger.note(pages, destinations, contents)
            pages.write(destinations, contents.keys, contents.values)
            if self.on_written is not None:
                for layer, keys in zip(pages.layers, contents.keys.split(self.heads), strict=True):
                    self.on_written(plan, layer, keys)

    def _evict(
        self, plan: CompactionPlan, pages: BandPages, sources: torch.Tensor, sinks: int
    ) -> Contents:
        if self.methods[plan.method].needs_keys:
            floats = pages.read_float_keys(sources)
        else:
            floats = pages.no_keys(len(plan.sources))
        kept = self._select(plan, pages, floats, len(plan.destinations), sinks)
        return Contents(pages.take_keys(sources, kept), pages.take_values(sources, kept))

    def _merge(
        self, plan: CompactionPlan, pages: BandPages, sources: torch.Tensor, sinks: int
    ) -> Contents:
        assert self.merger is not None
        pooled = self.merger.read(plan, pages, sources)
        best: list[Contents] = []
        if plan.pooled < len(plan.sources):
            pooled, ranked = pooled.split(plan.pooled * self.block_size)
            blocks = len(plan.destinations) - len(plan.outputs)
            floats = pages.as_float(ranked.keys)
            kept = self._select(plan, pages, floats, blocks, sinks)
            pooled = Contents.join([pooled, ranked.without(kept)])
            best = [ranked.take(kept)]
        return Contents.join([self.merger.merge(plan, pages, pooled), *best])

    def _select(
        self, plan: CompactionPlan, pages: BandPages, floats: torch.Tensor, blocks: int, sinks: int
    ) -> torch.Tensor:
        """Tokens to keep in so many blocks, ``[layers * kv_heads, kept]``."""
        method = self.methods[MERGING.get(plan.method) or plan.method]
        layers = list(pages.layers)
        if method.same_for_all_layers:
            scores = method.score(floats, self._context(plan, layers[0]))
        else:
            parts = zip(layers, floats.split(self.heads), strict=True)
            scores = torch.cat(
                [method.score(part, self._context(plan, layer)) for layer, part in parts]
            )
        kept = select_tokens(scores, blocks * self.block_size, sinks)
        if self.on_kept is not None:
            for layer, own in zip(layers, kept.split(self.heads), strict=True):
                self.on_kept(plan, layer, own)
        return kept

    def _context(self, plan: CompactionPlan, layer: int) -> ScoreContext:
        return ScoreContext(layer, plan.position, self.first_head, self.total_heads)
