"""What a scenario of the suite is: cases that are run one by one, a report and plots.

A scenario is a class in a module of its own, named in :mod:`bench.harness.registry`. Its cases
are the units that are kept when a run is interrupted. Each runs in an interpreter of its own, with
no engine before it; contenders of one comparison are neighbours in the list of cases, in an order
that turns from repeat to repeat, or share one case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Effort = Literal["quick", "short", "full"]


@dataclass(frozen=True)
class Options:
    """What of a scenario is to be run.

    Attributes
    ----------
    effort : {"quick", "short", "full"}
        ``quick`` only shows that everything works; ``short`` has the cases that the project
        set itself targets for; ``full`` sweeps.
    repeats : int
        Times that every comparison is made; 0 is the scenario's own number.
    model : str
        Directory or name; the bundled model if empty.
    methods : tuple of str
        Contenders, as in :mod:`bench.harness.contenders`; the scenario's own if empty.
    budgets : tuple of int
        Tokens, instead of the scenario's own.
    shapes : tuple of (int, int)
        Prompt and output tokens, instead of the scenario's own.
    pools : tuple of int
        KV memory, as the number of whole requests that it holds in stock vLLM.
    requests : int
        Sent at once by ``throughput`` and ``serving``; 0 is the scenario's own number.
    """

    effort: Effort = "full"
    repeats: int = 0
    model: str = ""
    methods: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    pools: tuple[int, ...] = ()
    requests: int = 0


@dataclass(frozen=True)
class Case:
    """One thing to run.

    Attributes
    ----------
    key : str
        Names the case within its scenario, the same in every run with the same options.
    parameters : dict
        All that ``run`` needs, as JSON.
    """

    key: str
    parameters: dict[str, Any] = field(default_factory=dict)


Results = Mapping[str, dict[str, Any]]
"""What ``run`` returned, by the key of the case, in the order of ``cases``; cases that have not
run are missing."""


class Scenario(Protocol):
    """What the runner asks of a scenario."""

    name: str
    title: str

    def cases(self, options: Options) -> list[Case]:
        """Everything there is to run, without importing vLLM."""

    def run(self, case: Case) -> dict[str, Any]:
        """Run a case, in a process that has run nothing yet; all that matters, as JSON."""

    def report(self, results: Results) -> list[str]:
        """Lines of Markdown below the scenario's heading; has to bear missing cases."""

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Draw what there is to draw into a directory; the files, captions as their stems."""


class Target(NamedTuple):
    """A ratio that the project set itself, and what was measured."""

    what: str
    wanted: str
    least: float
    most: float
    ratios: tuple[float, ...]


def target_lines(targets: list[Target]) -> list[str]:
    """Table of targets; those of which nothing was measured are left out."""
    from bench.harness.machine import spread

    rows = []
    for target in targets:
        if not target.ratios:
            continue
        found = spread(target.ratios)
        met = target.least <= found["median"] <= target.most
        rows.append(
            f"| {target.what} | {target.wanted} | {ratio_text(target.ratios)} "
            f"| {'yes' if met else 'no'} |"
        )
    if not rows:
        return []
    return ["", "| Target | Wanted | Measured | Met |", "|---|---|---|---|", *rows, ""]


def ratio_text(ratios: tuple[float, ...] | list[float]) -> str:
    """Median of ratios, and their spread if there are several."""
    from bench.harness.machine import spread

    found = spread(ratios)
    text = f"{found['median']:.3g}"
    if found["pairs"] > 1:
        text += f" ({found['min']:.3g} to {found['max']:.3g})"
    return text
