"""Stock vLLM against compression on the same KV memory, in one run, as JSON.

    python -m bench.smoke            # about 12 minutes on 2 cores
    python -m bench.smoke --quick    # a few requests, only to see that it works

Two questions: how much more output the same memory gives when it is short, and whether
anything is lost when compression is on but no request reaches its threshold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from bench.harness.engines import (
    BLOCK_SIZE,
    make_engine,
    make_prompts,
    run,
    scheduler_of,
    timed_steps,
)
from bench.harness.machine import allocator, in_its_own_process, machine, spread

KV_BYTES = 192 << 20

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


def throughput(name: str, requests: int, prompt: int, output: int) -> dict[str, Any]:
    """Output tokens per second of one contender under memory pressure."""
    engine = make_engine(CONTENDERS[name], KV_BYTES)
    run(engine, make_prompts(2, 64), 8)
    scheduler = scheduler_of(engine)
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


IDLE_PARTS = {"idle": "stock", "idle-first": "idle"}
"""Parts of the idle comparison, and the engine that each makes first."""

IDLE: dict[str, dict[str, Any] | None] = {"stock": None, "idle": {"budget": 2048}}
"""Settings of the idle comparison."""


def idle(first: str, pairs: int, requests: int, prompt: int, output: int) -> dict[str, list[float]]:
    """Stock against compression that never reaches its threshold, alternating, in one process.

    The engine that is made ``first`` gets other memory, which alone moves its speed by several
    per cent.
    """
    names = sorted(IDLE, key=lambda name: name != first)
    engines = {name: make_engine(IDLE[name], KV_BYTES) for name in names}
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
    # Of the median step of each side: other work on the machine hardly moves it.
    return {"throughput_ratio_to_stock": ratios, "step_ratio_to_stock": ratios_of_steps}


def main() -> None:
    """Run everything, or the one part that a child process was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few requests only")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each contender")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of each half of the idle part")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (4, 600, 40) if options.quick else (24, 2000, 200)
    idle_shape = (4, 100, 20) if options.quick else (16, 256, 128)

    if options.part:
        if options.part in IDLE_PARTS:
            print(json.dumps(idle(IDLE_PARTS[options.part], options.pairs, *idle_shape)))
        else:
            print(json.dumps(throughput(options.part, *shape)))
        return

    common = (["--quick"] if options.quick else []) + ["--pairs", str(options.pairs)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for repeat in range(options.repeat):
        order = list(CONTENDERS) if repeat % 2 == 0 else list(CONTENDERS)[::-1]
        for name in order:
            runs[name].append(in_its_own_process("--part", name, *common, module="bench.smoke"))
    report: dict[str, Any] = {
        "command": "python -m bench.smoke " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "allocator": allocator(),
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
    sides = [
        in_its_own_process("--part", part, *common, module="bench.smoke") for part in IDLE_PARTS
    ]
    # The middle of what either engine measures when it is made first.
    report["idle"] = {
        key: {
            "median": statistics.geometric_mean(statistics.median(side[key]) for side in sides),
            "made_first": dict(
                zip(IDLE_PARTS.values(), (spread(side[key]) for side in sides), strict=True)
            ),
        }
        for key in sides[0]
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
