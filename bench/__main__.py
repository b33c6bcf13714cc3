"""The benchmark suite; ``docs/benchmarks.md`` has the scenarios.

    python -m bench                           # everything: many hours
    python -m bench --short                   # under 15 minutes on 2 cores, as make bench
    python -m bench throughput --shapes 1000+1000 --pools 2 --methods stock,knorm/8

Again with the same ``--out DIRECTORY`` only what is missing is run.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from bench.harness.child import CaseFailed, run_apart
from bench.harness.registry import SCENARIOS, available, scenario
from bench.harness.report import write_report
from bench.harness.store import RESULTS, Store, StoreError
from bench.harness.suite import Case, Options


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``"2000+200,1000+1000"`` as pairs of numbers."""
    found = []
    for part in text.split(","):
        prompt, _, output = part.partition("+")
        found.append((int(prompt), int(output)))
    return tuple(found)


def integers(text: str) -> tuple[int, ...]:
    """``"256,512"`` as numbers."""
    return tuple(int(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench", description=(__doc__ or "").split(":")[0]
    )
    made.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    effort = made.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "tiny cases, only to see that it works"),
        ("short", "the cases with targets, under 15 minutes on 2 cores"),
    ):
        effort.add_argument(
            f"--{name}", action="store_const", const=name, dest="effort", default="full", help=text
        )
    made.add_argument("--repeats", type=int, default=0, help="times of every comparison")
    made.add_argument("--model", default="", help="directory or name (default: the bundled one)")
    made.add_argument(
        "--methods", default="", help="contenders, as stock,fp8,knorm/8,pyramid+fp8/4,merge@512"
    )
    made.add_argument("--budgets", type=integers, default=(), help="tokens, as 256,512")
    made.add_argument("--shapes", type=shapes, default=(), help="prompt+output tokens: 1000+1000")
    made.add_argument("--pools", type=integers, default=(), help="KV memory, in whole requests")
    made.add_argument("--requests", type=int, default=0, help="requests sent at once")
    made.add_argument("--out", type=Path, help=f"directory (default: under {RESULTS.name}/)")
    made.add_argument("--anywhere", action="store_true", help="add to another machine's results")
    made.add_argument("--list", action="store_true", help="list the cases and stop")
    made.add_argument("--report", action="store_true", help="only write the report again")
    made.add_argument(
        "--keys", default="", metavar="TEXT", help="only cases with this in their key"
    )
    made.add_argument("--minutes", type=float, help="start no case after so many minutes")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for and missing, then write the report.

    Returns
    -------
    int
        0, or 1 if cases failed, or 2 if nothing could be run.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(words)
    unknown = [name for name in options.scenarios if name not in available()]
    if unknown:
        print(f"No scenario {unknown[0]!r}; there are {', '.join(available())}.", file=sys.stderr)
        return 2
    chosen = Options(
        effort=options.effort,
        repeats=options.repeats,
        model=options.model,
        methods=tuple(filter(None, options.methods.split(","))),
        budgets=options.budgets,
        shapes=options.shapes,
        pools=options.pools,
        requests=options.requests,
    )
    if find_spec("matplotlib") is None:
        print('The plots need matplotlib: pip install "vllm-kvcompress[bench]".', file=sys.stderr)
        return 2
    names = options.scenarios or available()
    cases = [
        (name, case)
        for name in names
        for case in scenario(name).cases(chosen)
        if options.keys in case.key
    ]
    if options.list:
        print("\n".join(f"{name}: {case.key}" for name, case in cases))
        return 0
    out = options.out or RESULTS / time.strftime(f"{chosen.effort}-%Y-%m-%d")
    # Where results are put says nothing of what was measured, and may name a home directory.
    command = " ".join(["python -m bench", *without_out(words)])
    try:
        store = Store(out, command, options.anywhere)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    # Ended from outside, a case's processes are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = 0 if options.report else run_missing(cases, store, until)
    print(f"Report: {relative(write_report(store))}")
    return 1 if failed else 0


def without_out(words: list[str]) -> list[str]:
    """The command line without ``--out DIRECTORY``."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return kept


def relative(path: Path) -> Path:
    """A path as seen from the current directory, where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_missing(cases: list[tuple[str, Case]], store: Store, until: float) -> int:
    """Run the cases that have no result yet; how many failed."""
    missing = [(name, case) for name, case in cases if case.key not in store.results(name)]
    if len(missing) < len(cases):
        print(f"{len(cases) - len(missing)} of {len(cases)} cases are there already.", flush=True)
    failed = 0
    began = time.monotonic()
    with (store.directory / "log.txt").open("a") as log:
        for number, (name, case) in enumerate(missing, 1):
            if time.monotonic() > until:
                print(f"Time is up; {len(missing) - number + 1} cases are left.", flush=True)
                break
            print(f"[{number}/{len(missing)}] {name}: {case.key} ... ", end="", flush=True)
            print(f"\n== {name}: {case.key}", file=log, flush=True)
            started = time.monotonic()
            try:
                figures = run_apart(name, case, log)
            except CaseFailed as error:
                failed += 1
                store.fail(name, case.key, str(error))
                print(f"failed: {error}", flush=True)
                continue
            seconds = time.monotonic() - started
            store.add(name, case.key, figures, seconds)
            spent = time.monotonic() - began
            print(f"{seconds:.0f} s ({spent / 60:.1f} min so far)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
