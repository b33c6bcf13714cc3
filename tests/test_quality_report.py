"""Means, intervals, tables and plots of rows made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.quality import __main__ as command
from bench.quality.report import markdown
from bench.quality.rows import FULL, OURS, STRICT, Row, RowsError
from bench.quality.stats import Contender, Results, perplexity


def row(task: str, method: str, removed: float, index: int, score: float, **more: object) -> Row:
    values = {
        "key": f"{task}-{index}",
        "model": "m",
        "implementation": OURS,
        "protocol": STRICT,
        "prediction": "x",
        "prompt": f"{index:016d}",
        "tokens": 1000,
    }
    return Row(task=task, method=method, removed=removed, score=score, **{**values, **more})


def two_tasks() -> list[Row]:
    """Full: 100 and 50. knorm at 50 %: 75 and 50, at 90 %: 0 and 0; the third task fails."""
    rows = []
    for index in range(4):
        rows += [row("a", FULL, 0, index, 1), row("b", FULL, 0, index, index % 2)]
        rows += [row("a", "knorm", 0.5, index, index != 0, kept=0.52)]
        rows += [row("b", "knorm", 0.5, index, (index + 1) % 2)]
        rows += [row("a", "knorm", 0.9, index, 0), row("b", "knorm", 0.9, index, 0)]
        rows += [row("c", FULL, 0, index, index == 5), row("c", "knorm", 0.5, index, 0)]
    return rows


KNORM = Contender(OURS, "", "knorm")


def test_means_and_what_is_counted() -> None:
    results = Results(two_tasks(), STRICT)
    assert results.counted_tasks() == ["a", "b"]
    assert results.shares == [0.5, 0.9] and results.contenders == [KNORM]
    half = results.estimate(["a", "b"], KNORM, 0.5)
    assert half is not None and half.cases == 8
    assert half.mean == pytest.approx((0.75 + 0.5) / 2)
    assert half.loss == pytest.approx((0.25 + 0) / 2)
    most = results.estimate(["a", "b"], KNORM, 0.9)
    assert most is not None and (most.mean, most.loss) == (0, 0.75)
    assert results.estimate(["a", "b"], KNORM, 0.25) is None
    assert results.kept(KNORM, 0.5) == pytest.approx(0.52)


def test_baseline_at_the_limit_counts() -> None:
    rows = [row("a", FULL, 0, index, index == 0) for index in range(5)]
    assert Results(rows, STRICT).counted_tasks() == ["a"]
    rows = [row("a", FULL, 0, index, 0.19) for index in range(5)]
    assert Results(rows, STRICT).counted_tasks() == []


def test_interval() -> None:
    """Of a loss that is the same in every case it is a point; else near the normal one."""
    results = Results(two_tasks(), STRICT)
    only_a = results.estimate(["a"], KNORM, 0.9)
    assert only_a is not None and only_a.low == only_a.high == 1
    random = np.random.default_rng(1)
    scores = random.random(400)
    rows = [row("a", FULL, 0, index, 1) for index in range(400)]
    rows += [row("a", "knorm", 0.5, index, score) for index, score in enumerate(scores)]
    found = Results(rows, STRICT).estimate(["a"], KNORM, 0.5)
    assert found is not None
    half = 1.96 * scores.std() / 20
    assert found.high - found.loss == pytest.approx(half, rel=0.1)
    assert found.loss - found.low == pytest.approx(half, rel=0.1)
    assert found == Results(rows, STRICT).estimate(["a"], KNORM, 0.5)


def test_losses_are_against_the_own_full_cache() -> None:
    """Only cases that both have are compared."""
    rows = two_tasks()
    press = {"implementation": "kvpress"}
    rows += [row("a", FULL, 0, index, 0.5, **press) for index in range(2)]
    rows += [row("a", "snapkv", 0.5, index, 0.25, **press) for index in range(4)]
    found = Results(rows, STRICT).estimate(["a"], Contender("kvpress", "", "snapkv"), 0.5)
    assert found is not None and (found.cases, found.mean, found.loss) == (2, 0.25, 0.25)


def test_other_prompts_are_refused() -> None:
    rows = [*two_tasks(), row("a", "snapkv", 0.5, 0, 1, implementation="kvpress", prompt="f")]
    with pytest.raises(RowsError, match="kvpress and vllm-kvcompress answered different prompts"):
        Results(rows, STRICT)


def test_perplexity() -> None:
    rows = [
        row("lm", FULL, 0, 0, 0.5, nll=1.0, scored_tokens=100),
        row("lm", FULL, 0, 1, 0.5, nll=2.0, scored_tokens=300),
    ]
    assert perplexity(rows) == pytest.approx(np.exp(1.75))
    assert perplexity(two_tasks()) is None


def test_markdown() -> None:
    rows = two_tasks()
    for share, nll in ((0.0, 2.0), (0.5, 2.5)):
        name = "knorm" if share else FULL
        rows.append(row("lm", name, share, 0, 0.4, nll=nll, scored_tokens=100))
    text = markdown(rows)
    assert "mean over 2 tasks (a, b)" in text
    assert "| Full cache | 75.0 | 75.0 |" in text
    assert "| knorm | 62.5 (-12.5; " in text and "| 0.0 (-75.0; " in text
    assert "Not in the means, because the full cache scores below 20: c (0.0)." in text
    assert "| knorm | 50 % | 75.0 | 50.0 | 0.0 |" in text
    assert "| Cases |  | 4 | 4 | 4 |" in text
    assert "| knorm | 52.0 |  |" in text
    assert "| 1,000 | Full cache | 7.39 (40.0) | 7.39 (40.0) |" in text
    assert "| 1,000 | knorm | 12.18 (40.0) |  |" in text
    assert "(+0.0; +0.0 to +0.0)" in markdown(
        [row("a", name, 0.5 * (name != FULL), 0, 1) for name in (FULL, "knorm")]
    )
    assert markdown([]) == "No rows.\n"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") >= 3 for line in lines)


def test_files_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra quality is not installed")
    rows = two_tasks()
    for share in (0.0, 0.5, 0.9):
        name = "knorm" if share else FULL
        for index, (depth, tokens) in enumerate([(0.1, 500), (0.9, 500), (0.1, 900)]):
            rows.append(row("passkey", name, share, index, 1 - share, depth=depth, tokens=tokens))
        rows.append(row("lm", name, share, 0, 0.4, nll=2 + share, scored_tokens=100))
    for number, part in enumerate((rows[:30], rows[30:])):
        text = "".join(one.line() + "\n" for one in part)
        (tmp_path / f"rows{number}.jsonl").write_text(text)
    files = [str(tmp_path / f"rows{number}.jsonl") for number in (0, 1)]
    assert command.main(["report", *files, "--stem", str(tmp_path / "out" / "all")]) == 0
    printed = capsys.readouterr().out.split()
    names = ["all.md", "all-strict-means.png", "all-strict-lm.png", "all-strict-passkey.png"]
    assert [Path(path).name for path in printed] == names
    text = Path(printed[0]).read_text()
    for path in map(Path, printed[1:]):
        assert f"]({path.name})" in text
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 8000
