"""Which layers can be compressed together: greedily, the cheapest first.

    python -m bench.layers --rows layers.jsonl                # resumes where it stopped
    python -m bench.layers --table layers.jsonl               # Markdown of what is there

The strict protocol of :mod:`bench.methods`: dense, without a server, with answers fed. It begins
with the whole cache. In each step one more layer is compressed, the one which, beside those
compressed already, costs the least log-probability of the answers (mean over tasks, nats per
token). What is left whole at any point are the layers to skip. Steps are lazy: a layer's cost
mostly grows with those that are compressed already, so layers are measured again, the cheapest
first, until one stays the cheapest, at most ``TRIES`` of them.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.methods import LEFT_OUT, Told, evaluate, told
from bench.quality.tasks import TASKS, prompt_ids
from bench.rows import add_rows, chosen, known_rows, read_rows, search_parser
from vllm_kvcompress.bundled import model_directory
from vllm_kvcompress.check.__main__ import load
from vllm_kvcompress.check.attention import own_attention
from vllm_kvcompress.check.dense import Context, Shape, compress, compute
from vllm_kvcompress.methods import METHODS

TRIES = 6
USUAL = tuple(task for task in TASKS if task not in (*LEFT_OUT, "vt_1", "niah_single_1"))


@dataclass(frozen=True)
class Item:
    """A case, whole and with every layer compressed.

    Attributes
    ----------
    task : str
    whole, small : Context
    fed : Told
    full : float
        Log-probability of the answers with the full cache, nats per token.
    """

    task: str
    whole: Context
    small: Context
    fed: Told
    full: float

    def mixed(self, compressed: frozenset[int]) -> Context:
        """The cache with these layers compressed."""
        sides = [
            self.small if layer in compressed else self.whole
            for layer in range(len(self.whole.keys))
        ]
        return Context(
            tuple(side.keys[layer] for layer, side in enumerate(sides)),
            tuple(side.values[layer] for layer, side in enumerate(sides)),
        )


def make_items(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[Item]:
    """Cases that the model answers at all with its full cache, computed and compressed."""
    shape, method = Shape.usual(args.recent_ratio), METHODS[args.method]()
    items = []
    for task in args.tasks:
        for case in TASKS[task].cases(args.count, args.tokens, tokenizer, args.seed):
            prompt = prompt_ids(case, tokenizer)
            fed = told(case, prompt.question, tokenizer)
            whole = compute(model, prompt.context)
            keep = max(round(args.keep * whole.tokens), shape.sinks + shape.recent)
            small = compress(whole, method, [keep] * len(whole.keys), shape)
            score, full = next(evaluate(model, [whole], whole.tokens, fed))
            # Free text is hardly ever repeated to the letter, yet its tokens tell.
            if score or task in ("lm", "needle"):
                items.append(Item(task, whole, small, fed, full))
        print(f"{task}: {sum(item.task == task for item in items)} cases", file=sys.stderr)
    return items


def losses(model: Any, items: Sequence[Item], compressed: frozenset[int]) -> dict[str, float]:
    """By task, mean loss of log-probability with these layers compressed, nats per token."""
    found: dict[str, list[float]] = defaultdict(list)
    for item in items:
        mixed = item.mixed(compressed)
        _, logprob = next(evaluate(model, [mixed], item.whole.tokens, item.fed))
        found[item.task].append(item.full - logprob)
    return {task: fmean(lost) for task, lost in found.items()}


def next_layer(
    costs: Mapping[int, float], measure: Callable[[int], float], tries: int
) -> tuple[int, dict[int, float]]:
    """The layer that costs least beside those compressed already.

    Parameters
    ----------
    costs : mapping of int to float
        What each layer left cost when it was last measured: mostly less than it costs now.
    measure : callable
        What a layer costs now.
    tries : int
        Most layers to measure.

    Returns
    -------
    int
        Of the layers measured now, the cheapest.
    dict of int to float
        Costs, those measured now among them.
    """
    costs = dict(costs)
    fresh: dict[int, float] = {}
    while len(fresh) < min(tries, len(costs)):
        cheapest = min(costs, key=lambda layer: (costs[layer], layer))
        if cheapest in fresh:
            break
        costs[cheapest] = fresh[cheapest] = measure(cheapest)
    return min(fresh, key=lambda layer: (fresh[layer], layer)), costs


def run(model: Any, items: Sequence[Item], rows: Sequence[Mapping[str, Any]], least: int) -> Any:
    """Rows of all steps that are not known yet: first each layer alone, then the greedy steps."""
    if not items:
        raise ValueError("the model answers none of these cases with its full cache")
    layers = len(items[0].whole.keys)
    alone = {row["layer"]: row["mean"] for row in rows if row["step"] == 0}
    for layer in range(layers):
        if layer not in alone:
            lost = losses(model, items, frozenset({layer}))
            alone[layer] = fmean(lost.values())
            yield {"step": 0, "layer": layer, "mean": alone[layer], "tasks": lost}
    steps = sorted((row for row in rows if row["step"]), key=lambda row: row["step"])
    compressed = frozenset(row["layer"] for row in steps)
    mean = steps[-1]["mean"] if steps else 0.0
    costs = {int(layer): cost for layer, cost in steps[-1]["costs"].items()} if steps else alone
    while len(costs) > least:

        def measure(layer: int, beside: frozenset[int] = compressed, now: float = mean) -> float:
            return fmean(losses(model, items, beside | {layer}).values()) - now

        layer, costs = next_layer(costs, measure, TRIES)
        del costs[layer]
        compressed |= {layer}
        lost = losses(model, items, compressed)
        mean = fmean(lost.values())
        yield {
            "step": len(compressed),
            "layer": layer,
            "mean": mean,
            "tasks": lost,
            "costs": costs,
        }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Layers that are left whole and what compressing the others costs, in nats."""
    alone = sorted((row for row in rows if not row["step"]), key=lambda row: -row["mean"])
    steps = sorted((row for row in rows if row["step"]), key=lambda row: row["step"])
    tasks = list(alone[0]["tasks"])
    worst = ", ".join(f"{row['layer']} ({row['mean']:.3f})" for row in alone[:12])
    of = rows[0].get("of", {})
    lines = [
        ", ".join(f"{name}: {value}" for name, value in of.items()) + ".",
        "",
        f"Each layer compressed alone costs, nats per answer token: {worst}, ...",
        "",
        "| Whole | Layers left whole | Lost, nats | " + " | ".join(f"`{t}`" for t in tasks) + " |",
        "|---" * (3 + len(tasks)) + "|",
    ]
    left = {row["layer"] for row in alone}
    for row in steps:
        left.remove(row["layer"])
        cells = [f"{row['tasks'][task]:.3f}" for task in tasks]
        lines.append(
            f"| {len(left)} | {', '.join(map(str, sorted(left)))} | {row['mean']:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, or print a table."""
    doc = __doc__ or ""
    parser = search_parser("python -m bench.layers", doc, USUAL, count=3, seed=1200)
    parser.add_argument("--least", type=int, default=3, help="stop with so many layers whole")
    args = parser.parse_args(arguments)
    if args.table:
        print(table(read_rows(args.table)))
        return 0
    of = chosen(args)
    known = known_rows(parser, args, of)
    model, tokenizer = load(str(args.model or model_directory()), "float32", "cpu")
    with own_attention(model):
        items = make_items(model, tokenizer, args)
        rows = run(model, items, known, args.least)
        add_rows(args.rows, rows, of, "step {step}: layer {layer}, {mean:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
