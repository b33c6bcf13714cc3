"""LongBench's metrics against cases computed by hand, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quality_tools import WordTokenizer

from bench.quality.longbench import metrics
from bench.quality.longbench.files import LongBenchError, longbench_tasks

FILES = Path(__file__).parent / "longbench"


@pytest.mark.parametrize(
    ("prediction", "answer", "wanted"),
    [
        ("The Eiffel Tower", "eiffel tower!", 1),
        ("in Paris, France", "Paris", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("to be or not to be", "to be", 2 * (2 / 6) * 1 / (2 / 6 + 1)),
        ("London", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_qa_f1(prediction: str, answer: str, wanted: float) -> None:
    assert metrics.qa_f1(prediction, answer) == pytest.approx(wanted)


def test_rouge_l() -> None:
    pytest.importorskip("rouge_score", reason="the extra quality is not installed")
    # Longest common subsequence "police the gunman" of 4 and 4 words: 3/4 and 3/4.
    assert metrics.rouge_l("police ended the gunman", "police killed the gunman") == 0.75
    # Sentences are matched apart: all 4 of 4 words, in the other order of sentences.
    assert metrics.rouge_l("C d. A b.", "A b. C d.") == 1
    assert metrics.rouge_l("", "A b.") == 0


def test_classification() -> None:
    classes = ["Date", "City", "Other city", "Number"]
    assert metrics.classification("Type: Date", "Date", classes) == 1
    assert metrics.classification("Date or Number", "Date", classes) == 0.5
    assert metrics.classification("Number", "Date", classes) == 0
    # "City" is a part of the right name and does not count against it.
    assert metrics.classification("Big City", "Big City", ["City", "Big City"]) == 1
    assert metrics.classification("nothing", "Date", classes) == 0


def test_count_and_retrieval() -> None:
    assert metrics.count("There are 12, not 13", "12") == 0.5
    assert metrics.count("none", "12") == 0
    assert metrics.retrieval("Paragraph 7", "Paragraph 7") == 1
    assert metrics.retrieval("7 or 8 or 9", "Paragraph 7") == pytest.approx(1 / 3)
    assert metrics.retrieval("Paragraph 70", "Paragraph 7") == 0


def test_code_similarity() -> None:
    pytest.importorskip("rapidfuzz", reason="the extra quality is not installed")
    # Edits without substitution: 2 of 8 characters differ, so 1 - 2 / 8.
    assert metrics.code_similarity("\nabcd\nrest", "abce") == 0.75
    assert metrics.code_similarity("```python\n# note\nx = 1", "x = 1") == 1
    assert metrics.code_similarity("# only a note", "x = 1") == 0
    # Whole percent, as LongBench's library rounds: 2 * 2 / 6 = 0.667.
    assert metrics.code_similarity("abx", "aby") == 0.67


def test_first_line_only_where_longbench_has_it() -> None:
    assert metrics.score("trec", "\n\nDate\nNumber", ["Date"], ["Date", "Number"]) == 1
    assert metrics.score("triviaqa_e", "Paris\nLondon Rome", ["Paris"], []) == 1
    assert metrics.score("hotpotqa", "Paris\nLondon Rome", ["Paris"], []) == pytest.approx(0.5)
    assert metrics.score("qasper", "yes", ["no", "yes"], []) == 1
    assert metrics.score("qasper", "yes", [], []) == 0


def test_files_of_our_own() -> None:
    tasks = longbench_tasks(FILES)
    assert set(tasks) == {f"longbench/{name}" for name in ("hotpotqa", "trec", "passage_count")}
    tokenizer = WordTokenizer()
    for task in tasks.values():
        cases = task.cases(10, 400, tokenizer, 0)
        assert cases == task.cases(10, 400, tokenizer, 0) and len(cases) == 2
        assert len({case.key for case in cases}) == 2
        for case in cases:
            assert len(tokenizer.encode(case.context)) <= 400
            assert task.score(case.answers[0], case) == 1
            assert task.score("", case) == 0


def test_prompts_of_the_directory(tmp_path: Path) -> None:
    line = {"input": "Who {x}?", "context": "word " * 300 + "{input} end", "answers": ["I"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(line) + "\n\n")
    (tmp_path / "dataset2prompt.json").write_text('{"qasper": "Read: {context}\\nQ: {input}\\nA:"}')
    (tmp_path / "dataset2maxlen.json").write_text('{"qasper": 77}')
    (task,) = longbench_tasks(tmp_path).values()
    (case,) = task.cases(5, 100, WordTokenizer(), 0)
    assert case.question == "\nQ: Who {x}?\nA:" and case.max_tokens == 77
    # The middle is left out: both ends are there.
    assert case.context.startswith("Read: word") and case.context.endswith("{input} end")
    assert 90 <= len(WordTokenizer().encode(case.context)) <= 100


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(LongBenchError, match="no JSONL file"):
        longbench_tasks(tmp_path)
    (tmp_path / "qasper.jsonl").write_text('{"input": "a"}\n')
    with pytest.raises(LongBenchError, match="there are qasper"):
        longbench_tasks(tmp_path, ["trec"])
    with pytest.raises(LongBenchError, match="Chinese"):
        longbench_tasks(tmp_path, ["dureader"])
    (task,) = longbench_tasks(tmp_path).values()
    with pytest.raises(LongBenchError, match=r"line 1 lacks answers, context"):
        task.cases(1, 100, WordTokenizer(), 0)
