"""Scenario 3: time per output token as the context grows, stock against compressed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.harness.contenders import contender, with_budgets
from bench.harness.plotting import line_plot
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results, Target, ratio_text, target_lines

BATCH = 8
TARGETED = (8000, "knorm@1024")


class Latency:
    """Decoding steps of a batch at a given context, each contender beside stock vLLM."""

    name = "latency"
    title = "Latency at long context"

    def cases(self, options: Options) -> list[Case]:
        """One case for each context and contender; it has the stock engine in it."""
        contexts, methods, output, repeats = {
            "quick": ((192,), ("knorm@128",), 40, 1),
            "short": ((2000, 8000), ("knorm@1024",), 130, 1),
            "full": (
                (512, 1000, 2000, 4000, 8000),
                ("knorm@1024", "knorm@512", "pyramid@1024", "merge@1024", "knorm+fp8@1024"),
                258,
                3,
            ),
        }[options.effort]
        methods = with_budgets(options.methods or methods, options.budgets)
        shapes = options.shapes or tuple((context, output) for context in contexts)
        return [
            Case(
                f"{prompt}+{tokens}, batch of {BATCH}, {method}",
                {
                    "prompt_tokens": prompt,
                    "output_tokens": tokens,
                    "batch": BATCH,
                    "method": method,
                    "repeats": options.repeats or repeats,
                    "model": options.model,
                },
            )
            for prompt, tokens in shapes
            for method in methods
            if contender(method, prompt).settings
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """Both engines in turn, on pages of random numbers instead of computed prompts."""
        from bench.harness.engines import BLOCK_SIZE, Geometry, make_engine, make_prompts
        from bench.harness.pairing import in_turn
        from bench.harness.prefilled import prefilled

        about = case.parameters
        prompt, output, batch = (about[k] for k in ("prompt_tokens", "output_tokens", "batch"))
        side = contender(about["method"], prompt)
        tokens = prompt + output
        geometry = Geometry.of(about["model"])
        engines = {
            name: make_engine(
                settings,
                geometry.pool_bytes(batch + 1, tokens),
                model=about["model"],
                kv_cache_dtype=side.cache,
                max_model_len=tokens + BLOCK_SIZE,
                # One step for each prompt.
                max_num_batched_tokens=max(2048, prompt + batch),
            )
            for name, settings in (("stock", None), ("own", side.settings))
        }
        prompts = make_prompts(batch, prompt)
        for engine in engines.values():
            prefilled(engine, batch)
        in_turn(engines, make_prompts(batch, 64), 8)
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(about["repeats"]):
            courses = in_turn(engines, prompts, output)
            for name, course in courses.items():
                found[f"{name}_tpot"].append(course.mean_step)
                found[f"{name}_step"].append(course.step)
        (totals,) = engines["own"].collective_rpc("kvcompress_totals")
        return {
            **about,
            "settings": side.settings,
            "baseline": side.baseline,
            **found,
            "tpot_ratios": [
                own / stock
                for own, stock in zip(found["own_tpot"], found["stock_tpot"], strict=True)
            ],
            "compactions": totals["compactions"],
        }

    def report(self, results: Results) -> list[str]:
        """The target, then a row for each context and contender."""
        lines = [
            "Mean time of the steps in which the whole batch decodes, compactions of generated "
            "tokens included; stock vLLM and the contender share a process and take their steps "
            "in turn. Prompts are not computed: the pages hold random numbers, on both sides, "
            "which attention takes as long to read."
        ]
        lines += target_lines(
            [
                Target(
                    "TPOT at 8,000 tokens, budget 1,024, batch of 8, against stock",
                    "at most 0.6",
                    0.0,
                    0.6,
                    tuple(
                        ratio
                        for row in results.values()
                        if (row["prompt_tokens"], row["method"]) == TARGETED
                        for ratio in row["tpot_ratios"]
                    ),
                )
            ]
        )
        lines += [""]
        return lines + table(
            ["Context", "", "Stock TPOT, ms", "TPOT, ms", "Against stock", "Compactions"],
            [
                [
                    f"{row['prompt_tokens']}",
                    f"`{row['method']}`",
                    f"{1e3 * statistics.median(row['stock_tpot']):.1f}",
                    f"{1e3 * statistics.median(row['own_tpot']):.1f}",
                    ratio_text(row["tpot_ratios"]),
                    f"{row['compactions']}",
                ]
                for row in results.values()
            ],
        )

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """TPOT against context."""
        own: dict[str, list[tuple[float, float]]] = defaultdict(list)
        stock: dict[tuple[str, int], list[float]] = defaultdict(list)
        for row in results.values():
            context = row["prompt_tokens"]
            own[row["method"]].append((context, 1e3 * statistics.median(row["own_tpot"])))
            stock[row["baseline"], context] += row["stock_tpot"]
        if len({context for _, context in stock}) < 2:
            return []
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for (baseline, context), times in stock.items():
            lines[baseline].append((context, 1e3 * statistics.median(times)))
        path = directory / "TPOT-against-context.png"
        label = f"Time per output token, batch of {BATCH}, ms"
        return [line_plot(path, lines | own, "Tokens of context", label)]
