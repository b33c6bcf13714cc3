"""``knorm+merge`` in the paged cache against the dense oracle of ``merge_oracle.py``, on SmolLM2.

Norms are compared rounded to 12 bits by the plugin, so the oracle follows the engine's choices
after checking that each is as good as its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import pytest
import test_merge_oracle
import torch
from merge_oracle import DenseMergeOracle, choices_agree, ranking_agrees
from oracle import band_budgets, check_logprobs
from test_merge_oracle import BLOCK, NUM_LAYERS, OFTEN, PREFILL, Case, Held, check_plans, same

from vllm_kvcompress.settings import parse_settings

NEAR_TIE = 5e-4

FLAT = {"budget": 768}
SIX = {"budget": 768, "bands": 6}

CASES = {
    "mean-count-flat": Case({**FLAT, **OFTEN, "pooling": "mean"}, 3, 3, 96),
    "best-none-during-prefill": Case(
        {**SIX, **PREFILL, "pooling": "best", "merge_weighting": "none"}, 5, 3
    ),
}

SLOW = {
    "mean-none-six": Case({**SIX, **OFTEN, "merge_weighting": "none"}, 3, 3, 96),
    "mean-count-during-prefill": Case({**SIX, **PREFILL, "pooling": "mean"}, 5, 3),
    "mean-count-pyramid": Case(
        {"budget": 1024, "bands": 6, "pyramid_beta": 2.0, **OFTEN}, 3, 2, 96
    ),
    # 29 blocks, of which a quarter is more than the 6 for all powers of two.
    "mean-count-quarter": Case({"budget": 1024, **OFTEN}, 3, 2, 96),
    "mean-count-ratio": Case({"keep_ratio": 0.4, "recent_ratio": 0.3, **OFTEN}, 3, 4, 192),
    "mean-count-skip": Case({**FLAT, "skip_layers": [0, 1]}, 1, 3),
    "mean-count-many-sinks": Case({**FLAT, **OFTEN, "sink_tokens": 70}, 3, 3, 96),
    # 36 blocks, of which a quarter pooled would leave 27 for 28 blocks of sinks.
    "mean-count-mostly-sinks": Case(
        {"budget": 1216, "recent_tokens": 32, "sink_tokens": 890, **OFTEN}, 3, 2, 96
    ),
    "mean-count-decode": Case(
        {"budget": 384, "recent_tokens": 16, "interval": 16, "phase": "decode"}, 3, 1, 512
    ),
    "best-count-flat": Case({**FLAT, **OFTEN, "pooling": "best"}, 3, 3, 96),
    "max-count-six": Case({**SIX, **OFTEN, "pooling": "max"}, 3, 3, 96),
    "max-none-during-prefill": Case(
        {**FLAT, **PREFILL, "pooling": "max", "merge_weighting": "none"}, 5, 3
    ),
}

dense = test_merge_oracle.dense
prompt = test_merge_oracle.prompt


@pytest.mark.parametrize("name", CASES)
def test_paged_equals_dense(name: str, smollm: Path, dense: Any, prompt: list[int]) -> None:
    check(CASES[name], smollm, dense, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_paged_equals_dense_slow(name: str, smollm: Path, dense: Any, prompt: list[int]) -> None:
    check(SLOW[name], smollm, dense, prompt)


def check(case: Case, model: Path, dense: Any, prompt: list[int]) -> None:
    chosen = {"method": "knorm+merge", **case.settings}
    with engines.engine(model, chosen) as engine:
        held = HeldBesideRanked(engine)
        (found,) = engine.generate([prompt], case.decoded)
        (totals,) = engine.llm.collective_rpc("kvcompress_totals")
        groups = len(engine.runner.kvcompress.compactor.groups)
        kept = {(plan.position, layer): indices for plan, layer, indices in engine.kept}

    settings = parse_settings(chosen)
    layers, budgets = band_budgets(settings, NUM_LAYERS, BLOCK, settings.bands or 1)
    oracle = DenseMergeOracle(dense, settings, BLOCK, layers, budgets)
    choice = held.live if settings.pooling == "best" else None
    wanted = oracle.run(
        prompt, case.decoded, forced_tokens=found.tokens, forced_kept=kept, forced_choice=choice
    )

    expected = check_plans(case, wanted, totals["blocks_freed"], groups / len(layers))
    assert expected == set(kept) == set(held.live)
    for compaction in wanted.compactions:
        for layer in compaction.layers:
            at = compaction.position, layer
            where = f"layer {layer} after {compaction.position} tokens"
            assert ranking_agrees(compaction, layer, kept[at], NEAR_TIE), where
            slots = held.live[at]
            assert slots.shape[1] == compaction.slots
            alone = [block.shape[2] == 1 for block in compaction.members[layer]]
            parts = zip(compaction.members[layer], slots.split(BLOCK, dim=1), alone, strict=True)
            # Slots of single tokens are where the oracle has them.
            assert all(torch.equal(own[..., 0], part) for own, part, single in parts if single)
            if choice is not None:
                assert choices_agree(compaction, layer, slots, NEAR_TIE), where
    check_logprobs(wanted, found.logprobs)


class HeldBesideRanked(Held):
    """As :class:`~test_merge_oracle.Held`; tokens that are ranked are followed exactly."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._kept = engine.kept

    def _follow(self, plan: Any) -> None:
        pages = self._runner.kvcompress.compactor.groups[plan.group]
        keys = pages.read_keys(torch.tensor(plan.sources))
        self._run(plan)
        made = pages.read_keys(torch.tensor(plan.destinations))
        self._learn_row(plan, pages)
        heads, first = pages.shape[1], plan.pooled * BLOCK
        ranking = {layer: kept for other, layer, kept in self._kept if other is plan}
        for index, layer in enumerate(pages.layers):
            rows = slice(index * heads, (index + 1) * heads)
            sources = torch.cat([self._blocks[plan.group, layer, b] for b in plan.sources], dim=1)
            pooled, ranked = sources.tensor_split([first], dim=1)
            lost = torch.ones_like(ranked, dtype=torch.bool).scatter_(1, ranking[layer], False)
            before = torch.cat([pooled, ranked[lost].view(heads, -1)], dim=1)
            left = keys[rows, first:][lost].view(heads, -1, keys.shape[2])
            slots = torch.cat([keys[rows, :first], left], dim=1)
            leaves = output_slots(plan, slots.shape[1] // BLOCK)
            after = [
                before[:, slot].gather(1, same(slots[:, slot], made[rows, i]))
                for i, slot in enumerate(leaves)
            ]
            after = torch.cat([*after, ranked.gather(1, ranking[layer])], dim=1)
            for block in plan.sources:
                del self._blocks[plan.group, layer, block]
            for block, part in zip(plan.destinations, after.split(BLOCK, dim=1), strict=True):
                self._blocks[plan.group, layer, block] = part


def output_slots(plan: Any, blocks: int) -> list[torch.Tensor]:
    """For each pooled slot that a plan writes, the slots that it pools, oldest first.

    Those are the slots of so many blocks: pooled sources, then what ranking left over.
    """
    made = [[[number * BLOCK + slot] for slot in range(BLOCK)] for number in range(blocks)]
    for _, older, newer in plan.rounds:
        for first, second in zip(older, newer, strict=True):
            slots = made[first] + made[second]
            made.append([a + b for a, b in zip(slots[::2], slots[1::2], strict=True)])
    return [torch.tensor(slot) for number in plan.outputs for slot in made[number]]
