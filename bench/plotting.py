"""Plots in one style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (label, points), marker in zip(lines.items(), "osD^vP*X<>hd" * 4, strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, markersize=5, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log:
        axes.set(xscale="log", yscale="log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
