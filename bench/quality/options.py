"""Options of ``python -m bench.quality``, and the plan that they make."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from bench.quality.longbench.files import longbench_tasks
from bench.quality.plan import ALL_METHODS, FULL_PLAN, LANGUAGE, SHORT, Plan
from bench.quality.rows import DURING, PROTOCOLS, STRICT
from bench.quality.tasks import TASKS, Task


class UsageError(ValueError):
    """Arguments that cannot be used; the message is one sentence."""


def run_parser(description: str) -> argparse.ArgumentParser:
    """The parser of the command that runs an evaluation."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--short", action="store_true", help="the short version: one length, fewer cases")
    add("--url", help="a running server; by default one is started")
    add("--api-key", help="of that server (default: VLLM_API_KEY or OPENAI_API_KEY)")
    add("--model", help="name at --url, or what to serve (default: the bundled model)")
    add("--tokenizer", help="directory or hub name (default: what the server loaded)")
    add("--dtype", default="bfloat16", help="of a server started here (default: %(default)s)")
    add("--server-options", default="", metavar="'...'", help="more options of serve.py")
    add("--variant", default="", help="name of such settings in the results")
    add("--tasks", type=_names, help=f"of {', '.join(TASKS)} (default: all)")
    add("--longbench", type=Path, metavar="DIR", help="LongBench's JSONL files, instead of --tasks")
    add("--datasets", type=_names, default=(), help="of these files (default: all)")
    add("--methods", type=_names, help=f"of {', '.join(ALL_METHODS)}")
    add("--shares", type=_floats, help="removed (default: 0.25,0.5,0.75,0.9)")
    add("--protocols", type=_names, help=f"of {', '.join(PROTOCOLS)}")
    add("--lengths", type=_integers, help="context lengths in tokens, for all tasks")
    add("--count", type=int, help="cases of each task and length")
    add("--chat", action="store_true", help="ask in the model's chat template")
    add("--ask-failing", action="store_true", help="measure compression also on tasks that fail "
        "with the full cache")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--prune-after", type=int, default=1024, help=f"of {DURING} (default: %(default)s tokens)")
    add("--texts", metavar="FILE:FILE", help="text files instead of Debian's packages")
    add("--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)")
    add("--output", type=Path, help="result rows (default: bench/results/quality-MODEL.jsonl)")
    add("--no-report", action="store_true", help="leave the table and the plots for later")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in _names(text))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


def plan_of(arguments: argparse.Namespace, tasks: dict[str, Task]) -> Plan:
    """The plan that options make.

    Parameters
    ----------
    arguments : argparse.Namespace
    tasks : dict
        Of `tasks_of`.

    Returns
    -------
    Plan

    Raises
    ------
    UsageError
    """
    plan = SHORT if arguments.short else FULL_PLAN
    protocols = arguments.protocols
    for name in protocols or ():
        if name not in PROTOCOLS:
            raise UsageError(f"{name} is no protocol; allowed are {', '.join(PROTOCOLS)}.")
    if DURING in (protocols or ()) and set(tasks) != {LANGUAGE}:
        raise UsageError(f"{DURING} is for --tasks {LANGUAGE} only.")
    for name in arguments.methods or ():
        if name not in ALL_METHODS:
            raise UsageError(f"{name} is no method; allowed are {', '.join(ALL_METHODS)}.")
    shares = arguments.shares or plan.shares
    if not all(0 < share < 1 for share in shares):
        raise UsageError("--shares are shares removed: numbers between 0 and 1.")
    if (arguments.count is not None and arguments.count < 1) or arguments.concurrency < 1:
        raise UsageError("--count and --concurrency must be at least 1.")
    return replace(
        plan,
        tasks={name: protocols or plan.tasks.get(name, (STRICT,)) for name in tasks},
        lengths={"": arguments.lengths} if arguments.lengths else plan.lengths,
        count=arguments.count or plan.count,
        language_count=arguments.count or plan.language_count,
        methods=arguments.methods or plan.methods,
        flat_methods=arguments.methods or plan.flat_methods,
        shares=shares,
        seed=arguments.seed,
        prune_after=arguments.prune_after,
        variant=arguments.variant,
        chat=arguments.chat,
        ask_failing=arguments.ask_failing,
    )


def tasks_of(arguments: argparse.Namespace) -> dict[str, Task]:
    """Tasks by name that options ask for."""
    if arguments.longbench:
        return dict(longbench_tasks(arguments.longbench, arguments.datasets))
    for name in arguments.tasks or ():
        if name not in TASKS:
            raise UsageError(f"{name} is no task; there are {', '.join(TASKS)}.")
    return {name: TASKS[name] for name in arguments.tasks or TASKS}
