"""Scenario 4b: what the scheduler's side of a step costs, per request, as requests and groups grow.

    python -m bench.scenarios.scheduler            # about 10 minutes
    python -m bench.scenarios.scheduler --quick    # a few steps, only to see that it works

The schedulers are real, the worker is simulated (:mod:`bench.harness.fake_engine`). A step is
``schedule()`` and ``update_from_output()`` of a batch that decodes. Contenders share a process and
take their steps in turn: stock vLLM with the one KV cache group that it makes, stock vLLM with as
many groups as ours, ours where no request reaches its threshold, and ours where every request
compacts in every interval. Their requests are staggered, so that about as many compact in every
step. The workers' side of more groups, building attention metadata, is timed as well.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import Any

from bench.harness.alone import run_alone
from bench.harness.plotting import line_plot
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results, Target, target_lines
from vllm_kvcompress.bundled import SKIP_LAYERS

TARGET = 20.0
"""Microseconds per request and step at 256 requests."""

LAYERS = 30
GROUPS: dict[int, dict[str, Any]] = {
    1: {},
    5: {"skip_layers": list(range(6))},
    6: {"pyramid_beta": 4, "bands": 6},
    10: {"skip_layers": list(SKIP_LAYERS)},
    15: {"skip_layers": [0, 1]},
    30: {"pyramid_beta": 4, "bands": 30},
}
"""Settings that lead to so many groups of 30 layers: in 6 and 30 every band has a budget of its
own, 5, 10 (as with ``make serve``) and 15 are one band and the layers that keep every token."""

BUDGET, INTERVAL, PROMPT = 1024, 128, 1100
"""The server's defaults, and a prompt that is a bit longer."""

STOCK, SPLIT, IDLE, ACTIVE = "stock", "stock in as many groups", "ours, idle", "ours, active"


class SchedulerCost:
    """Time of the scheduler's side of decoding steps, stock and ours."""

    name = "scheduler"
    title = "Scheduler time"

    def cases(self, options: Options) -> list[Case]:
        """One case per number of groups, for the scheduler and for attention metadata."""
        groups, requests, steps, rounds = {
            "quick": ((1, 6), (1, 4), 8, 1),
            "short": ((1, 10, 30), (16, 256), INTERVAL, 2),
            "full": (tuple(GROUPS), (1, 4, 16, 64, 256), INTERVAL, 5),
        }[options.effort]
        about = {"requests": requests, "steps": steps, "rounds": options.repeats or rounds}
        return [
            Case(f"{kind}, {named(count)}", {"kind": kind, "groups": count, **about})
            for kind in ("steps", "metadata")
            for count in groups
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """Time every contender at every number of requests."""
        about = case.parameters
        timed = time_steps if about["kind"] == "steps" else time_metadata
        rows = [
            {"requests": count, **timed(about["groups"], count, about["steps"], about["rounds"])}
            for count in about["requests"]
        ]
        return {"kind": about["kind"], "groups": about["groups"], "rows": rows}

    def report(self, results: Results) -> list[str]:
        """The target, then microseconds per request and step, then metadata."""
        cases = {(row["kind"], row["groups"]): row["rows"] for row in results.values()}
        steps = {groups: rows for (kind, groups), rows in cases.items() if kind == "steps"}
        metadata = {groups: rows for (kind, groups), rows in cases.items() if kind == "metadata"}
        lines = [
            "`schedule()` and `update_from_output()` of real schedulers with a simulated worker: "
            "microseconds per request and decoding step, prefix cache on, blocks of 16; one more "
            "request waits and is tried in every step. "
            f"`{IDLE}`: no request reaches its threshold. `{ACTIVE}`: budget {BUDGET}, every "
            f"request compacts every {INTERVAL} tokens in every group; planning is included. "
            f"Means over steps, medians of rounds. `{STOCK}` is vLLM without us, in one group. "
            "Every group has a block table for each request, which is looked at in every step: "
            "what lies above the target with many groups is that work, which takes stock vLLM in "
            "as many groups longer still.",
            *target_lines(
                [
                    Target(
                        f"{name}, {named(groups)}, {row['requests']} requests",
                        f"under {TARGET:.0f} µs",
                        0,
                        TARGET,
                        tuple(row["microseconds"][name]),
                    )
                    for groups, rows in steps.items()
                    for row in rows
                    for name in (IDLE, ACTIVE)
                    if row["requests"] == 256
                ]
            ),
        ]
        if steps:
            names = [STOCK, SPLIT, IDLE, ACTIVE]
            lines += ["", *table(["Groups", "Requests", *names], rows_of(steps, names)), ""]
        if metadata:
            names = ["stock", "ours without holes", "ours with holes"]
            lines += [
                "",
                "Attention metadata of all groups, on the CPU backend: microseconds per step. With "
                "holes all rows were compacted; on a GPU the work with holes is always done.",
                "",
                *table(["Groups", "Requests", *names], rows_of(metadata, names)),
            ]
        return lines

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Time of the active scheduler, and of stock vLLM, against the number of requests."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in results.values():
            if row["kind"] != "steps":
                continue
            for name in (ACTIVE, STOCK) if row["groups"] == 1 else (ACTIVE,):
                label = name if name == STOCK else f"{name}, {named(row['groups'])}"
                lines[label] = [
                    (each["requests"], statistics.median(each["microseconds"][name]))
                    for each in row["rows"]
                ]
        if not any(len(points) > 1 for points in lines.values()):
            return []
        path = directory / "scheduler-time-per-request-against-requests.png"
        return [line_plot(path, lines, "Requests", "µs per request and step", log=True)]


def named(groups: int) -> str:
    """``1 group``, ``6 groups``."""
    return "1 group" if groups == 1 else f"{groups} groups"


def rows_of(cases: dict[int, list[dict[str, Any]]], names: list[str]) -> list[list[str]]:
    """Rows of a table with medians of rounds."""
    return [
        [
            str(groups),
            str(row["requests"]),
            *(f"{statistics.median(row['microseconds'][name]):.1f}" for name in names),
        ]
        for groups, rows in sorted(cases.items())
        for row in rows
    ]


class Lane:
    """One scheduler and its batch."""

    def __init__(
        self, settings: dict[str, Any] | None, groups: int, requests: int, steps: int
    ) -> None:
        from bench.harness import fake_engine

        self.answer = fake_engine.answer
        model = fake_engine.Model(LAYERS, kv_heads=3, head_size=64)
        # Room for all of them until the end, in stock vLLM too.
        room = requests * (PROMPT + 2 * INTERVAL + steps)
        engine = fake_engine.Engine(
            model,
            settings,
            stock_groups=groups if settings is None else 1,
            max_requests=requests + 1,
            tokens_per_step=1 << 16,
            kv_bytes=room * model.token_bytes,
            max_model_len=room - 64,
        )
        self.scheduler = fake_engine.build_scheduler(engine)
        made = len(self.scheduler.kv_cache_config.kv_cache_groups)
        assert made == groups, f"{made} groups instead of {groups}"
        for index in range(requests):
            # No two prompts begin alike, and compactions are spread over the interval.
            prompt = [index % 60, *divmod(index, 60)]
            prompt += [0] * (PROMPT + index * INTERVAL // requests - len(prompt))
            request = fake_engine.make_request(engine, str(index), prompt, 12_000)
            self.scheduler.add_request(request)
        everyone = list(self.scheduler.requests.values())
        while any(request.num_output_tokens < 2 for request in everyone):
            self.step()
        # One more that needs the whole pool and so waits: its admission is tried in every step.
        request = fake_engine.make_request(engine, "waiting", [7] * (room - 64), 8)
        self.scheduler.add_request(request)

    @property
    def compactions(self) -> int:
        """How many there were so far, over all groups."""
        planner = getattr(self.scheduler, "kvcompress", None)
        return planner.totals.compactions if planner is not None else 0

    def step(self) -> float:
        """Seconds on the scheduler's side."""
        started = time.perf_counter()
        output = self.scheduler.schedule()
        between = time.perf_counter()
        answer = self.answer(output, self.scheduler.requests)
        resumed = time.perf_counter()
        self.scheduler.update_from_output(output, answer)
        return time.perf_counter() - resumed + between - started


def time_steps(groups: int, requests: int, steps: int, rounds: int) -> dict[str, Any]:
    """Microseconds per request and step of each contender, a mean for each round.

    Parameters
    ----------
    groups, requests : int
    steps : int
        Of a round.
    rounds : int
    """
    split = GROUPS[groups]
    lanes = {
        name: Lane(settings, 1 if name == STOCK else groups, requests, steps * rounds)
        for name, settings in (
            (STOCK, None),
            (SPLIT, None),
            (IDLE, {**split, "budget": 12 * BUDGET}),
            (ACTIVE, {**split, "budget": BUDGET, "interval": INTERVAL}),
        )
    }
    before = {name: lane.compactions for name, lane in lanes.items()}
    microseconds: dict[str, list[float]] = {name: [] for name in lanes}
    order = list(lanes)
    gc.collect()
    gc.freeze()  # As vLLM's engine core does once it has started.
    for _ in range(rounds):
        spent = dict.fromkeys(lanes, 0.0)
        for _ in range(steps):
            for name in order:
                spent[name] += lanes[name].step()
            order.reverse()
        for name, seconds in spent.items():
            microseconds[name].append(1e6 * seconds / steps / requests)
    gc.unfreeze()
    return {
        "microseconds": microseconds,
        "compactions": {name: lane.compactions - before[name] for name, lane in lanes.items()},
    }


def time_metadata(groups: int, requests: int, steps: int, rounds: int) -> dict[str, Any]:
    """Microseconds per step of building attention metadata, a median for each round.

    Parameters
    ----------
    groups, requests : int
    steps : int
        Of a round.
    rounds : int
    """
    from bench.harness.fake_attention import attention_lanes

    lanes = attention_lanes(groups, requests, context=PROMPT)
    microseconds: dict[str, list[float]] = {name: [] for name in lanes}
    for _ in range(rounds):
        took: dict[str, list[float]] = {name: [] for name in lanes}
        for _ in range(steps):
            for name, build in lanes.items():
                started = time.perf_counter()
                build()
                took[name].append(time.perf_counter() - started)
        for name, seconds in took.items():
            microseconds[name].append(1e6 * statistics.median(seconds))
    return {"microseconds": microseconds}


if __name__ == "__main__":
    run_alone(SchedulerCost(), __doc__)
