"""The paged cache against the dense float32 oracle, on SmolLM2.

Kept sets must agree per layer and head, greedy tokens must agree, and log-probabilities
must lie within 1e-3 over 64 decoded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from oracle import (
    DenseOracle,
    band_budgets,
    check_logprobs,
    kept_sets_agree,
    untouched_base,
)
from placed_heads import by_head
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_kvcompress.settings import parse_settings

BLOCK = 32
NUM_LAYERS, KV_HEADS = 30, 3

NEAR_TIE = {"knorm": 5e-4, "keydiff": 5e-4, "kvdiff": 5e-4}
"""These methods round their scores to 12 bits; the oracle does not."""


@dataclass
class Case:
    """One engine and what it must show."""

    settings: dict[str, Any]
    compactions: int
    """At least at so many positions."""
    decoded: int = 64
    context: int | None = None
    """Prompt tokens compressed before the others are computed."""


HEADS = "7:2,8:0,14:1,15:2,17:0,17:1,18:2,19:1,20:2,21:2,22:0,22:1,22:2,24:0,24:2"
"""KV heads that keep every token: one, two or all of a layer, in five layers' pages."""

PREFILL_512 = {
    "budget": 512,
    "bands": 6,
    "pyramid_beta": 2.0,
    "phase": "during_prefill",
    "interval": 256,
}

BOOSTED = "0:0,1:0,2:1,2:2,3:1,7:1,9:0,14:0,16:0,18:0,20:1,21:0,21:1,23:0,24:1"
"""KV heads with a larger budget, in other five layers' pages; heads of 7 lie in three kinds."""

CASES = {
    "kvdiff-boost": Case(
        {
            "method": "kvdiff",
            "budget": 96,
            "recent_tokens": 16,
            "recent_ratio": 0.5,
            "interval": 16,
            "skip_heads": HEADS,
            "boost_heads": BOOSTED,
            "boost": 4,
        },
        3,
        decoded=96,
    ),
    "kvdiff-heads": Case(
        {
            "method": "kvdiff",
            "budget": 256,
            "recent_ratio": 0.5,
            "interval": 16,
            "skip_heads": HEADS,
        },
        3,
        decoded=96,
    ),
    "knorm-256-flat": Case({"method": "knorm", "budget": 256, "interval": 16}, 3, decoded=96),
    "knorm-512-pyramid": Case(
        {"method": "knorm", "budget": 512, "bands": 6, "pyramid_beta": 2.0}, 1
    ),
    "keydiff-256-pyramid": Case(
        {
            "method": "keydiff",
            "budget": 256,
            "bands": 6,
            "pyramid_beta": 1.5,
            "interval": 16,
        },
        3,
        decoded=96,
    ),
    "kvdiff-context-ratio": Case(
        {"method": "kvdiff", "keep_ratio": 0.25, "recent_ratio": 0.8, "interval": 32},
        1,
        context=1509,
    ),
    "knorm-512-during-prefill": Case({"method": "knorm", **PREFILL_512}, 3),
    "knorm-context": Case(
        {"method": "knorm", "budget": 96, "recent_tokens": 16, "interval": 32},
        2,
        decoded=150,
        context=1509,
    ),
}

SLOW = {
    "keydiff-boost-context": Case(
        {
            "method": "keydiff",
            "keep_ratio": 0.1,
            "recent_tokens": 16,
            "interval": 32,
            "boost_heads": BOOSTED,
            "skip_layers": [4],
        },
        1,
        decoded=96,
        context=1509,
    ),
    "keydiff-heads-context": Case(
        {
            "method": "keydiff",
            "keep_ratio": 0.15,
            "recent_tokens": 16,
            "interval": 32,
            "skip_heads": HEADS,
            "skip_layers": [0],
        },
        1,
        decoded=96,
        context=1509,
    ),
    "knorm-heads-during-prefill": Case(
        {
            "method": "knorm",
            "budget": 256,
            "phase": "during_prefill",
            "interval": 192,
            "skip_heads": HEADS,
        },
        3,
    ),
    "kvdiff-256-pyramid": Case(
        {"method": "kvdiff", "budget": 256, "bands": 6, "pyramid_beta": 1.5, "interval": 16},
        3,
        decoded=96,
    ),
    "keydiff-512-flat": Case({"method": "keydiff", "budget": 512, "interval": 16}, 3, decoded=96),
    "keydiff-context-during-prefill": Case(
        {
            "method": "keydiff",
            "budget": 160,
            "recent_tokens": 16,
            "bands": 6,
            "pyramid_beta": 2.0,
            "phase": "during_prefill",
            "interval": 256,
        },
        3,
        decoded=400,
        context=1300,
    ),
    "knorm-context-ratio": Case(
        {"method": "knorm", "keep_ratio": 0.25, "recent_tokens": 16, "interval": 32},
        3,
        decoded=200,
        context=1509,
    ),
    "knorm-256-pyramid": Case(
        {"method": "knorm", "budget": 256, "bands": 6, "pyramid_beta": 1.5, "interval": 16},
        3,
        decoded=96,
    ),
    "knorm-512-flat": Case({"method": "knorm", "budget": 512, "interval": 16}, 3, decoded=96),
    "keydiff-512-pyramid": Case(
        {"method": "keydiff", "budget": 512, "bands": 6, "pyramid_beta": 2.0, "interval": 16},
        3,
        decoded=96,
    ),
    "keydiff-512-during-prefill": Case({"method": "keydiff", **PREFILL_512}, 3),
    "keydiff-256-flat": Case({"method": "keydiff", "budget": 256, "interval": 16}, 3, 96),
    "keydiff-256-during-prefill": Case(
        {"method": "keydiff", "budget": 256, "phase": "during_prefill", "interval": 192}, 3
    ),
    "knorm-ratio": Case({"method": "knorm", "keep_ratio": 0.25, "interval": 32}, 1),
    "knorm-skip": Case({"method": "knorm", "budget": 256, "skip_layers": [0, 1]}, 1),
    "streaming": Case({"method": "streaming", "budget": 256, "interval": 16}, 3, 96),
    "random": Case({"method": "random", "budget": 256, "seed": 7}, 1),
    "knorm-decode": Case(
        {"method": "knorm", "budget": 128, "recent_tokens": 16, "interval": 32, "phase": "decode"},
        1,
        decoded=256,
    ),
}


@pytest.fixture(scope="module")
def dense(smollm: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(smollm: Path) -> list[int]:
    """About 1,600 tokens of plain text with a fact in the middle."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    source = Path(torch.__file__).with_name("nn") / "modules" / "transformer.py"
    text = source.read_text()[:9000]
    return tokenizer(text[:4500] + "\nThe pass key is 48213.\n" + text[4500:]).input_ids[:1613]


@pytest.mark.parametrize("name", CASES)
def test_paged_equals_dense(name: str, smollm: Path, dense: Any, prompt: list[int]) -> None:
    check(CASES[name], smollm, dense, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_paged_equals_dense_slow(name: str, smollm: Path, dense: Any, prompt: list[int]) -> None:
    check(SLOW[name], smollm, dense, prompt)


def check(case: Case, model: Path, dense: Any, prompt: list[int]) -> None:
    with engines.engine(model, case.settings) as engine:
        wishes = {"context_tokens": case.context} if case.context else {}
        (found,) = engine.generate([prompt], case.decoded, [wishes])
        kept = engine.kept

    settings = parse_settings(case.settings)
    layers, budgets = band_budgets(settings, NUM_LAYERS, BLOCK, settings.bands or 1)
    oracle = DenseOracle(dense, settings, BLOCK, layers, budgets)
    base = untouched_base(settings, BLOCK, len(prompt))
    if case.context:
        # Positions tell the prompt's last block from generated tokens, once it is full.
        base = -(-len(prompt) // BLOCK) * BLOCK
    live = by_head(live_positions(kept, base, case.context or 0), settings, NUM_LAYERS, KV_HEADS)
    wanted = oracle.run(
        prompt,
        case.decoded,
        forced_tokens=found.tokens,
        forced_kept=live,
        context=case.context,
    )

    expected = [(c.position, layer) for c in wanted.compactions for layer in c.kept]
    assert sorted(expected) == sorted(live)
    assert len({position for position, _ in live}) >= case.compactions
    for compaction in wanted.compactions:
        for layer in compaction.kept:
            assert kept_sets_agree(
                compaction,
                layer,
                live[compaction.position, layer],
                rtol=NEAR_TIE.get(settings.method, 1e-6),
            ), f"layer {layer} after {compaction.position} tokens"
    check_logprobs(wanted, found.logprobs)


def live_positions(
    kept: list[tuple[Any, int, torch.Tensor]], fixed: int, context: int = 0
) -> dict[tuple[int, int], torch.Tensor]:
    """Positions in the cache after each compaction, ``[kv_heads, live]``, by (position, layer).

    Tokens at positions below ``fixed`` are left alone, from the first compaction after
    ``context`` tokens on.
    """
    live: dict[tuple[int, int], torch.Tensor] = {}
    current: dict[int, tuple[int, torch.Tensor]] = {}
    for plan, layer, indices in kept:
        heads = indices.shape[0]
        since, before = current.get(layer, (0, torch.empty(heads, 0, dtype=torch.int64)))
        new = torch.arange(since, plan.position).expand(heads, -1)
        everything = torch.cat([before, new], dim=1)
        base = int((everything[0] < fixed).sum()) if plan.position > context else 0
        end = base + len(plan.sources) * BLOCK
        candidates = everything[:, base:end]
        after = torch.cat(
            [everything[:, :base], candidates.gather(1, indices), everything[:, end:]], dim=1
        )
        current[layer] = plan.position, after
        live[plan.position, layer] = after
    return live
