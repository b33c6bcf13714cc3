"""Markdown of result rows: a table of means, one of every task, one of language modelling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.quality.plan import LANGUAGE, LEAST_BASELINE
from bench.quality.rows import AFTER_PROMPT, DURING, STRICT, Row
from bench.quality.stats import Results, perplexity

TITLES = {
    STRICT: "Strict: the context is compressed before the question is known",
    AFTER_PROMPT: "After the prompt: the question is computed with the whole cache (flattering)",
    DURING: "During prefill: compressed while the text is read",
}


def markdown(rows: Sequence[Row]) -> str:
    """Tables of all models and protocols in the rows.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    str
    """
    if not rows:
        return "No rows.\n"
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        parts.append(f"## {model}\n")
        for protocol, title in TITLES.items():
            results = Results(own, protocol)
            if results.tasks:
                parts.append(f"### {title}\n")
                parts += _protocol(results)
    return "\n".join(parts)


def _protocol(results: Results) -> list[str]:
    counted = results.counted_tasks()
    generating = [task for task in results.tasks if task != LANGUAGE]
    left_out = [task for task in generating if task not in counted]
    parts = []
    if counted and results.contenders:
        parts += [
            f"Score in points of 100, mean over {len(counted)} task{'s' * (len(counted) != 1)} "
            f"({', '.join(counted)}); in brackets how far that is from the full cache, and the "
            "95 % interval of this by bootstrap over the cases.\n",
            _means(results, counted),
        ]
    if left_out:
        listed = ", ".join(f"{task} ({_points(results.baseline(task))})" for task in left_out)
        parts.append(
            f"Not in the means, because the full cache scores below "
            f"{100 * LEAST_BASELINE:.0f}: {listed}.\n"
        )
    if generating:
        parts += ["Every task, by share removed:\n", _tasks(results, generating)]
    if any(results.kept(name, share) for name in results.contenders for share in results.shares):
        parts += [
            "Really kept, in percent (whole blocks; sinks and recent tokens always stay):\n",
            _kept(results),
        ]
    if LANGUAGE in results.tasks:
        parts += [
            "Language modelling: perplexity, and in brackets the share of tokens predicted right, "
            "in percent.\n",
            _language(results),
        ]
    return parts


def _means(results: Results, tasks: list[str]) -> str:
    lines = [["Full cache", *([_mean_baseline(results, tasks)] * len(results.shares))]]
    for name in results.contenders:
        cells = [name.label]
        for share in results.shares:
            found = results.estimate(tasks, name, share)
            cells.append(
                f"{_points(found.mean)} ({_change(-found.loss)}; "
                f"{_change(-found.high)} to {_change(-found.low)})"
                if found
                else ""
            )
        lines.append(cells)
    return _table(["", *_share_heads(results)], lines)


def _mean_baseline(results: Results, tasks: list[str]) -> str:
    found = [results.baseline(task) for task in tasks]
    return _points(sum(value or 0.0 for value in found) / len(found))


def _tasks(results: Results, tasks: list[str]) -> str:
    lines = [["Full cache", "", *(_points(results.baseline(task)) for task in tasks)]]
    for share in results.shares:
        for name in results.contenders:
            found = [results.estimate([task], name, share) for task in tasks]
            if any(found):
                cells = [_points(one.mean) if one else "" for one in found]
                lines.append([name.label, f"{100 * share:.0f} %", *cells])
    counts = [str(len(results.full(task))) for task in tasks]
    lines.append(["Cases", "", *counts])
    return _table(["", "Removed", *tasks], lines)


def _kept(results: Results) -> str:
    lines = [
        [name.label, *(_points(results.kept(name, share)) for share in results.shares)]
        for name in results.contenders
    ]
    return _table(["", *_share_heads(results)], lines)


def _language(results: Results) -> str:
    lengths = sorted({row.tokens for row in results.full(LANGUAGE).values()})
    lines = []
    for length in lengths:

        def cell(rows: Iterable[Row], length: int = length) -> str:
            chosen = [row for row in rows if row.tokens == length]
            found = perplexity(chosen)
            if found is None:
                return ""
            right = sum(row.score * (row.scored_tokens or 0) for row in chosen)
            return (
                f"{found:.2f} ({100 * right / sum(row.scored_tokens or 0 for row in chosen):.1f})"
            )

        full = cell(results.full(LANGUAGE).values())
        lines.append([f"{length:,}", "Full cache", *([full] * len(results.shares))])
        for name in results.contenders:
            cells = [cell(results.rows(LANGUAGE, name, share).values()) for share in results.shares]
            if any(cells):
                lines.append([f"{length:,}", name.label, *cells])
    return _table(["Tokens", "", *_share_heads(results)], lines)


def _share_heads(results: Results) -> list[str]:
    return [f"{100 * share:.0f} % removed" for share in results.shares]


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _change(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # no -0.0


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_report(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write the Markdown and the plots of rows beside each other.

    Parameters
    ----------
    rows : sequence of Row
    stem : Path
        Directory and start of the file names.

    Returns
    -------
    list of Path
        What was written.
    """
    from bench.quality.plots import plot_all

    stem.parent.mkdir(parents=True, exist_ok=True)
    pictures = plot_all(rows, stem)
    text = markdown(rows)
    for picture in pictures:
        text += f"\n![{picture.stem}]({picture.name})\n"
    target = stem.with_name(stem.name + ".md")
    target.write_text(text, encoding="utf-8")
    return [target, *pictures]
