"""Scenario 2: how many requests at once, and how long a prompt, a pool serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.contenders import STOCK, contender, with_budgets
from bench.plotting import line_plot
from bench.report import table
from bench.suite import Case, Options, Results

LONGEST = 131_072
"""Prompts are not tried beyond this many tokens."""


class Capacity:
    """Largest batch without preemption, and longest prompt without refusal, by contender."""

    name = "capacity"
    title = "Capacity"

    def cases(self, options: Options) -> list[Case]:
        """One case for each shape, pool and contender."""
        all_methods = (
            *("stock", "fp8", "knorm/2", "knorm/4", "knorm/8", "knorm/16"),
            *("pyramid/4", "pyramid/8", "during/4", "during/8", "during/16"),
            *("merge/4", "merge/8", "knorm+fp8/4", "knorm+fp8/8"),
        )
        shapes, pools, methods = {
            "quick": (((320, 40),), (2,), ("stock", "knorm/2", "during/2")),
            "short": (((1000, 1000),), (2,), all_methods),
            "full": (((2000, 200), (1000, 1000), (6000, 128)), (2, 4, 8), all_methods),
        }[options.effort]
        methods = with_budgets(options.methods or methods, options.budgets)
        return [
            Case(
                f"{prompt}+{output}, pool of {pool}, {method}",
                {
                    "prompt_tokens": prompt,
                    "output_tokens": output,
                    "pool": pool,
                    "method": method,
                    "model": options.model,
                    "longest": 4096 if options.effort == "quick" else LONGEST,
                },
            )
            for prompt, output in options.shapes or shapes
            for pool in options.pools or pools
            for method in methods
            if method != "stock-capped"
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """Search by halves, with a new scheduler for every try."""
        from bench.engines import BLOCK_SIZE, Geometry
        from bench.simulated import Refused, serve, simulated_scheduler

        about = case.parameters
        prompt, output = about["prompt_tokens"], about["output_tokens"]
        side = contender(about["method"], prompt + output)
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

        # So many requests arrive that some have to wait: what a server does then.
        crowd = serve(scheduler(prompt + output), 16 * about["pool"], prompt, output, give_up=False)
        return {
            **about,
            "settings": side.settings,
            "budget": (side.settings or {}).get("budget"),
            "kv_bytes": kv_bytes,
            "requests": largest(all_at_once, 16 * 64 * about["pool"]),
            "prompt": BLOCK_SIZE * largest(alone, about["longest"] // BLOCK_SIZE),
            "crowd": 16 * about["pool"],
            "crowd_peak": crowd.peak,
            "crowd_preemptions": crowd.preemptions,
        }

    def report(self, results: Results) -> list[str]:
        """A table of each shape and pool."""
        lines = [
            "The real scheduler with a simulated worker: no model runs. *Requests at once* all "
            "arrive together, none is preempted and at some time all of them run. *Longest prompt* "
            "is the longest that vLLM starts up for and serves alone with 32 output tokens; "
            f"longer ones than {LONGEST:,} were not tried. *In a crowd* is what happens when more "
            "arrive than fit: most at once, and preemptions."
        ]
        for (prompt, output, pool), rows in self._groups(results).items():
            size = rows[0]["kv_bytes"] / (1 << 20)
            lines += ["", f"{prompt}+{output}, pool of {pool} ({size:.0f} MiB):", ""]
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
        for (prompt, output, pool), rows in self._groups(results).items():
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in rows:
                if row["method"] in STOCK:
                    point = prompt + output, row["requests"]
                    lines[f"{row['method']} (all tokens)"].append(point)
                else:
                    kind = row["method"].split("/")[0].split("@")[0]
                    lines[kind].append((row["budget"], row["requests"]))
            if max(len(points) for points in lines.values()) < 2:
                continue
            path = directory / f"concurrency-against-budget-{prompt}+{output}-pool-of-{pool}.png"
            title = f"{prompt}+{output} tokens, {rows[0]['kv_bytes'] / (1 << 20):.0f} MiB"
            made.append(
                line_plot(path, lines, "Budget, tokens", "Requests at once", title, log=True)
            )
        return made

    def _groups(self, results: Results) -> dict[tuple[int, int, int], list[dict[str, Any]]]:
        groups: dict[tuple[int, int, int], list[dict[str, Any]]] = defaultdict(list)
        for row in results.values():
            groups[row["prompt_tokens"], row["output_tokens"], row["pool"]].append(row)
        return groups


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
