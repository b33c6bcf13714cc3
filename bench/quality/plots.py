"""Plots of result rows: score over share removed, depth x length heat maps, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.quality.plan import LANGUAGE
from bench.quality.rows import OURS, PROTOCOLS, Row
from bench.quality.stats import Contender, Results, perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRIDS = ("passkey", "needle")
"""Tasks drawn as heat maps."""


def plot_all(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write all plots that the rows allow.

    Parameters
    ----------
    rows : sequence of Row
    stem : Path
        Directory and start of the file names.

    Returns
    -------
    list of Path
        PNG files.
    """
    written = []
    models = list(dict.fromkeys(row.model for row in rows))
    for model in models:
        own = [row for row in rows if row.model == model]
        middle = f"-{model}" if len(models) > 1 else ""
        for protocol in PROTOCOLS:
            results = Results(own, protocol)
            if not results.contenders:
                continue
            figures = {"means": means_figure(results), "lm": language_figure(results)}
            for task in GRIDS:
                figures[task] = heat_map(results, task)
            for name, figure in figures.items():
                if figure is not None:
                    path = stem.with_name(f"{stem.name}{middle}-{protocol}-{name}.png")
                    figure.savefig(path, dpi=110)
                    written.append(path)
    return written


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure outside of pyplot, which needs no display and is freed by itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def means_figure(results: Results) -> Figure | None:
    """Mean score over the counted tasks against the share removed."""
    tasks = results.counted_tasks()
    if not tasks:
        return None
    figure, axes = _new(9.5, 4.5)
    axis = axes[0, 0]
    full = np.mean([results.baseline(task) or 0.0 for task in tasks])
    axis.axhline(100 * full, color="black", linewidth=1, label="full cache")
    for number, name in enumerate(results.contenders):
        points = [
            (100 * share, 100 * found.mean)
            for share in results.shares
            if (found := results.estimate(tasks, name, share)) is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), label=name.label, **_style(name, number))
    axis.set(xlabel="removed, %", ylabel="score, points of 100", ylim=(0, 100))
    axis.set_title(f"Mean over {len(tasks)} tasks, {results.protocol}")
    _legend_beside(figure)
    return figure


def language_figure(results: Results) -> Figure | None:
    """Perplexity against the share removed, over all lengths."""
    full = perplexity(results.full(LANGUAGE).values())
    if full is None:
        return None
    figure, axes = _new(9.5, 4.5)
    axis = axes[0, 0]
    axis.axhline(full, color="black", linewidth=1, label="full cache")
    for number, name in enumerate(results.contenders):
        points = [
            (100 * share, found)
            for share in results.shares
            if (found := perplexity(results.rows(LANGUAGE, name, share).values())) is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), label=name.label, **_style(name, number))
    axis.set(xlabel="removed, %", ylabel="perplexity", yscale="log")
    axis.set_title(f"Language modelling, {results.protocol}")
    _legend_beside(figure)
    return figure


def _legend_beside(figure: Figure) -> None:
    """Many lines cross the whole picture: a legend among them would hide some."""
    figure.legend(loc="outside right upper", fontsize="small")


def _style(name: Contender, number: int) -> dict[str, Any]:
    ours = name.implementation == OURS
    return {
        "color": f"C{number % 10}",
        "marker": "o" if ours else "x",
        "linestyle": "-" if ours else "--",
    }


def heat_map(results: Results, task: str) -> Figure | None:
    """Depth x length grids of a task: a column per method, a row per share.

    Parameters
    ----------
    results : Results
    task : str

    Returns
    -------
    Figure or None
        None if the task has no rows.
    """
    full = results.full(task)
    names = [name for name in results.contenders if results.shares and _any(results, task, name)]
    if not full or not names:
        return None
    depths = sorted({row.depth for row in full.values() if row.depth is not None})
    lengths = sorted({row.tokens for row in full.values()})
    figure, axes = _new(
        1.2 + (0.7 + 0.35 * len(lengths)) * (len(names) + 1),
        0.8 + 1.9 * len(results.shares),
        len(results.shares),
        len(names) + 1,
    )
    for line, share in zip(axes, results.shares, strict=True):
        columns = [("full cache", full)]
        columns += [(name.label, results.rows(task, name, share)) for name in names]
        for axis, (title, rows) in zip(line, columns, strict=True):
            grid = np.full((len(depths), len(lengths)), np.nan)
            for y, depth in enumerate(depths):
                for x, length in enumerate(lengths):
                    scores = [
                        row.score
                        for row in rows.values()
                        if row.depth == depth and row.tokens == length
                    ]
                    grid[y, x] = np.mean(scores) if scores else np.nan
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
            axis.tick_params(labelsize=6, axis="both")
            axis.tick_params(axis="x", labelrotation=90)
            if axis in axes[0]:
                axis.set_title(title, fontsize=8)
        line[0].set_ylabel(f"{100 * share:.0f} % removed\ndepth, %", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="score")
    figure.suptitle(f"{task}, {results.protocol}", fontsize=10)
    return figure


def _any(results: Results, task: str, name: Contender) -> bool:
    return any(results.rows(task, name, share) for share in results.shares)
