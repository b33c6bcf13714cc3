"""Scenario 2: how many requests at once, and how long a prompt, a pool serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.contenders import STOCK, contender, with_budgets
from bench.harness.plotting import line_plot
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results

LONGEST = 131_072
"""Prompts are not tried beyond this many tokens."""


class Capacity:
    """Largest batch without preemption, and longest prompt without refusal, by contender."""

    name = "capacity"
    title = "Capacity"

    def cases(self, options: Options) -> list[Case]:
        """One case for each shape and pool, with all contenders."""
        few = ("stock", "knorm/2", "knorm/4", "knorm/8", "pyramid/8", "during/8", "knorm+fp8/8")
        many = (
            *("stock", "fp8", "knorm/2", "knorm/4", "knorm/8", "pyramid/2", "pyramid/4"),
            *("pyramid/8", "during/2", "during/4", "during/8", "merge/2", "merge/4"),
            *("knorm+fp8/4", "knorm+fp8/8"),
        )
        shapes, pools, methods = {
            "quick": (((320, 40),), (2,), ("stock", "knorm/2", "during/2")),
            "short": (((1000, 1000),), (2,), few),
            "full": (((2000, 200), (1000, 1000), (6000, 128)), (2, 4, 8), many),
        }[options.effort]
        methods = with_budgets(options.methods or methods, options.budgets)
        return [
            Case(
                f"{prompt}+{output}, pool of {pool}, {', '.join(methods)}",
                {
                    "prompt_tokens": prompt,
                    "output_tokens": output,
                    "pool": pool,
                    "methods": [method for method in methods if method != "stock-capped"],
                    "model": options.model,
                    "longest": 4096 if options.effort == "quick" else LONGEST,
                },
            )
            for prompt, output in options.shapes or shapes
            for pool in options.pools or pools
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """All contenders of a shape and pool."""
        about = case.parameters
        return {**about, "rows": [capacity(about, method) for method in about["methods"]]}

    def report(self, results: Results) -> list[str]:
        """A table of each shape and pool."""
        lines = [
            "The real scheduler with a simulated worker: no model runs. *Requests at once* all "
            "arrive together, none is preempted and at some time all of them run. *Longest prompt* "
            "is the longest that vLLM starts up for and serves alone with 32 output tokens; "
            f"longer ones than {LONGEST:,} were not tried. *In a crowd* is what happens when more "
            "arrive than fit: most at once, and preemptions."
        ]
        for case in results.values():
            rows = case["rows"]
            lines += ["", f"{_workload(case)}:", ""]
            lines += table(
                ["", "Budget", "Requests at once", "Longest prompt", "In a crowd", "Preemptions"],
                [
                    [
                        f"`{row['method']}`",
                        f"{row['budget'] or ''}",
                        f"{row['requests']}",
                        f"{row['prompt']:,}",
                        f"{row['crowd_peak']} of {row['crowd']}",
                        f"{row['crowd_preemptions']}",
                    ]
                    for row in rows
                ],
            )
        return lines

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Concurrency against budget, a plot for each shape and pool with several budgets."""
        made = []
        for case in results.values():
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in case["rows"]:
                if row["method"] in STOCK:
                    tokens = case["prompt_tokens"] + case["output_tokens"]
                    lines[f"{row['method']} (all tokens)"].append((tokens, row["requests"]))
                else:
                    kind = row["method"].split("/")[0].split("@")[0]
                    lines[kind].append((row["budget"], row["requests"]))
            if max(len(points) for points in lines.values()) > 1:
                shape = f"{case['prompt_tokens']}+{case['output_tokens']}-pool-of-{case['pool']}"
                path = directory / f"concurrency-against-budget-{shape}.png"
                label = "Budget of the first layers, tokens"
                made.append(
                    line_plot(path, lines, label, "Requests at once", _workload(case), log=True)
                )
        return made


def _workload(case: dict[str, Any]) -> str:
    size = case["rows"][0]["kv_bytes"] / (1 << 20)
    shape = f"{case['prompt_tokens']}+{case['output_tokens']} tokens"
    return f"{shape}, pool of {case['pool']} ({size:.0f} MiB)"


def capacity(about: dict[str, Any], method: str) -> dict[str, Any]:
    """What one contender serves; searched by halves, with a new scheduler for every try."""
    from bench.harness.engines import BLOCK_SIZE, Geometry
    from bench.harness.simulated import Refused, serve, simulated_scheduler

    prompt, output = about["prompt_tokens"], about["output_tokens"]
    side = contender(method, prompt + output)
    kv_bytes = Geometry.of(about["model"]).pool_bytes(about["pool"], prompt + output)

    def scheduler(length: int) -> Any:
        return simulated_scheduler(side.settings, kv_bytes, length, about["model"], side.cache)

    def all_at_once(requests: int) -> bool:
        served = serve(scheduler(prompt + output), requests, prompt, output)
        return served.finished == served.peak == requests and not served.preemptions

    def alone(blocks: int) -> bool:
        tokens = blocks * BLOCK_SIZE
        try:
            served = serve(scheduler(tokens + BLOCK_SIZE), 1, tokens, BLOCK_SIZE)
        except Refused:
            return False
        return served.finished == 1 and not served.preemptions

    crowd = 16 * about["pool"]
    # So many requests arrive that some have to wait: what a server does then.
    met = serve(scheduler(prompt + output), crowd, prompt, output, give_up=False)
    return {
        "method": method,
        "settings": side.settings,
        "budget": (side.settings or {}).get("budget"),
        "kv_bytes": kv_bytes,
        "requests": largest(all_at_once, 64 * crowd),
        "prompt": BLOCK_SIZE * largest(alone, about["longest"] // BLOCK_SIZE),
        "crowd": crowd,
        "crowd_peak": met.peak,
        "crowd_preemptions": met.preemptions,
    }


def largest(works: Callable[[int], bool], limit: int) -> int:
    """Largest number up to a limit that works, if what works does so for all smaller ones."""
    low, high = 0, 1
    while high <= limit and works(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if works(middle):
            low = middle
        else:
            high = middle
    return low
