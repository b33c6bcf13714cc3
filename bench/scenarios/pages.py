"""Scenario 5: single compactions against memcpy; what is measured is :mod:`bench.compaction`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.harness.plotting import line_plot
from bench.harness.suite import Case, Options, Results


class Compaction:
    """Time of a compaction of one band, by method, cache type and length of the prompt."""

    name = "compaction"
    title = "Single compactions"

    def cases(self, options: Options) -> list[Case]:
        """One case for each shape of pages."""
        shapes = ("SmolLM2",) if options.effort != "full" else ("SmolLM2", "8B-like")
        return [
            Case(f"{options.effort}, {shape}", {"effort": options.effort, "shape": shape})
            for shape in shapes
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """Measure one shape, on one thread as a compaction has it."""
        import torch

        from bench import compaction
        from bench.harness.machine import machine

        effort = compaction.QUICK if case.parameters["effort"] == "quick" else compaction.FULL
        if case.parameters["effort"] == "short":
            effort = effort._replace(lengths=(512, 2048, 8000), most_runs=5, seconds=0.3)
        torch.set_num_threads(1)
        return {
            "command": f"python -m bench compaction, {case.key}",
            "machine": machine(),
            "threads": torch.get_num_threads(),
            **compaction.bench(effort._replace(shapes=(case.parameters["shape"],))),
        }

    def report(self, results: Results) -> list[str]:
        """The tables of :mod:`bench.compaction`, and how time grows."""
        lines = [
            "`python -m bench.compaction --help` and its source say what is compared. The aim is "
            "three times the `memcpy`; docs/performance.md says, with figures, what keeps a "
            "case above it: scattered pages, bytes that are read but not charged, arithmetic in "
            "fp8, and calls."
        ]
        if not results:
            return lines
        from bench.compaction import markdown

        for row in results.values():
            lines += ["", *markdown(row).splitlines()]
            worst = max(row["growth"], key=lambda growth: growth["per_length"])
            lines += [
                "",
                f"From {worst['tokens'][0]} to {worst['tokens'][1]} tokens, "
                f"{worst['times_longer']:.1f} times as many, what grows fastest takes "
                f"{worst['times_slower']:.1f} times as long ({worst['shape']}, {worst['cache']}, "
                f"{worst['method']}).",
            ]
        return lines

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Compaction time against tokens, one plot for each shape and cache type."""
        kinds: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
        for result in results.values():
            for row in result["compaction"]:
                lines = kinds[f"{row['shape']}, {row['cache']}"]
                point = row["tokens"], 1e3 * row["seconds"]
                lines.setdefault(row["method"], []).append(point)
                copied = row["tokens"], 1e3 * row["memcpy_seconds"]
                if row["method"] == "knorm":
                    lines.setdefault("memcpy of knorm's bytes", []).append(copied)
        return [
            line_plot(
                directory / f"compaction-time-against-tokens-{kind.replace(', ', '-')}.png",
                lines,
                "Tokens of the prompt",
                "Compaction of five layers, ms",
                kind,
                log=True,
            )
            for kind, lines in kinds.items()
        ]
