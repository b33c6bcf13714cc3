"""Gates per KV head: gated attention, learning, rows, the table and the choice."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from check_tools import tiny_model
from transformers import LlamaForCausalLM

from bench import heads
from bench.gates import divergence, gated_attention, make_lesson, mix
from bench.heads import choose, learn, main, ranked, table
from bench.methods import Told
from vllm_kvcompress.check.attention import own_attention
from vllm_kvcompress.check.dense import Shape, compress, follow
from vllm_kvcompress.methods import METHODS

LAYERS, KV_HEADS = 3, 2
CONTEXT = 60
SHAPE = Shape(2, 4)
METHOD = METHODS["knorm"]()
FED = Told([3, 14, 15, 9, 26, 5, 35, 8], [(3, 5), (5, 8)])
IMPORTANT = (1, 1)


def tiny(one_matters: bool = False) -> LlamaForCausalLM:
    """A random Llama; with ``one_matters`` all KV heads but one hardly reach its output."""
    model = tiny_model(LAYERS, initializer_range=0.3)
    if one_matters:
        for layer, head in itertools.product(range(LAYERS), range(KV_HEADS)):
            output = model.model.layers[layer].self_attn.o_proj.weight
            reached = slice(16 * head, 16 * (head + 1))  # two query heads of 8
            with torch.no_grad():
                output[:, reached] *= 4 if (layer, head) == IMPORTANT else 0.001
    return model


@pytest.fixture(scope="module")
def model():
    made = tiny()
    with gated_attention(made):
        yield made


def lessons_of(model, answered=False):
    lessons = []
    for seed, task in enumerate(("one", "one", "other")):
        torch.manual_seed(seed)
        ids = torch.randint(64, (CONTEXT,)).tolist()
        lessons.append(make_lesson(model, task, ids, FED, METHOD, 0.2, SHAPE, answered=answered))
    return lessons


def by_hand(query, key, value, kept, gates, scale):
    """What :func:`mix` is to be: queries and heads one by one, removed tokens left out."""
    output = torch.empty_like(query)
    heads, queries = query.shape[1:3]
    tokens = key.shape[2]
    for head, place in itertools.product(range(heads), range(queries)):
        of = head // (heads // key.shape[1])
        whole = list(range(tokens - queries + place + 1))
        small = [token for token in whole if token >= kept.shape[1] or kept[of, token]]
        sides = []
        for chosen in (whole, small):
            weights = (key[0, of, chosen] @ query[0, head, place] * scale).softmax(dim=0)
            sides.append(weights @ value[0, of, chosen])
        output[0, head, place] = gates[of] * sides[0] + (1 - gates[of]) * sides[1]
    return output


@pytest.mark.parametrize("gates", [(1.0, 1.0), (0.0, 0.0), (0.3, 0.9)])
def test_mix_is_attention_to_all_tokens_and_to_those_kept(gates):
    torch.manual_seed(1)
    query = torch.randn(1, 6, 3, 8)
    key, value = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    kept = torch.rand(2, 17) < 0.3  # differently many in each head
    args = (query, key, value, kept, torch.tensor(gates), 0.5)
    torch.testing.assert_close(mix(*args), by_hand(*args))


def given(context, model):
    """Log-probabilities of the tokens fed, as :func:`follow` has them."""
    with own_attention(model):
        return follow(model, [context], CONTEXT, FED.tokens)[0][0]


def test_open_gates_are_the_whole_cache_and_closed_ones_the_compressed(model, monkeypatch):
    lesson = lessons_of(model)[0]
    told = torch.tensor(FED.tokens)[lesson.places + 1]
    small = compress(lesson.context, METHOD, [12] * LAYERS, SHAPE)
    assert all(mask.sum(dim=1).tolist() == [12] * KV_HEADS for mask in lesson.kept)
    seen = {}
    keep_own = torch.nn.functional.kl_div

    def noting(own, *args, **kwargs):
        seen["own"] = own.detach()
        return keep_own(own, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "kl_div", noting)
    for gate, context in ((1.0, lesson.context), (0.0, small)):
        kl = divergence(model, lesson, torch.full((LAYERS, KV_HEADS), gate)).item()
        own = seen["own"].gather(1, told[:, None])[:, 0]
        torch.testing.assert_close(own, given(context, model)[lesson.places], rtol=0, atol=1e-4)
        by_place = (lesson.teacher.exp() * (lesson.teacher - seen["own"])).sum(dim=1)
        assert kl == pytest.approx(by_place.mean().item(), abs=1e-6)
        assert (kl < 1e-6) == (gate == 1), kl


def test_a_gate_is_of_its_own_layer_and_head(model):
    # Closed but for one head: as the cache in which that head alone is whole.
    lesson = lessons_of(model)[0]
    gates = torch.zeros(LAYERS, KV_HEADS)
    gates[IMPORTANT] = 1
    masks = [mask.clone() for mask in lesson.kept]
    masks[IMPORTANT[0]][IMPORTANT[1]] = True
    by_mask = type(lesson)(**vars(lesson) | {"kept": tuple(masks)})
    closed = divergence(model, by_mask, torch.zeros(LAYERS, KV_HEADS))
    assert divergence(model, lesson, gates).item() == pytest.approx(closed.item(), abs=1e-6)


def test_lessons_have_the_answers_tokens(model):
    lesson = lessons_of(model)[0]
    assert lesson.places.tolist() == [2, 3, 4, 5, 6]
    assert lesson.teacher.shape == (5, 128)


def test_answers_that_the_whole_cache_fails_are_left_out(model):
    ids = list(range(CONTEXT))
    tokens = [1, 2]
    for _ in range(3):  # its own greedy answer
        tokens.append(int(model(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
    wrong = (tokens[-1] + 1) % 64
    fed = Told([*tokens, wrong, wrong], [(2, 5), (5, 7)])
    args = (model, "one", ids, fed, METHOD, 0.2, SHAPE)
    assert make_lesson(*args, answered=True).places.tolist() == [1, 2, 3]
    assert make_lesson(*args, answered=False).places.tolist() == [1, 2, 3, 4, 5]
    none = Told(fed.tokens, [(5, 7)])
    assert make_lesson(model, "one", ids, none, *args[4:], answered=True) is None


def test_gradients_reach_the_gates_alone():
    made = tiny()
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    with gated_attention(made):
        lessons = lessons_of(made)
        (row,) = learn(made, lessons, 0.01, 3, seed=0)
        gates = torch.full((LAYERS, KV_HEADS), 0.5, requires_grad=True)
        divergence(made, lessons[0], gates).backward()
    assert gates.grad.isfinite().all() and gates.grad.abs().min() > 0
    for name, weight in made.named_parameters():
        assert weight.grad is None and torch.equal(weight, before[name])
    assert row["gates"] != [[0.5] * KV_HEADS] * LAYERS


@pytest.fixture(scope="module")
def learnt():
    made = tiny(one_matters=True)
    with gated_attention(made):
        lessons = lessons_of(made)
        yield made, lessons, list(learn(made, lessons, 0.01, 60, seed=0))


def test_the_head_that_matters_is_found(learnt):
    made, lessons, rows = learnt
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["kl"] < rows[0]["kl"]
    with gated_attention(made):
        closed = divergence(made, lessons[0], torch.zeros(LAYERS, KV_HEADS)).item()
    assert rows[-1]["kl"] < closed / 10
    (best, *found), (second, *_) = ranked(rows)[:2]
    assert tuple(found) == IMPORTANT
    assert best > 0.8 and second < 0.2
    assert choose(rows, 1) == "1:1"


def test_learning_is_the_same_again_and_goes_on_from_a_row(learnt):
    made, lessons, rows = learnt
    with gated_attention(made):
        assert list(learn(made, lessons, 0.01, 25, seed=0))[:1] == rows[:1]
        last = json.loads(json.dumps(rows[0]))
        later = list(learn(made, lessons, 0.01, 50, seed=0, last=last))
        assert not list(learn(made, lessons, 0.01, 20, seed=0, last=last))
    assert [row["step"] for row in later] == [40, 50]
    # Only the optimizer begins anew, so it ends near by.
    assert later[0]["gates"][1][1] == pytest.approx(rows[1]["gates"][1][1], abs=0.2)


OF = {
    "model": "SmolLM2-135M-Instruct",
    "method": "kvdiff",
    "keep": 0.1,
    "recent_ratio": 0.0,
    "tasks": ["lm"],
    "count": 4,
    "tokens": 1500,
    "seed": 2000,
    "penalty": 0.003,
}
ROWS = [
    {"step": 20, "kl": 0.5, "mean": 0.4, "gates": [[0.6, 0.2], [0.0, 0.9], [0.3, 0.3]], "of": OF},
    {"step": 40, "kl": 0.02, "mean": 0.5, "gates": [[1.0, 0.1], [0.01, 1], [0.0, 0.5]], "of": OF},
]


def test_table_names_open_heads_the_largest_gates_first(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["--table", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed == table(ROWS) + "\n"
    lines = printed.splitlines()
    assert lines[0].startswith("model: SmolLM2-135M-Instruct, method: kvdiff, keep: 0.1")
    assert lines[0].endswith("penalty: 0.003.")
    assert "40 steps: KL 0.0200 nats" in lines[2] and "50.0%" in lines[2]
    # Two are open wide; the one that opened sooner comes first. 0.01 is not told.
    named = [line for line in lines[6:] if line]
    assert named[:2] == ["| 1 | 1 | 1.00 |", "| 0 | 0 | 1.00 |"]
    assert named[2:] == ["| 2 | 1 | 0.50 |", "| 0 | 1 | 0.10 |"]
    assert main(["--table", str(file), "--choose", "3"]) == 0
    assert capsys.readouterr().out == "0:0,1:1,2:1\n"


@pytest.mark.parametrize("count", [0, -1, 6])
def test_closed_heads_are_not_chosen(count):
    with pytest.raises(ValueError, match="5 heads have gates above 0"):
        choose(ROWS, count)


def test_rows_of_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    asked = ["--rows", str(file), "--tasks", "lm", "--steps", "20"]
    monkeypatch.setattr(heads, "load", None)  # neither is a model needed to see it
    assert main(asked) == 0  # as many steps as there are
    for other in (
        ["--penalty", "0.1"],
        ["--seed", "2001"],
        ["--keep", "0.2"],
        ["--recent-ratio", "1"],
    ):
        with pytest.raises(SystemExit):
            main([*asked, *other])
        assert "has rows of other settings" in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--rows or --table is needed"),
        (["--choose", "3"], "--choose is of a --table"),
        (["--table", "nowhere.jsonl"], "has no rows"),
        (["--rows", "nowhere/rows.jsonl"], "cannot be added to nowhere/rows.jsonl: No such file"),
    ],
)
def test_what_is_missing_is_said(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
