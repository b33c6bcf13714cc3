"""Scenario 6: memory and concurrency of larger models on paper, checked by simulation.

    python -m bench.scenarios.scale            # about 20 minutes
    python -m bench.scenarios.scale --quick    # a few requests, only to see that it works

No large model and no GPU is involved. On paper: KV memory from the sizes of weights and cache, and
the number of requests that it holds from what each holds on average. By simulation: vLLM's real
scheduler, stock or ours, with the blocks that vLLM itself makes of that memory, runs 10,000
requests against a worker that computes nothing (:mod:`bench.harness.fake_engine`). Steps have no
duration: this says how many requests run at once and what is preempted, and nothing about speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.alone import run_alone
from bench.harness.plotting import line_plot
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results
from bench.scenarios.paper import (
    BLOCK_SIZE,
    GPU_BYTES,
    INTERVAL,
    MAX_REQUESTS,
    OVERHEAD_BYTES,
    TOKENS_PER_STEP,
    UTILIZATION,
    Large,
    draw,
    on_paper,
)

FILLED = 4
"""Times as many requests as run at once, for the pool to be full while the middle ones end."""

MODELS = {
    "Llama-3.1-8B": Large(8.03e9, layers=32, kv_heads=8),
    "Llama-3.1-70B": Large(70.6e9, layers=80, kv_heads=8),
}
PLACES = (("Llama-3.1-8B", 1), ("Llama-3.1-70B", 4), ("Llama-3.1-70B", 8))
"""Models and the tensor-parallel GPUs that hold them."""

SHAPES = ((2000, 500), (16000, 500))
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "budget 1024": {"budget": 1024, "interval": INTERVAL},
    "budget 512": {"budget": 512, "interval": INTERVAL},
}


class Scale:
    """Concurrency on 80 GB GPUs: a formula, and a simulation of the scheduler."""

    name = "scale"
    title = "Scale, simulated"

    def cases(self, options: Options) -> list[Case]:
        """One case per model, shape and contender."""
        total = {"quick": 40, "short": 3000, "full": 10_000}[options.effort]
        places, shapes = list(PLACES), list(SHAPES)
        if options.effort != "full":
            places, shapes = places[:1], shapes[:1]
        return [
            Case(
                f"{model} on {gpus}, {prompt}+{output}, {contender}",
                {
                    "model": model,
                    "gpus": gpus,
                    "prompt_tokens": prompt,
                    "output_tokens": output,
                    "contender": contender,
                    "requests": total,
                },
            )
            for model, gpus in places
            for prompt, output in options.shapes or shapes
            for contender in CONTENDERS
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """Both numbers, from the same lengths of requests."""
        about = case.parameters
        model, gpus = MODELS[about["model"]], about["gpus"]
        settings = CONTENDERS[about["contender"]]
        lengths = list(draw(about["prompt_tokens"], about["output_tokens"], about["requests"]))
        budget = settings["budget"] if settings is not None else None
        pool = model.kv_bytes(gpus) // model.token_bytes(gpus)
        return {
            **about,
            "kv_bytes_per_gpu": model.kv_bytes(gpus),
            "token_bytes_per_gpu": model.token_bytes(gpus),
            "pool_tokens_on_paper": pool,
            "on_paper": on_paper(lengths, pool, budget),
            "simulated": simulate(model, gpus, settings, lengths),
        }

    def report(self, results: Results) -> list[str]:
        """How it was made, then a row for every case."""
        lines = [
            "**A model on paper and a simulation; no GPU and no such model was run, and steps have "
            f"no duration.** GPUs of {GPU_BYTES / 1e9:.0f} GB, of which vLLM may use "
            f"{UTILIZATION:.0%}; weights in bfloat16; {OVERHEAD_BYTES / 1e9:.0f} GB assumed for "
            f"activations and buffers; blocks of {BLOCK_SIZE}, {TOKENS_PER_STEP} tokens per step, "
            f"at most {MAX_REQUESTS} requests. Lengths are drawn evenly from half to one and a "
            "half times those named. On paper: pool over the tokens that a decoding request holds "
            "on average, or as many as the tokens of a step can feed with prompts, if that is "
            "less. Simulated: mean number of requests in a step, over the steps in which the "
            "middle 60 % of the requests end.",
            "",
        ]
        rows = []
        for row in results.values():
            paper, real = row["on_paper"], row["simulated"]
            ratio = f"{real['concurrency'] / paper['concurrency']:.2f}"
            full = row["requests"] >= FILLED * paper["concurrency"]
            rows.append(
                [
                    f"{row['model']}, {row['gpus']} GPU{'s' * (row['gpus'] > 1)}",
                    f"{row['prompt_tokens']:,}+{row['output_tokens']:,}",
                    row["contender"],
                    f"{real['pool_tokens']:,}",
                    f"{paper['concurrency']:.0f} ({paper['limit']})",
                    f"{real['concurrency']:.0f}",
                    ratio if full else "too few requests",
                    f"{real['preemptions']:,}",
                    f"{real['pool_used']:.0%}",
                    f"{real['steps']:,}",
                ]
            )
        heads = ["Model", "Tokens", "", "Pool, tokens", "At once on paper (limit)"]
        heads += ["Simulated", "Simulated / paper", "Preemptions", "Pool used", "Steps"]
        return lines + (table(heads, rows) if rows else [])

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Concurrency against budget, simulated and on paper, for the first shape."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in results.values():
            settings = CONTENDERS[row["contender"]]
            if settings is None or (row["prompt_tokens"], row["output_tokens"]) != SHAPES[0]:
                continue
            place = f"{row['model']} on {row['gpus']}"
            for kind, label in (("simulated", "simulated"), ("on_paper", "on paper")):
                point = (settings["budget"], row[kind]["concurrency"])
                lines.setdefault(f"{place}, {label}", []).append(point)
        if not any(len(points) > 1 for points in lines.values()):
            return []
        path = directory / "simulated-concurrency-against-budget.png"
        return [line_plot(path, lines, "Budget, tokens", "Requests at once")]


def simulate(
    model: Large,
    gpus: int,
    settings: dict[str, Any] | None,
    lengths: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """Run a real scheduler until all requests are finished.

    Parameters
    ----------
    model : Large
    gpus : int
        Tensor-parallel ranks.
    settings : dict or None
        Of our plugin; ``None`` for stock vLLM.
    lengths : sequence of (int, int)
        Prompt and output tokens of the requests.
    """
    from bench.harness import fake_engine

    longest = max(prompt + output for prompt, output in lengths)
    engine = fake_engine.Engine(
        fake_engine.Model(model.layers, model.kv_heads, model.head_size),
        settings,
        tensor_parallel=gpus,
        kv_bytes=model.kv_bytes(gpus),
        block_size=BLOCK_SIZE,
        max_requests=MAX_REQUESTS,
        tokens_per_step=TOKENS_PER_STEP,
        max_model_len=longest + 1,
    )
    scheduler = fake_engine.build_scheduler(engine)
    pool = scheduler.kv_cache_manager.block_pool
    started = time.perf_counter()
    scheduling = 0.0
    batches: list[tuple[int, int, int]] = []
    preemptions = added = finished = 0
    total = len(lengths)
    while finished < total:
        # Enough to choose from; all of them at once would only hold memory here.
        while added < total and len(scheduler.waiting) < MAX_REQUESTS:
            prompt, output = lengths[added]
            tokens = [added % 60, added // 60 % 60, added // 3600, *[0] * (prompt - 3)]
            request = fake_engine.make_request(engine, str(added), tokens, output)
            scheduler.add_request(request)
            added += 1
        before = time.perf_counter()
        step = scheduler.schedule()
        scheduling += time.perf_counter() - before
        answer = fake_engine.answer(step, scheduler.requests)
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        preemptions += len(step.preempted_req_ids or ())
        before = time.perf_counter()
        scheduler.update_from_output(step, answer)
        scheduling += time.perf_counter() - before
        finished = added - len(scheduler.requests)
        batches.append((len(step.num_scheduled_tokens), used, finished))
    steady = [b for b in batches if 0.2 * total <= b[2] <= 0.8 * total] or batches
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    return {
        "pool_tokens": (pool.num_gpu_blocks - 1) * BLOCK_SIZE // groups,
        "groups": groups,
        "concurrency": statistics.fmean(count for count, _, _ in steady),
        "most_at_once": max(count for count, _, _ in batches),
        "pool_used": statistics.fmean(used for _, used, _ in steady) / (pool.num_gpu_blocks - 1),
        "preemptions": preemptions,
        "steps": len(batches),
        "scheduling_us_per_request_and_step": 1e6 * scheduling / sum(b[0] for b in batches),
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    run_alone(Scale(), __doc__)
