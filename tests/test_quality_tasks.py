"""The tasks make the same cases again, of the wished length, with the answers in them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from quality_tools import WordTokenizer, write_texts

from bench.quality.tasks import TASKS, Case, prompt_ids, texts
from bench.quality.tasks.case import TaskError, largest, match_all, match_part
from bench.quality.tasks.haystack import DEPTHS, first_words, planted
from bench.quality.tasks.passkey import Needle
from bench.quality.tasks.words import WORDS, sample_words

LENGTH = 1500
GENERATING = [name for name in TASKS if name != "lm"]
ROOT = Path(__file__).parents[1]

# RULER's longest unit of a haystack, in tokens of `WordTokenizer`; the others are below 2 %.
UNITS = {"niah_multikey_2": 32, "niah_multikey_3": 90}


@pytest.fixture(autouse=True)
def own_texts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path_factory.mktemp("texts")
    files = write_texts(directory)
    monkeypatch.setenv(texts.VARIABLE, ":".join(map(str, files)))


@pytest.mark.parametrize("name", TASKS)
def test_length_determinism_and_keys(name: str) -> None:
    tokenizer = WordTokenizer()
    cases = TASKS[name].cases(4, LENGTH, tokenizer, 7)
    assert cases == TASKS[name].cases(4, LENGTH, tokenizer, 7)
    assert cases[:2] == TASKS[name].cases(2, LENGTH, tokenizer, 7)
    assert cases != TASKS[name].cases(4, LENGTH, tokenizer, 8)
    assert len({case.key for case in cases}) == 4
    for case in cases:
        assert case.task == name and case.details["tokens"] == LENGTH
        size = len(prompt_ids(case, tokenizer).context)
        assert LENGTH - max(0.02 * LENGTH, UNITS.get(name, 0)) <= size <= LENGTH
        assert case.max_tokens >= 1 and case.question


@pytest.mark.parametrize("name", GENERATING)
def test_answers_are_in_the_context_and_score(name: str) -> None:
    task = TASKS[name]
    for case in task.cases(4, LENGTH, WordTokenizer(), 0):
        assert case.answers and all(answer in case.context for answer in case.answers)
        assert not any(answer in case.question for answer in case.answers)
        assert task.score(" " + ", ".join(case.answers) + ". And more.", case) == 1
        assert task.score("", case) == task.score("I do not know.", case) == 0


def test_another_process_makes_the_same() -> None:
    """No hash of this process is in a case."""
    program = (
        "from quality_tools import WordTokenizer\n"
        "from bench.quality.tasks import TASKS\n"
        "t = WordTokenizer()\n"
        "print([TASKS[n].cases(1, 1500, t, 3) for n in ('fwe', 'cwe', 'vt', 'niah_multikey_1')])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**texts.os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_depths() -> None:
    """Ten cases lie at ten depths, and the first few already spread."""
    assert sorted(DEPTHS) == pytest.approx([0.05 + 0.1 * index for index in range(10)])
    for name in ("passkey", "needle", "niah_single_1"):
        for case in TASKS[name].cases(10, LENGTH, WordTokenizer(), 0):
            place = case.context.index(case.answers[0]) / len(case.context)
            assert place == pytest.approx(case.details["depth"], abs=0.1), name


def test_formats_are_rulers() -> None:
    """The prompts of RULER's templates, by hand."""
    tokenizer = WordTokenizer()
    (one,) = TASKS["niah_single_2"].cases(1, LENGTH, tokenizer, 0)
    assert one.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    (key, value) = re.findall(
        r"One of the special magic numbers for (\w+-\w+) is: (\d{7})\.", one.context
    )[0]
    assert one.answers == (value,)
    assert one.question == (
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    (many,) = TASKS["niah_multiquery"].cases(1, LENGTH, tokenizer, 0)
    needles = dict(re.findall(r"magic numbers for (\w+-\w+) is: (\d{7})\.", many.context))
    assert len(needles) == 4 and many.context.startswith("Some special magic numbers are hidden")
    asked = re.findall(r"What are all the special magic numbers for (.*) mentioned", many.question)
    names = re.split(r", (?:and )?", asked[0].split(" mentioned")[0])
    assert tuple(needles[name] for name in names) == many.answers
    (values,) = TASKS["niah_multivalue"].cases(1, LENGTH, tokenizer, 0)
    pairs = re.findall(r"magic numbers for (\w+-\w+) is: (\d{7})\.", values.context)
    assert len({name for name, _ in pairs}) == 1
    assert {value for _, value in pairs} == set(values.answers) and len(values.answers) == 4
    (uuids,) = TASKS["niah_multikey_3"].cases(1, LENGTH, tokenizer, 0)
    known = dict(re.findall(r"magic uuids for (\S{36}) is: (\S{36})\.", uuids.context))
    assert known[re.findall(r"\S{36}", uuids.question)[0]] == uuids.answers[0]


@pytest.mark.parametrize("name", GENERATING)
def test_chat_template(name: str) -> None:
    """The start of the answer is the assistant's; nothing else changes."""
    tokenizer = WordTokenizer()
    (case,) = TASKS[name].cases(1, LENGTH, tokenizer, 0)
    start = case.details["answer_start"]
    assert start.strip() and case.question.endswith(start) and case.question != start
    prompt = prompt_ids(case, tokenizer, chat=True)
    assert tokenizer.decode(prompt.context) == f"[user] {case.context}"
    asked = case.question.removesuffix(start)
    assert tokenizer.decode(prompt.question) == f"{asked} [end] [assistant] {start.strip()}"
    plain = prompt_ids(case, tokenizer)
    assert tokenizer.decode(plain.context + plain.question) == case.context + case.question


def test_multikey_asks_for_one_of_four() -> None:
    (case,) = TASKS["niah_multikey_1"].cases(1, LENGTH, WordTokenizer(), 0)
    needles = dict(re.findall(r"magic numbers for (\w+-\w+) is: (\d{7})\.", case.context))
    (asked,) = re.findall(r"What is the special magic number for (\S+) mentioned", case.question)
    assert len(needles) == 4 and (needles[asked],) == case.answers


@pytest.mark.parametrize(("name", "hops"), [("vt", 4), ("vt_1", 1)])
def test_variables_are_tracked(name: str, hops: int) -> None:
    """Following the assignments of the text gives the answers."""
    (case,) = TASKS[name].cases(1, LENGTH, WordTokenizer(), 0)
    example, text = case.context.split("Memorize and track")[1:]
    (value,) = re.findall(r"assigned the value (\d{5}) in", case.question)
    for part, wanted in ((text, value), (example, None)):
        held: dict[str, str] = {}
        for name_, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d{5})", part):
            held[name_] = held.get(source, source)
        assert len(held) == hops + 1 and len(set(held.values())) == 1
        if wanted:
            assert set(held.values()) == {wanted} and set(held) == set(case.answers)
        else:
            assert part.rstrip().endswith(" ".join(held))


def test_common_words_are_the_most_common() -> None:
    for length, often, seldom in ((LENGTH, 6, 1), (5000, 30, 3)):
        (case,) = TASKS["cwe"].cases(1, length, WordTokenizer(), 0)
        listed = case.context.split("Memorize the ones")[-1]
        counts = Counter(re.findall(r"\d+\. ([\w-]+)", listed))
        assert {word for word, count in counts.items() if count == often} == set(case.answers)
        assert set(counts.values()) == {often, seldom} and len(case.answers) == 10


def test_frequent_words_follow_the_zeta_distribution() -> None:
    """The third-ranked of the vocabulary stands a ninth as often as the noise, and so on."""
    (case,) = TASKS["fwe"].cases(1, LENGTH, WordTokenizer(), 0)
    counts = Counter(case.context.split("coded words. ")[1].split())
    (noise, first), *ranked = counts.most_common()
    assert noise == "..." and {word for word, _ in ranked[:3]} == set(case.answers)
    for rank, (_, count) in enumerate(ranked[:3], 2):
        assert count == pytest.approx(first / rank**2, abs=1)


def test_language_goes_on_where_the_context_ends() -> None:
    tokenizer = WordTokenizer()
    first, second = TASKS["lm"].cases(2, 600, tokenizer, 0)
    assert {first.details["source"], second.details["source"]} == {"text0.txt", "text1.txt"}
    for case in (first, second):
        source = next(name for name in texts.source_names() if case.details["source"] in name)
        whole = (case.context + case.question).replace(" \n", "\n")
        assert whole in texts.prose(source)
        assert len(prompt_ids(case, tokenizer).question) == pytest.approx(256, abs=8)


def test_scores_by_hand() -> None:
    assert match_all("the FIRST and second", ["first", "second", "third"]) == pytest.approx(2 / 3)
    assert match_part("the second", ["first", "second"]) == 1
    assert match_part("none of these", ["first", "second"]) == 0
    assert match_all("fi\x00rst", ["first"]) == 0
    case = Case("needle", "k", "", "", ("eat a sandwich and sit",), 8)
    assert Needle().score(" to sit and eat.\nEat a sandwich", case) == pytest.approx(2 / 3)
    assert Needle().score(" to be in the park and on a boat.", case) == 0


def test_largest() -> None:
    for answer in (0, 1, 7, 100):
        for guess in (0, 1, 5, 1000):
            assert largest(lambda size, answer=answer: size <= answer, guess) == answer
    with pytest.raises(TaskError, match="too short"):
        largest(lambda size: False, 1)
    with pytest.raises(TaskError, match="too short"):
        TASKS["passkey"].cases(1, 20, WordTokenizer(), 0)


def test_haystacks() -> None:
    assert first_words(["a b c.", "d e f."], 4) == ["a b c.", "d"]
    assert first_words(["a b c.", "d e f."], 0) == []
    assert planted(list("abcd"), ["X", "Y"], [0, 0.5], " ") == "X a b Y c d"
    assert planted(list("ab"), ["X"], [1], "-") == "a-b-X"


def test_more_words_than_the_list_has() -> None:
    import random

    words = sample_words(random.Random(0), len(WORDS) + 50)
    assert len(set(words)) == len(WORDS) + 50


def test_texts_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(texts.VARIABLE, str(tmp_path / "none.txt"))
    with pytest.raises(texts.TextsError, match="not a file"):
        texts.source_names()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(texts.TextsError, match="apt-get, which is not here"):
        texts._unpacked(("dict-jargon",))


def test_prose_leaves_tables_out(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_text(
        "A paragraph of prose that\nis long enough to stay here.\n\n"
        "| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 |.\n\nToo short.\n"
    )
    assert texts.prose(str(path)) == "A paragraph of prose that is long enough to stay here."
    empty = tmp_path / "empty.txt"
    empty.write_text("1234\n")
    with pytest.raises(texts.TextsError, match="no paragraphs"):
        texts.prose(str(empty))
