"""The dense comparison of methods: contenders, answers fed, rows and the table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from check_tools import tiny_model

from bench.methods import FULL, Contender, Told, evaluate, run, table, told
from bench.quality.tasks import Case
from vllm_kvcompress.check.attention import own_attention
from vllm_kvcompress.check.dense import Shape, compute
from vllm_kvcompress.settings import parse_settings


class Characters:
    """A token per character; a colon or comma and the space after it are one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text.replace(": ", "\1").replace(", ", "\2")]


CASE = Case("niah", "niah-0", "x" * 120, "What is the number? It is", ("12", "345"), 8)


def test_contender_has_the_defaults_of_the_settings():
    contender = Contender.of("keydiff")
    defaults = parse_settings({})
    assert contender.shape == Shape(
        defaults.sink_tokens, defaults.recent_tokens, defaults.recent_ratio
    )
    assert contender.keep(0.5, 1000, 4) == (500,) * 4


@pytest.mark.parametrize("ratio", ["nan", "-0.1", "1.5"])
def test_contender_with_no_share_of_recent_tokens_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio is a share"):
        Contender.of(f"knorm:ratio={ratio}")


def test_contender_reads_its_settings():
    contender = Contender.of("knorm:sinks=0,recent=8,ratio=0.25,skip=0+2,beta=2")
    assert contender.shape == Shape(0, 8, 0.25)
    assert (contender.method, contender.skip, contender.beta) == ("knorm", (0, 2), 2.0)


@pytest.mark.parametrize("name", ["kdiff", "knorm:sink=1", "knorm:fast"])
def test_unknown_contenders_are_refused(name):
    with pytest.raises(ValueError, match="is no contender"):
        Contender.of(name)


@pytest.mark.parametrize("settings", ["beta=2", "skip=0+1", "skip=3,beta=0.5"])
def test_contenders_keep_equally_many_tokens(settings):
    keep = Contender.of(f"knorm:{settings}").keep(0.5, 1000, 10)
    assert sum(keep) == pytest.approx(5000, abs=10)
    assert keep != (500,) * 10


def test_answers_are_fed_after_the_question_and_begin_with_their_lead():
    fed = told(CASE, [5, 6, 7], Characters())
    assert fed.tokens == [5, 6, 7, *map(ord, " 12"), 2, *map(ord, "345")]
    assert [fed.tokens[first:last] for first, last in fed.answers] == [
        [*map(ord, " 12")],
        [2, *map(ord, "345")],
    ]


def test_language_modelling_scores_each_token():
    fed = told(dataclasses.replace(CASE, answers=()), [5, 6, 7], Characters())
    assert fed == Told([5, 6, 7], [(1, 2), (2, 3)])


@pytest.fixture(scope="module")
def model():
    model = tiny_model(2)
    with own_attention(model):
        yield model


def test_evaluate_is_what_the_model_would_have_chosen(model):
    context = compute(model, list(range(40)))
    ids = list(range(40, 50))
    for _ in range(3):  # its own greedy answer
        logits = model(torch.tensor([[*range(40), *ids]])).logits[0, -1]
        ids.append(int(logits.argmax()))
    score, logprob = next(evaluate(model, [context], 40, Told(ids, [(10, 12), (12, 13)])))
    assert score == 1
    wrong = [*ids[:-1], (ids[-1] + 1) % 128]
    assert next(evaluate(model, [context], 40, Told(wrong, [(10, 12), (12, 13)]))) < (0.51, logprob)


def test_rows_resume_and_make_a_table(model):
    contenders = [Contender.of("knorm:recent=8"), Contender.of("random:recent=8,skip=0")]
    rows = list(run(model, Characters(), [CASE], contenders, [0.5], set()))
    assert {(row["method"], row["removed"]) for row in rows} == {
        (FULL, 0.0),
        *((contender.name, 0.5) for contender in contenders),
    }
    assert len(rows) == 3
    known = {(row["key"], row["method"], row["removed"]) for row in rows[:2]}
    again = list(run(model, Characters(), [CASE], contenders, [0.5], known))
    assert again == rows[2:]
    lines = table(rows).splitlines()
    assert lines[0] == "| Removed | Method | Mean | Lost, nats | `niah` (1) |"
    assert len(lines) == 5
    assert lines[2].startswith("| 0% | `full` |")
