"""Scenario 1: ``vllm bench throughput`` at fixed KV memory, stock against compressed."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from math import inf
from pathlib import Path
from typing import Any

from bench.harness.contenders import contender, with_budgets
from bench.harness.engines import BLOCK_SIZE, Geometry, model_or_bundled
from bench.harness.plotting import bar_plot, line_plot
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results, Target, ratio_text, target_lines
from bench.scenarios.workloads import BATCHES, REPEATS, TARGETS


class Throughput:
    """Output tokens per second of one offline batch, by contender, shape and pool."""

    name = "throughput"
    title = "Throughput at fixed KV memory"

    def cases(self, options: Options) -> list[Case]:
        """Contenders of one shape and pool are neighbours; every other repeat goes backwards."""
        batches = BATCHES[options.effort]
        if options.shapes:
            batches = tuple(batches[0]._replace(shape=shape) for shape in options.shapes)
        found = []
        for batch in batches:
            methods = with_budgets(options.methods or batch.methods, options.budgets)
            for method in methods:
                contender(method, sum(batch.shape))
            requests = options.requests or batch.requests
            for pool in options.pools or batch.pools:
                for repeat in range(options.repeats or REPEATS[options.effort]):
                    for method in methods if repeat % 2 == 0 else methods[::-1]:
                        found.append(
                            self._case(options, batch.shape, pool, method, repeat, requests)
                        )
        return found

    def _case(
        self,
        options: Options,
        shape: tuple[int, int],
        pool: int,
        method: str,
        repeat: int,
        requests: int,
    ) -> Case:
        prompt, output = shape
        group = f"{prompt}+{output}, pool of {pool}, {requests} requests"
        return Case(
            f"{group}, {method}, repeat {repeat}",
            {
                "group": group,
                "prompt_tokens": prompt,
                "output_tokens": output,
                "pool": pool,
                "method": method,
                "repeat": repeat,
                "requests": requests,
                "model": options.model,
            },
        )

    def run(self, case: Case) -> dict[str, Any]:
        """Run vLLM's own command in this process, with a watch on the scheduler."""
        from bench.harness.observe import watch_next_llm
        from vllm_kvcompress.cli import alias_cpu_build

        about = case.parameters
        prompt, output = about["prompt_tokens"], about["output_tokens"]
        side = contender(about["method"], prompt + output)
        geometry = Geometry.of(about["model"])
        # The same bytes for all: those of the requests in the model's own type.
        kv_bytes = geometry.pool_bytes(about["pool"], prompt + output)
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "throughput.json"
            arguments = {
                "model": model_or_bundled(about["model"]),
                "dataset-name": "random",
                "random-input-len": prompt,
                "random-output-len": output,
                "num-prompts": about["requests"],
                "output-json": out,
                "dtype": "bfloat16",
                "block-size": BLOCK_SIZE,
                "kv-cache-memory-bytes": kv_bytes,
                "kv-cache-dtype": side.cache,
                # The random dataset's prompts may be a few tokens longer.
                "max-model-len": prompt + output + BLOCK_SIZE,
                "max-num-seqs": about["pool"] if side.capped else 256,
                "seed": 0,
            }
            if side.settings:
                arguments["additional-config"] = json.dumps({"kvcompress": side.settings})
            # Compiled bfloat16 gives wrong text in stock vLLM 0.32 on CPU, at the same speed.
            flags = ["--enforce-eager", "--no-enable-prefix-caching", "--disable-detokenize"]
            sys.argv = ["vllm", "bench", "throughput", *flags]
            sys.argv += [f"--{key}={value}" for key, value in arguments.items()]
            alias_cpu_build()
            watches = watch_next_llm(geometry.block_bytes(side.cache))
            from vllm.benchmarks import throughput
            from vllm.entrypoints.cli.main import main as vllm_main

            measured: dict[str, Any] = {}
            run_requests = throughput._run_vllm_requests

            def watched(*args: Any, **kwargs: Any) -> Any:
                watches[0].restart()
                seconds, outputs = run_requests(*args, **kwargs)
                # Before vLLM's command lets go of its engine.
                measured.update(watches[0].figures(seconds))
                tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                measured["output_tokens_per_second"] = tokens / seconds
                return seconds, outputs

            throughput._run_vllm_requests = watched
            vllm_main()
            found = json.loads(out.read_text())
        return {
            **about,
            "settings": side.settings,
            "kv_bytes": kv_bytes,
            "seconds": found["elapsed_time"],
            **measured,
        }

    def report(self, results: Results) -> list[str]:
        """Targets, then a table of each shape and pool."""
        lines = [
            "`vllm bench throughput` on random tokens, all requests at once, sampled, no prefix "
            "cache. A pool of *n* holds *n* whole requests in stock vLLM; all contenders have "
            "the same bytes. With `/8` a request never holds more than an eighth of its tokens. "
            "More requests at once make steps longer: the scenario `profile` says by what."
        ]
        lines += target_lines(
            [
                Target(f"{what} ({group})", wanted, least, inf, tuple(ratios))
                for what, wanted, least, shape, own, base in TARGETS
                for group, ratios in self._ratios(results, shape, own, base).items()
            ]
        )
        for group, rows in grouped(results).items():
            lines += ["", f"{group}, {rows[0]['kv_bytes'] / (1 << 20):.0f} MiB of KV cache:", ""]
            methods = list(dict.fromkeys(row["method"] for row in rows))
            baseline = "stock" if "stock" in methods else "fp8"
            lines += table(
                [
                    "",
                    "Output tok/s",
                    f"Against {baseline}",
                    "Preemptions",
                    "Peak at once",
                    "KV MiB per request",
                    "Compacting",
                    "Scheduling",
                ],
                [self._row(method, baseline, rows) for method in methods],
            )
        return lines

    def _row(self, method: str, baseline: str, rows: list[dict[str, Any]]) -> list[str]:
        own = [row for row in rows if row["method"] == method]

        def median(key: str) -> float:
            return statistics.median(row[key] for row in own)

        ratios = paired(rows, method, baseline, "output_tokens_per_second")
        return [
            f"`{method}`",
            f"{median('output_tokens_per_second'):.1f}",
            ratio_text(ratios) if ratios else "",
            f"{median('preemptions'):.0f}",
            f"{median('peak_concurrency'):.0f}",
            f"{median('kv_bytes_per_request') / (1 << 20):.1f}",
            f"{median('compaction_share'):.1%}" if own[0]["settings"] else "",
            f"{median('scheduling_share'):.1%}",
        ]

    def _ratios(
        self, results: Results, shape: tuple[int, int] | None, own: str, base: str
    ) -> dict[str, list[float]]:
        """Ratios by comparison; those of different batches are no repeats of one another."""
        return {
            group: paired(rows, own, base, "output_tokens_per_second")
            for group, rows in grouped(results).items()
            if shape in (None, (rows[0]["prompt_tokens"], rows[0]["output_tokens"]))
            and rows[0]["pool"] == 2
        }

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Throughput against KV bytes for each shape; bars if there is only one pool."""
        shapes: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
        first: dict[str, int] = {}
        titles: dict[str, str] = {}
        for rows in grouped(results).values():
            # Batches of other sizes are other lines, and so other plots.
            shape = f"{rows[0]['prompt_tokens']}+{rows[0]['output_tokens']}"
            if first.setdefault(shape, rows[0]["requests"]) != rows[0]["requests"]:
                shape += f"-{rows[0]['requests']}-requests"
            titles[shape] = (
                f"{rows[0]['prompt_tokens']}+{rows[0]['output_tokens']} tokens, "
                f"{rows[0]['requests']} requests"
            )
            for method in dict.fromkeys(row["method"] for row in rows):
                speeds = [r["output_tokens_per_second"] for r in rows if r["method"] == method]
                point = rows[0]["kv_bytes"] / (1 << 20), statistics.median(speeds)
                shapes[shape].setdefault(method, []).append(point)
        made = []
        for shape, lines in shapes.items():
            label, title = "Output tokens per second", titles[shape]
            if max(len(points) for points in lines.values()) > 1:
                path = directory / f"throughput-against-KV-memory-{shape}.png"
                made.append(line_plot(path, lines, "KV cache, MiB", label, title))
            else:
                ((size, _),) = next(iter(lines.values()))
                bars = {method: points[0][1] for method, points in lines.items()}
                title += f", {size:.0f} MiB of KV cache"
                made.append(bar_plot(directory / f"throughput-{shape}.png", bars, label, title))
        return made


def grouped(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Figures by comparison."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results.values():
        groups[row["group"]].append(row)
    return groups


def paired(rows: list[dict[str, Any]], own: str, base: str, key: str) -> list[float]:
    """Ratios of a figure of two contenders, one for each repeat that has both."""
    sides = [{row["repeat"]: row[key] for row in rows if row["method"] == m} for m in (own, base)]
    return [sides[0][repeat] / sides[1][repeat] for repeat in sides[0] if repeat in sides[1]]
