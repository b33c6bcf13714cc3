"""The scenarios of the suite, by name; modules are imported when a scenario is used."""

from __future__ import annotations

from importlib import import_module

from bench.harness.suite import Scenario

SCENARIOS = {
    "throughput": "bench.scenarios.throughput",
    "serving": "bench.scenarios.online",
    "capacity": "bench.scenarios.capacity",
    "latency": "bench.scenarios.latency",
    "overhead": "bench.scenarios.overhead",
    "profile": "bench.scenarios.profile",
    "scheduler": "bench.scenarios.scheduler",
    "compaction": "bench.scenarios.pages",
    "scale": "bench.scenarios.scale",
}
"""Module of each scenario, in the order in which they run and are reported."""


def scenario(name: str) -> Scenario:
    """Make a scenario: the class in its module that bears its name."""
    module = import_module(SCENARIOS[name])
    for kind in vars(module).values():
        if isinstance(kind, type) and getattr(kind, "name", None) == name:
            return kind()
    raise LookupError(f"{module.__name__} has no class whose name is {name!r}")


def available() -> list[str]:
    """Scenarios whose module is there."""
    from importlib.util import find_spec

    return [name for name, module in SCENARIOS.items() if find_spec(module) is not None]
