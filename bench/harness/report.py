"""The suite's report: Markdown with plots, from the results on disk."""

from __future__ import annotations

from pathlib import Path

from bench.harness.registry import available, scenario
from bench.harness.store import Store


def write_report(store: Store) -> Path:
    """Write ``report.md`` and the plots beside ``results.json``.

    Parameters
    ----------
    store : Store

    Returns
    -------
    Path
        The report.
    """
    about = store.data["machine"]
    versions = ", ".join(store.versions()) or about["vllm_kvcompress"]
    lines = [
        "# Benchmark results",
        "",
        f"{about['cpu']}, {about['cores']} cores; Python {about['python']}, "
        f"torch {about['torch']}, vLLM {about['vllm']}, vllm_kvcompress {versions}; "
        f"{dates(store)}. [All figures](results.json); docs/benchmarks.md says how they are made.",
        "",
        *(f"    {command}" for command in store.data["commands"]),
        "",
        "Ratios are medians over the repeats, with the smallest and largest in brackets.",
    ]
    for name in available():
        results = store.results(name)
        if not results:
            continue
        chosen = scenario(name)
        lines += ["", f"## {chosen.title}", "", *chosen.report(results)]
        for plot in chosen.plots(results, store.directory):
            lines += ["", f"![{plot.stem.replace('-', ' ')}]({plot.name})"]
    failures = [
        f"- {name}, {key}: {message}"
        for name, found in store.data["failures"].items()
        for key, message in found.items()
    ]
    if failures:
        lines += ["", "## Failed cases", "", *failures]
    path = store.directory / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def dates(store: Store) -> str:
    """Day, or first and last day, on which results were measured."""
    rows = (row for part in store.data["results"].values() for row in part.values())
    days = sorted({row["at"][:10] for row in rows})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no results yet"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
