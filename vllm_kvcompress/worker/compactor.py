"""Moving or merging the keys and values of a request into fewer blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from vllm_kvcompress.histogram import SECONDS, Histogram
from vllm_kvcompress.methods import MERGING, Method, NormMethod, ScoreContext
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.worker.band import BandPages, tensor_of
from vllm_kvcompress.worker.merger import Merger


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


class Compactor:
    """Runs the scheduler's plans on the pages of one worker.

    Parameters
    ----------
    groups : mapping of int to BandPages
        Pages of the compressed groups, by KV cache group index.
    methods : mapping of str to Method
        What may rank tokens, by name; a plan says which one does.
    merger : Merger or None
        ``None`` if no request may ask for merging.
    first_head, total_heads : int
        First KV head held by this worker and KV heads of the model.
    """

    def __init__(
        self,
        groups: Mapping[int, BandPages],
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
        self.block_size, self.heads, _ = next(iter(groups.values())).shape
        self.totals = CompactionTotals()
        self.times = Histogram(SECONDS)
        """Seconds on the host for all plans of a step."""
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
        took = time.perf_counter() - started
        self.totals.seconds += took
        self.times.observe(took)

    def _run(self, plan: CompactionPlan) -> None:
        pages = self.groups[plan.group]
        ranking = MERGING.get(plan.method, plan.method)
        if ranking is None:
            assert self.merger is not None
            pages.merge(
                plan.sources,
                plan.rounds,
                plan.outputs,
                plan.destinations,
                self.merger.pooling,
                self.merger.rotation,
            )
        else:
            method = self.methods[ranking]
            sources = tensor_of(plan.sources, pages.device)
            destinations = tensor_of(plan.destinations, pages.device)
            if plan.method in MERGING:
                self._rank_and_merge(plan, method, sources, destinations)
            else:
                kept = self._select(plan, method, pages, sources, len(plan.destinations))
                pages.move(sources, kept, destinations)
        if self.on_written is not None:
            written = pages.read_keys(tensor_of(plan.destinations, pages.device))
            for layer, keys in zip(pages.layers, written.split(self.heads), strict=True):
                self.on_written(plan, layer, keys)

    def _rank_and_merge(
        self,
        plan: CompactionPlan,
        method: Method,
        sources: torch.Tensor,
        destinations: torch.Tensor,
    ) -> None:
        assert self.merger is not None
        blocks = len(plan.destinations) - len(plan.outputs)
        for pages in self.groups[plan.group].slices(len(plan.sources)):
            slots = self.merger.read(plan, pages, sources)
            ranked = sources[plan.pooled :]
            kept = self._select(plan, method, pages, ranked, blocks)
            keys, values, centres = self.merger.pool(plan, pages, slots, kept)
            # What is kept moves as it is, and first: outputs may go to where it was.
            pooled = len(plan.outputs)
            pages.move(ranked, kept, destinations[pooled:])
            pages.write(destinations[:pooled], keys, values)
            self.merger.note(pages, destinations, centres)

    def _select(
        self,
        plan: CompactionPlan,
        method: Method,
        pages: BandPages,
        sources: torch.Tensor,
        blocks: int,
    ) -> torch.Tensor:
        """Tokens of the sources to keep in so many blocks, ``[layers * kv_heads, kept]``."""
        scores = self._score(plan, method, pages, sources)
        kept = pages.select(scores, blocks * self.block_size, plan.sinks)
        if self.on_kept is not None:
            for layer, own in zip(pages.layers, kept.split(self.heads), strict=True):
                self.on_kept(plan, layer, own)
        return kept

    def _score(
        self, plan: CompactionPlan, method: Method, pages: BandPages, sources: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(method, NormMethod):
            return method.score_norms(pages.squared_norms(sources))
        scores = []
        for part in pages.slices(len(sources)):
            layers = list(part.layers)
            if method.needs_values:
                assert method.same_for_all_layers, "no method needs values and tells layers apart"
                keys, values = part.read_slots(sources)
                scores.append(method.score(keys, self._context(plan, layers[0]), values))
                continue
            keys = (
                part.read_float_keys(sources) if method.needs_keys else part.no_keys(len(sources))
            )
            if method.same_for_all_layers:
                scores.append(method.score(keys, self._context(plan, layers[0])))
                continue
            for layer, own in zip(layers, keys.split(self.heads), strict=True):
                scores.append(method.score(own, self._context(plan, layer)))
        return torch.cat(scores)

    def _context(self, plan: CompactionPlan, layer: int) -> ScoreContext:
        return ScoreContext(layer, plan.position, self.first_head, self.total_heads)
