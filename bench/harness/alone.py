"""Runs one scenario by itself and prints what it found as JSON."""

from __future__ import annotations

import argparse
import json
import sys

from bench.harness.machine import machine
from bench.harness.suite import Effort, Options, Scenario


def run_alone(scenario: Scenario, about: str | None) -> None:
    """Run all cases of a scenario in this process.

    Parameters
    ----------
    scenario : Scenario
    about : str or None
        Documentation of its module; the first line is shown with ``--help``.
    """
    parser = argparse.ArgumentParser(description=(about or scenario.title).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it works")
    parser.add_argument("--short", action="store_true", help="the cases with targets only")
    parser.add_argument("--markdown", action="store_true", help="print a report instead of JSON")
    parser.add_argument("--repeats", type=int, default=0, help="rounds of every comparison")
    parser.add_argument("--keys", default="", help="only cases with this in their key")
    chosen = parser.parse_args()
    effort: Effort = "quick" if chosen.quick else "short" if chosen.short else "full"
    results = {}
    for case in scenario.cases(Options(effort=effort, repeats=chosen.repeats)):
        if chosen.keys in case.key:
            print(case.key, file=sys.stderr, flush=True)
            results[case.key] = scenario.run(case)
    if chosen.markdown:
        print("\n".join(scenario.report(results)))
        return
    command = " ".join([f"python -m bench.{scenario.name}", *sys.argv[1:]])
    print(json.dumps({"command": command, "machine": machine(), "results": results}, indent=1))
