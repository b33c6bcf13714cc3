"""The benchmarks run and say what they promise to; their figures are for quiet machines."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    """Output of a benchmark, in a process of its own, on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture(scope="module")
def compaction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "compaction.json"
    path.write_text(run("bench.compaction", "--quick"))
    return path


def test_compaction_reports_every_case(compaction: Path) -> None:
    from bench.compaction import CASES, POOLINGS, QUICK, TYPES

    report = json.loads(compaction.read_text())
    assert {"command", "machine", "threads", "band", "isa"} <= report.keys()
    assert report["threads"] == 1
    kinds = [(shape, cache) for shape in QUICK.shapes for cache in TYPES]

    def cases(part: str, *keys: str) -> list[tuple[Any, ...]]:
        return [tuple(row[key] for key in ("shape", "cache", *keys)) for row in report[part]]

    assert cases("compaction", "method", "tokens") == [
        (*kind, name, tokens) for kind in kinds for name in CASES for tokens in QUICK.lengths
    ]
    assert cases("two_blocks", "pooling", "merges") == [
        (*kind, name, pairs) for kind in kinds for name in POOLINGS for pairs in QUICK.pairs
    ]
    assert cases("growth", "method") == [(*kind, name) for kind in kinds for name in CASES]

    found = list(numbers([report["compaction"], report["two_blocks"], report["growth"]]))
    assert all(math.isfinite(number) and number > 0 for number in found)
    for row in report["compaction"] + report["two_blocks"]:
        assert row["ratio"] == pytest.approx(row["seconds"] / row["memcpy_seconds"])
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])


def test_compaction_counts_the_bytes_that_plans_need(compaction: Path) -> None:
    rows = json.loads(compaction.read_text())["compaction"]
    (row,) = [
        (r["shape"], r["blocks_before"], r["blocks_after"])
        for r in rows
        if (r["method"], r["cache"], r["tokens"]) == ("knorm", "float32", 512)
    ]
    assert row == ("SmolLM2", 16, 4)
    half = 5 * 3 * 32 * 64 * 4  # layers, heads, tokens of a block, head size, bytes
    found = {
        r["method"]: r["bytes"] // half
        for r in rows
        if (r["cache"], r["tokens"]) == ("float32", 512)
    }
    # Keys of 16 blocks and values of 4, then both of 4.
    assert found["knorm"] == found["keydiff"] == 16 + 4 + 2 * 4
    # Keys and values of 16 blocks, then both of 4.
    assert found["kvdiff"] == 2 * 16 + 2 * 4
    assert found["streaming"] == found["random"] == 4 * 4
    # 15 blocks behind the sinks' own become 5: one per power of two.
    merged = [r for r in rows if r["method"] == "merge, mean" and r["tokens"] == 512]
    assert {(r["blocks_before"], r["blocks_after"]) for r in merged} == {(16, 6)}


def test_compaction_prints_tables(compaction: Path) -> None:
    from bench.compaction import markdown

    table = markdown(json.loads(compaction.read_text()))
    assert "python -m bench.compaction --quick" in table
    assert "| `merge, mean` |" in table
    assert "| two blocks into one |" in table


def test_compaction_prints_tables_of_runs_with_fewer_cases(compaction: Path) -> None:
    from bench.compaction import markdown

    report = json.loads(compaction.read_text())
    report["compaction"] = [r for r in report["compaction"] if r["method"] != "kvdiff"]
    table = markdown(report)
    assert "| `keydiff` |" in table and "kvdiff" not in table


def test_the_suite_reports_and_draws_compactions(compaction: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the bench extra")
    from bench.scenarios.pages import Compaction

    results = {"quick, SmolLM2": json.loads(compaction.read_text())}
    text = "\n".join(Compaction().report(results))
    assert "| `merge, mean` |" in text and "From 256 to 512 tokens, 2.0 times as many" in text
    plots = Compaction().plots(results, tmp_path)
    assert len(plots) == 3 and all(plot.stat().st_size > 10_000 for plot in plots)
