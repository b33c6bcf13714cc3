"""Plots in one style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Points of each line, by label."""


def line_plot(
    path: Path, lines: Lines, xlabel: str, ylabel: str, title: str = "", log: bool = False
) -> Path:
    """Draw lines with marked points.

    Parameters
    ----------
    path : Path
        File to write, PNG or SVG.
    lines : mapping of str to sequence of (float, float)
    xlabel, ylabel, title : str
    log : bool
        Both axes logarithmic.

    Returns
    -------
    Path
        ``path``.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (label, points), marker in zip(lines.items(), "osD^vP*X<>hd" * 4, strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, markersize=5, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log:
        from matplotlib.ticker import LogFormatter

        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            # Numbers between the powers of ten too, where there are few of these.
            axis.set_major_formatter(LogFormatter())
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def bar_plot(path: Path, values: Mapping[str, float], xlabel: str, title: str = "") -> Path:
    """Draw a horizontal bar for each label, with its value, the first on top.

    Parameters
    ----------
    path : Path
        File to write, PNG or SVG.
    values : mapping of str to float
    xlabel, title : str

    Returns
    -------
    Path
        ``path``.
    """
    pyplot = _pyplot()
    size = (7, 0.9 + 0.4 * len(values))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=xlabel, title=title)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
