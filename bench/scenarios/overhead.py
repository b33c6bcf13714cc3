"""Scenario 4: what it costs to have compression installed, accounts kept, and more groups."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.harness.plotting import line_plot
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results, Target, ratio_text, target_lines

GROUPS = (1, 6, 15, 30)
IDLE_BUDGET = 4096
"""Tokens; more than any request here has."""

ON = "on, no request long enough"
ON_FIRST = {"on, made second": False, "on, made first": True}
"""Cases that compare being on with being installed only, and which engine is made first."""


class Overhead:
    """Time of a decoding step against stock vLLM's, when nothing is compressed."""

    name = "overhead"
    title = "Overhead"

    def cases(self, options: Options) -> list[Case]:
        """One case each: its engines share a process and take their steps in turn."""
        batch, prompt, output, rounds = {
            "quick": (2, 64, 8, 1),
            "short": (16, 256, 64, 5),
            "full": (16, 256, 128, 15),
        }[options.effort]
        about = {
            "batch": batch,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "rounds": options.repeats or rounds,
            "model": options.model,
        }
        kinds = ["idle", *ON_FIRST, "accounts", "groups"]
        if options.effort == "short":
            kinds.remove("accounts")
        return [Case(kind, {"kind": kind, **about}) for kind in kinds]

    def run(self, case: Case) -> dict[str, Any]:
        """Run the engines of a case side by side."""
        from bench.harness.engines import make_prompts
        from bench.harness.pairing import in_turn
        from bench.harness.prefilled import prefilled

        about = case.parameters
        engines = self._engines(about)
        prompts = make_prompts(about["batch"], about["prompt_tokens"])
        for engine in engines.values():
            prefilled(engine, about["batch"])
        in_turn(engines, prompts, 4)
        base = "installed" if about["kind"] in ON_FIRST else next(iter(engines))
        ratios: dict[str, list[float]] = {name: [] for name in engines}
        steps: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(about["rounds"]):
            courses = in_turn(engines, prompts, about["output_tokens"])
            for name, course in courses.items():
                # Steps of equal number do the same work at nearly the same time.
                pairs = zip(course.decoding, courses[base].decoding, strict=True)
                ratios[name].append(statistics.median(own / stock for own, stock in pairs))
                steps[name].append(course.step)
        return {
            **about,
            "base": base,
            "step_seconds": {name: statistics.median(took) for name, took in steps.items()},
            "step_ratios": {name: found for name, found in ratios.items() if name != base},
        }

    def _engine(self, about: dict[str, Any], settings: dict[str, Any] | None) -> Any:
        from bench.harness.engines import BLOCK_SIZE, Geometry, make_engine

        tokens = about["prompt_tokens"] + about["output_tokens"] + 2 * BLOCK_SIZE
        size = Geometry.of(about["model"]).pool_bytes(about["batch"] + 1, tokens)
        return make_engine(settings, size, model=about["model"], max_model_len=tokens)

    def _engines(self, about: dict[str, Any]) -> dict[str, Any]:
        kind = about["kind"]
        if kind in ON_FIRST:
            return self._on(about, ON_FIRST[kind])
        return {"idle": self._idle, "accounts": self._accounts, "groups": self._groups}[kind](about)

    def _on(self, about: dict[str, Any], first: bool) -> dict[str, Any]:
        """Switched off and switched on but idle, the latter made first or second."""
        kinds: dict[str, dict[str, Any] | None] = {"installed": None, ON: {"budget": IDLE_BUDGET}}
        names = sorted(kinds, key=lambda name: (name == ON) != first)
        return {name: self._engine(about, kinds[name]) for name in names}

    def _idle(self, about: dict[str, Any]) -> dict[str, Any]:
        """Stock vLLM before our plugin was loaded, then with it."""
        import os

        from vllm.engine.arg_utils import EngineArgs

        from vllm_kvcompress import plugin
        from vllm_kvcompress.settings import CONFIG_KEY

        os.environ["VLLM_PLUGINS"] = ""
        engines = {"not installed": self._engine(about, None)}
        assert not hasattr(EngineArgs.create_engine_config, CONFIG_KEY), "the plugin is loaded"
        plugin.register()
        engines["installed"] = self._engine(about, None)
        return engines

    def _accounts(self, about: dict[str, Any]) -> dict[str, Any]:
        """Two engines with frequent compactions, one of them without accounts."""
        from bench.accounts import SETTINGS, NoAccounts
        from bench.harness.engines import scheduler_of

        settings = {**SETTINGS, "budget": 128, "interval": 32}
        engines = {name: self._engine(about, settings) for name in ("without accounts", "accounts")}
        scheduler = scheduler_of(engines["without accounts"])
        scheduler.kvcompress_accounts = scheduler.kvcompress.accounts = NoAccounts()
        return engines

    def _groups(self, about: dict[str, Any]) -> dict[str, Any]:
        """Stock vLLM, and compression that never begins, in ever more KV cache groups."""
        from bench.harness.engines import Geometry, scheduler_of

        layers = Geometry.of(about["model"]).layers
        engines = {"stock": self._engine(about, None)}
        for groups in GROUPS:
            if layers % groups == 0:
                settings = {"budget": IDLE_BUDGET, "bands": groups}
                engine = engines[_named(groups)] = self._engine(about, settings)
                made = len(scheduler_of(engine).kv_cache_config.kv_cache_groups)
                assert made == groups, f"{made} groups instead of {groups}"
        return engines

    def report(self, results: Results) -> list[str]:
        """Targets, then a table of every case."""
        idle = dict(results.get("idle", {"step_ratios": {}})["step_ratios"])
        sides = [results[kind]["step_ratios"][ON] for kind in ON_FIRST if kind in results]
        if len(sides) == len(ON_FIRST):
            pairs = zip(*sides, strict=False)
            idle[ON] = [statistics.geometric_mean(pair) for pair in pairs]
        lines = [
            "Steps in which a batch decodes, of engines that share a process and take their steps "
            "in turn: the ratio of a round is the median over pairs of steps of equal number. "
            "Prompts are not computed: the pages hold random numbers. "
            "`not installed` was made before the plugin was loaded. An engine that is made second "
            "gets other memory, which alone moves its steps by some per cent: so `on` was "
            "measured both ways, and the target is held against the geometric mean. `installed` "
            "runs no code of ours in a step: how far it is from 1 is what the machine adds.",
            *target_lines(
                [
                    Target(f"idle: {name}", "0.99 to 1.01", 0.99, 1.01, tuple(ratios))
                    for name, ratios in idle.items()
                ]
            ),
        ]
        for kind, row in results.items():
            lines += [
                "",
                f"{kind}: batch of {row['batch']}, {row['prompt_tokens']}+{row['output_tokens']} "
                f"tokens, {row['rounds']} rounds:",
                "",
            ]
            lines += table(
                ["", "Step, ms", f"Against `{row['base']}`"],
                [
                    [
                        f"`{name}`",
                        f"{1e3 * seconds:.2f}",
                        ratio_text(row["step_ratios"][name]) if name != row["base"] else "1",
                    ]
                    for name, seconds in row["step_seconds"].items()
                ],
            )
        return lines

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Time of a step against the number of groups."""
        ratios = results.get("groups", {"step_ratios": {}})["step_ratios"]
        points = [
            (groups, statistics.median(ratios[_named(groups)]))
            for groups in GROUPS
            if _named(groups) in ratios
        ]
        if len(points) < 2:
            return []
        path = directory / "decoding-step-against-KV-cache-groups.png"
        return [line_plot(path, {"step": points}, "KV cache groups", "Step, stock = 1")]


def _named(groups: int) -> str:
    return "1 group" if groups == 1 else f"{groups} groups"
