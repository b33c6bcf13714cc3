"""Contenders by name: what is served in which cache type, and how far it is compressed.

stock                    vLLM without compression
stock-capped             the same with no more requests at once than the pool holds whole
fp8                      stock with an 8-bit KV cache
knorm/8                  a flat budget of an eighth of the request's tokens
knorm@512                a flat budget of 512 tokens
kvdiff-heads/4           kvdiff; fifteen KV heads keep everything, the bundled model's default,
                         and the others so much that the mean is a quarter
kvdiff-skip/4, keydiff-skip/2    three whole layers, and twelve
pyramid/4                on average a quarter, the first layers more
during/4                 flat, and also compressed while the prompt is computed
merge/4                  pooled instead of evicted
knorm+fp8/4              with an 8-bit KV cache
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.harness.engines import BLOCK_SIZE
from vllm_kvcompress.bundled import KV_HEADS, LAYERS, SKIP_HEADS, SKIP_LAYERS
from vllm_kvcompress.settings import parse_settings
from vllm_kvcompress.shares import ALIKE, Shares

PYRAMID_BETA = 4.0
INTERVAL_SHARE = 1 / 16
"""Of what a request may hold: so much it may grow between two compactions, at least a block."""

LEAST_BLOCKS = 5
"""Of a compressed layer: sinks, recent window, what is begun, and room to grow."""

HALF_WHOLE = [0, 2, 7, 8, 15, 17, 18, 19, 20, 21, 22, 23]
"""Layers of the bundled model that are best kept whole where half is removed."""

KINDS: dict[str, dict[str, Any]] = {
    "knorm": {"method": "knorm"},
    "keydiff": {"method": "keydiff"},
    "kvdiff": {"method": "kvdiff"},
    "kvdiff-skip": {"method": "kvdiff", "skip_layers": list(SKIP_LAYERS)},
    "keydiff-skip": {"method": "keydiff", "skip_layers": HALF_WHOLE},
    "kvdiff-heads": {"method": "kvdiff", "skip_heads": SKIP_HEADS},
    "streaming": {"method": "streaming"},
    "pyramid": {"method": "knorm", "pyramid_beta": PYRAMID_BETA, "bands": 6},
    "during": {"method": "knorm", "phase": "during_prefill"},
    "merge": {"method": "merge", "merge_weighting": "none"},
    "knorm+merge": {"method": "knorm+merge", "merge_weighting": "none"},
}
"""Settings of each kind, beside budget and interval."""

STOCK = ("stock", "stock-capped", "fp8")

NAME = re.compile(
    rf"(?P<kind>{'|'.join(map(re.escape, sorted(KINDS, key=len, reverse=True)))})"
    r"(?P<fp8>\+fp8)?(?P<how>[/@])(?P<number>\d+(\.\d+)?)"
)


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes
    ----------
    name : str
    settings : dict or None
        Of compression; ``None`` for stock vLLM.
    cache : str
        vLLM's ``kv_cache_dtype``.
    capped : bool
        Whether no more requests run at once than the pool holds whole.
    """

    name: str
    settings: dict[str, Any] | None = None
    cache: str = "auto"
    capped: bool = False

    @property
    def baseline(self) -> str:
        """Stock contender of the same cache type."""
        return "stock" if self.cache == "auto" else self.cache


def contender(name: str, tokens: int) -> Contender:
    """Make a contender.

    Parameters
    ----------
    name : str
        As above.
    tokens : int
        Prompt and output tokens of a request, which ``/`` divides.
    """
    if name in STOCK:
        cache = "fp8" if name == "fp8" else "auto"
        return Contender(name, cache=cache, capped=name == "stock-capped")
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r} is no contender; allowed are {', '.join(STOCK)} and "
            f"{', '.join(KINDS)}, each with +fp8 or without, then /FACTOR or @BUDGET."
        )
    number, kind = float(found["number"]), KINDS[found["kind"]]
    mean = tokens / number
    shares = Shares.of(parse_settings(kind), LAYERS, KV_HEADS)
    if shares != ALIKE:
        mean = tokens * shares.keep_ratio(1 - 1 / number)
        if found["how"] == "/" and mean < LEAST_BLOCKS * BLOCK_SIZE:
            raise ValueError(f"{name!r} cannot be: what is kept whole alone holds about as much.")
    held = round((mean if found["how"] == "/" else number) / BLOCK_SIZE)
    grown = max(1, round(held * INTERVAL_SHARE))
    budget = max(1, held - grown if found["how"] == "/" else held)
    if "pyramid_beta" in kind:
        # Layers have L0 to L0 / beta; the budget is to be their mean.
        budget = int(budget / ((1 + 1 / PYRAMID_BETA) / 2))
    settings = {**kind, "budget": budget * BLOCK_SIZE, "interval": grown * BLOCK_SIZE}
    return Contender(name, settings, "fp8" if found["fp8"] else "auto")


def with_budgets(names: Iterable[str], budgets: Iterable[int]) -> tuple[str, ...]:
    """Contenders at other budgets: each kind once for every budget, stock ones as they are."""
    budgets = tuple(budgets)
    if not budgets:
        return tuple(names)
    made: dict[str, None] = {}
    for name in names:
        if name in STOCK:
            made[name] = None
        else:
            kind = re.split("[/@]", name)[0]
            made |= dict.fromkeys(f"{kind}@{budget}" for budget in budgets)
    return tuple(made)
