"""Where the time of a decoding step goes: what limits the throughput that memory allows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.contenders import contender
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results

SHAPE = (1000, 1000)
BATCHES = (1, 2, 8, 14)
"""Requests that decode at once: 2 is what stock vLLM has room for in a pool of 2, 14 what an
eighth of the tokens leaves room for."""

PARTS = {
    "linear layers": ("mm", "addmm", "linear", "matmul", "bmm", "onednn"),
    "attention": ("attention", "reshape_and_cache", "slot_mapping"),
}
"""Names that operators of a part contain."""


class Profile:
    """Shares of a decoding step by part, stock against compressed, at several batches."""

    name = "profile"
    title = "Where a decoding step's time goes"

    def cases(self, options: Options) -> list[Case]:
        """One case for each contender and batch."""
        batches, steps = {
            "quick": ((2,), 4),
            # Whole intervals of the contenders, so that each compacts as often as it does.
            "short": ((2, 14), 32),
            "full": (BATCHES, 64),
        }[options.effort]
        prompt, output = options.shapes[0] if options.shapes else SHAPE
        return [
            Case(
                f"{prompt}+{output}, {batch} at once, {method}",
                {
                    "prompt_tokens": prompt,
                    "output_tokens": output,
                    "batch": batch,
                    "steps": steps,
                    "method": method,
                    "model": options.model,
                },
            )
            for batch in batches
            for method in options.methods or ("stock", "knorm/8")
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """Decode steps in the middle of the output, first timed, then under torch's profiler."""
        from bench.harness.engines import BLOCK_SIZE, Geometry, make_engine, make_prompts
        from bench.harness.prefilled import prefilled

        about = case.parameters
        tokens = about["prompt_tokens"] + about["output_tokens"]
        side = contender(about["method"], tokens)
        # Half of the output is the mean length of a request that decodes.
        length = about["prompt_tokens"] + about["output_tokens"] // 2
        # Prompts begin one by one, and no request may end while steps are timed or profiled.
        more = 2 * about["steps"] + 8 * about["batch"] + 16
        longest = length + max(more, about["output_tokens"] // 2)
        engine = make_engine(
            side.settings,
            Geometry.of(about["model"]).pool_bytes(about["batch"] + 1, longest),
            model=about["model"],
            kv_cache_dtype=side.cache,
            max_model_len=longest + BLOCK_SIZE,
        )
        prefilled(engine, about["batch"])
        prompts = make_prompts(about["batch"], length)
        steps = _steps(engine, prompts, longest - length)
        clock = _Clock(engine)
        started = time.perf_counter()
        for _ in range(about["steps"]):
            steps()
        seconds = time.perf_counter() - started
        spent = {name: spent / seconds for name, spent in clock.seconds.items()}
        operators = _operators(steps, about["steps"])
        if engine.llm_engine.get_num_unfinished_requests() < about["batch"]:
            raise RuntimeError("requests ended before all steps were taken")
        return {
            **about,
            "settings": side.settings,
            "step_seconds": seconds / about["steps"],
            "shares": spent,
            "operators": operators,
        }

    def report(self, results: Results) -> list[str]:
        """A table of shares."""
        lines = [
            "Requests in the middle of their output, decoding at once; prompts are not computed. "
            "Shares of the wall time of a step: the scheduler, compactions, the model, its "
            "logits, and what is between them (input batches, metadata, sampling, the engine's "
            "loop). "
            "Operators are all of a step, by torch's profiler, in further steps: shares of their "
            "own time.",
            "",
        ]
        rows = list(results.values())
        kinds = list(dict.fromkeys(kind for row in rows for kind in row["operators"]))
        heads = ["", "At once", "Step, ms", "ms per request", "Scheduler", "Compaction"]
        heads += ["Between", "Logits", "Model", *(f"Operators: {kind}" for kind in kinds)]
        return lines + table(
            heads,
            [
                [
                    f"`{row['method']}`",
                    f"{row['batch']}",
                    f"{1e3 * row['step_seconds']:.1f}",
                    f"{1e3 * row['step_seconds'] / row['batch']:.1f}",
                    f"{row['shares']['scheduler']:.1%}",
                    f"{row['shares'].get('compaction', 0):.1%}",
                    f"{1 - sum(row['shares'].values()):.1%}",
                    f"{row['shares']['logits']:.1%}",
                    f"{row['shares']['model']:.0%}",
                    *(f"{row['operators'].get(kind, 0):.0%}" for kind in kinds),
                ]
                for row in rows
            ],
        )

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Nothing: the table says it."""
        return []


def _steps(engine: Any, prompts: list[Any], output_tokens: int) -> Callable[[], None]:
    """A batch that has begun to decode; every call is one step."""
    from bench.harness.engines import greedy

    core = engine.llm_engine
    for number, prompt in enumerate(prompts):
        core.add_request(f"profile-{number}", prompt, greedy(output_tokens))
    begun: set[str] = set()
    while len(begun) < len(prompts):
        begun |= {out.request_id for out in core.step() if out.outputs[0].token_ids}
    for _ in range(4):
        core.step()
    return core.step


class _Clock:
    """Seconds in the scheduler, in the model, and in compactions, from now on."""

    def __init__(self, engine: Any) -> None:
        from bench.harness.engines import scheduler_of
        from bench.harness.prefilled import runner_of

        self.seconds: dict[str, float] = defaultdict(float)
        scheduler, runner = scheduler_of(engine), runner_of(engine)
        self._time(scheduler, "schedule", "scheduler")
        self._time(scheduler, "update_from_output", "scheduler")
        self._time(runner.model, "forward", "model")
        self._time(runner.model, "compute_logits", "logits")
        if state := getattr(runner, "kvcompress", None):
            self._time(state.compactor, "run", "compaction")

    def _time(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - started

        setattr(owner, name, timed)


def _operators(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Shares of the operators' own time by part."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        part = next(
            (part for part, names in PARTS.items() if any(n in event.key for n in names)),
            "everything else",
        )
        found[part] += event.self_cpu_time_total
    total = sum(found.values())
    return {part: spent / total for part, spent in sorted(found.items())}
