"""The check of a model: correlations, losses and advice, with signal planted or missing."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from check_tools import VOCABULARY, encode, findings, planted_model, tiny_model
from transformers import DynamicCache

from vllm_kvcompress.check.__main__ import main
from vllm_kvcompress.check.attention import own_attention
from vllm_kvcompress.check.dense import (
    Context,
    Shape,
    compress,
    compute,
    follow,
    kept_of,
    kept_tokens,
)
from vllm_kvcompress.check.measure import measure, rank_correlation, received_attention
from vllm_kvcompress.check.recommend import MAX_TEXT, advise
from vllm_kvcompress.check.report import as_json, markdown, plot
from vllm_kvcompress.check.texts import FACT, built_in_text, samples, text_of
from vllm_kvcompress.methods import METHODS


@pytest.fixture(scope="module")
def cases():
    return samples(built_in_text(), encode, count=2, tokens=400, continuation=40, facts=2)


# Ranks.


def test_rank_correlation_by_hand():
    one = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    other = torch.tensor([[10.0, 20.0, 25.0, 99.0], [9.0, 3.0, 2.0, 1.0]])
    assert rank_correlation(one, other).tolist() == pytest.approx([1, -1])
    # Ranks 0, 1.5, 1.5, 3 against 0, 2, 1, 3: 1.5 * 1.5 + 0 * .5 - 0 * .5 + 1.5 * 1.5 = 4.5
    tied = rank_correlation(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
    assert tied.item() == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_rank_correlation_of_a_constant_is_zero():
    assert rank_correlation(torch.ones(5), torch.arange(5.0)).item() == 0


# Dense contexts.


def test_uncompressed_context_is_followed_as_transformers_does():
    model = tiny_model()
    ids = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, 40:-1], dim=-1)
    with own_attention(model):
        context = compute(model, ids[:40])
        told, best = follow(model, [context], 40, ids[40:])
    after = torch.tensor(ids[41:])
    torch.testing.assert_close(told[0], expected.gather(1, after[:, None])[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(best[0], expected.argmax(-1) == after)
    assert model.config._attn_implementation == "sdpa"


def test_compressed_context_is_what_was_kept_at_its_true_positions():
    """Against a mask over the whole cache, by transformers' own attention."""
    model = tiny_model()
    ids = torch.randint(VOCABULARY, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    shape = Shape(sinks=2, recent=6)
    with own_attention(model):
        context = compute(model, ids[:50])
        small = compress(context, METHODS["streaming"](), [kept_tokens(0.6, 50, shape)] * 3, shape)
        told, _ = follow(model, [small, small], 50, ids[50:])
    assert small.tokens == 20
    seen = torch.ones(1, 70, dtype=torch.long)
    seen[:, 2:32] = 0  # streaming keeps the first two and the last 18
    cache = DynamicCache(
        [(k[None], v[None]) for k, v in zip(context.keys, context.values, strict=True)]
    )
    logits = model(
        torch.tensor([ids[50:]]),
        past_key_values=cache,
        attention_mask=seen,
        position_ids=torch.arange(50, 70)[None],
    ).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[51:])[:, None])[:, 0]
    torch.testing.assert_close(told, expected.expand(2, -1), rtol=0, atol=1e-5)


def test_layers_keep_as_many_as_they_are_told():
    model = tiny_model()
    with own_attention(model):
        context = compute(model, list(range(80)))
        small = compress(context, METHODS["knorm"](), [40, 80, 30], Shape(4, 8))
        assert [keys.shape[1] for keys in small.keys] == [40, 80, 30]
        assert follow(model, [small], 80, [1, 2, 3])[0].isfinite().all()


@pytest.mark.parametrize(("ratio", "recent"), [(0.0, 6), (0.1, 6), (0.5, 15), (0.9, 27), (1.0, 28)])
def test_latest_tokens_are_a_share_of_those_kept(ratio, recent):
    """Old tokens have lower norms the older they are, so ``knorm`` keeps the oldest."""
    keys = torch.linspace(0.1, 10, 90)[None, :, None].expand(2, -1, 4).contiguous()
    context = Context((keys,), (keys,))
    shape = Shape(2, 6, ratio)
    assert shape.window(30) == recent
    kept = kept_of(context, METHODS["knorm"](), 0, 30, shape)
    assert kept.tolist() == [[*range(30 - recent), *range(90 - recent, 90)]] * 2


def test_what_was_measured_is_what_is_recommended(cases):
    methods = {"knorm": METHODS["knorm"]()}
    found = measure(planted_model(1.0), "planted", cases, methods, [0.5], Shape(4, 16, 0.25))
    assert (found.sinks, found.recent, found.recent_ratio) == (4, 16, 0.25)
    plain = findings({"knorm": [0.1, 0.2, 0.3]}, {"knorm": 0.4})
    wide = dataclasses.replace(plain, recent_ratio=0.25)
    assert advise(wide).settings["recent_ratio"] == 0.25
    assert "25% were last tokens" in markdown(wide, advise(wide))
    assert "were last tokens" not in markdown(plain, advise(plain))


def test_received_attention_is_that_of_eager_attention():
    model = tiny_model()
    ids = torch.randint(VOCABULARY, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    with own_attention(model):
        context = compute(model, ids[:40])
        received = received_attention(model, context, [ids[40:]])
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([ids[:-1]]), output_attentions=True).attentions
    for layer, own in enumerate(received):
        expected = attentions[layer][0, :, 40:, :40].mean(1).unflatten(0, (2, 2)).sum(1)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


# Texts.


def test_samples_have_their_facts_and_questions(cases):
    again = samples(built_in_text(), encode, count=2, tokens=400, continuation=40, facts=2)
    assert cases == again
    assert cases[0] != cases[1]
    for case in cases:
        text = "".join(map(chr, case.context))
        assert 400 <= len(case.context) < 1000
        assert len(case.continuation) >= 40
        for recall in case.recalls:
            question = "".join(map(chr, recall.question))
            name = question.rpartition("number for ")[2].removesuffix(" is:")
            number = "".join(map(chr, recall.answer)).strip()
            assert FACT.format(name=name, number=number) in text


def test_named_files_replace_the_built_in_text(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("\n\n".join(["The cat sat on the mat and looked out of the window. " * 3] * 30))
    case = samples(text_of([file]), encode, 1, 300, 30, facts=1)[0]
    assert "The cat sat on the mat" in "".join(map(chr, case.context))
    with pytest.raises(ValueError, match="need more"):
        samples(text_of([file]), encode, 1, 30_000, 30)
    file.write_text("no sentence")
    with pytest.raises(ValueError, match="no paragraphs"):
        text_of([file])


# Planted signal.


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_planted_signal_is_found_in_every_layer_and_head(sign, cases):
    found = measure(
        planted_model(sign), "planted", cases, {"knorm": METHODS["knorm"]()}, [0.5], Shape(4, 16)
    )
    correlation = torch.tensor(found.correlation["knorm"])
    assert correlation.shape == (3, 2)
    assert (sign * correlation > 0.95).all()
    advice = advise(found)
    if sign < 0:
        assert not advice.use
        assert advice.settings == {"method": "none"}
        assert "misleading" in advice.verdicts["knorm"]
    else:
        assert "carries signal" in advice.verdicts["knorm"]


def test_random_scores_have_no_signal(cases):
    methods = {"random": METHODS["random"]()}
    found = measure(planted_model(1.0), "planted", cases, methods, [0.5], Shape(4, 16))
    assert abs(found.signal("random")) < 0.05


# Advice.


def test_advice_is_the_method_that_may_remove_most():
    advice = advise(
        findings(
            {"knorm": [0.1, 0.9, 1.1], "keydiff": [0.2, 0.5, 0.9], "random": [2, 3, 4]},
            {"knorm": 0.5, "keydiff": 0.2, "random": 0.0},
        )
    )
    assert advice.use
    assert advice.settings == {
        "method": "keydiff",
        "keep_ratio": 0.25,
        "sink_tokens": 4,
        "recent_tokens": 64,
        "recent_ratio": 0.0,
    }
    assert "up to 50%" in advice.verdicts["knorm"]


def test_of_equal_shares_the_smaller_loss_wins():
    advice = advise(
        findings(
            {"knorm": [0.1, 0.3, 1.2], "keydiff": [0.2, 0.5, 1.1]}, {"knorm": 0.5, "keydiff": 0.2}
        )
    )
    assert (advice.settings["method"], advice.settings["keep_ratio"]) == ("knorm", 0.5)


def test_a_larger_share_does_not_make_good_for_a_smaller_one():
    advice = advise(findings({"knorm": [0.1, 1.5, 0.5]}, {"knorm": 0.5}))
    assert advice.settings["keep_ratio"] == 0.75


@pytest.mark.parametrize(
    ("losses", "signal"),
    [
        ({"knorm": [1.1, 2, 3]}, {"knorm": 0.5}),
        ({"knorm": [0.1, 0.2, 0.3]}, {"knorm": -0.4}),
        ({"knorm": [0.2, 0.4, 0.6], "random": [0.1, 0.2, 0.3]}, {"knorm": 0.1, "random": 0.0}),
        ({"streaming": [0.1, 0.1, 0.1]}, {"streaming": 0.2}),
    ],
    ids=["too lossy", "anti-correlated", "worse than random", "baselines alone"],
)
def test_do_not_use(losses, signal):
    advice = advise(findings(losses, signal))
    assert not advice.use
    assert advice.settings == {"method": "none"}
    assert advice.words[0].startswith("Do not use")


def test_each_kind_of_loss_alone_is_too_much():
    good = findings({"knorm": [0.1, 0.1, 0.1]}, {"knorm": 0.5})
    for name, share in product(("text", "recall", "right"), (0.25, 0.5)):
        losses = [
            dataclasses.replace(loss, **{name: 5.0}) if loss.removed == share else loss
            for loss in good.losses
        ]
        advice = advise(dataclasses.replace(good, losses=losses))
        assert advice.settings.get("keep_ratio") == (None if share == 0.25 else 0.75)


def test_a_model_that_recalls_nothing_is_said_to():
    weak = dataclasses.replace(findings({"knorm": [0, 0, 0]}, {"knorm": 0.5}), full_right=0.1)
    assert "only 10% of the facts" in " ".join(advise(weak).words)


# Report.


def test_report_has_the_numbers(tmp_path):
    found = findings({"knorm": [0.1, 0.5, 2]}, {"knorm": 0.5})
    advice = advise(found)
    told = markdown(found, advice)
    assert (
        "| `knorm` | +0.50 | 0.010 / 0.07 / 1% | 0.050 / 0.35 / 5% | 0.200 / 1.40 / 20% |" in told
    )
    assert '"keep_ratio": 0.5' in told
    read = json.loads(as_json(found, advice))
    assert read["advice"]["settings"]["method"] == "knorm"
    assert read["losses"][0]["text"] == pytest.approx(0.1 * MAX_TEXT)


def test_plot_is_drawn_or_asks_for_matplotlib(tmp_path, monkeypatch):
    found = findings({"knorm": [0.1, 0.5, 2], "random": [1, 2, 3]}, {"knorm": 0.5, "random": 0})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match="pip install matplotlib"):
            plot(found, tmp_path / "a.png")
    pytest.importorskip("matplotlib")
    plot(found, tmp_path / "plots" / "a.png")
    assert (tmp_path / "plots" / "a.png").read_bytes().startswith(b"\x89PNG")


# Command.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shares", "1.5"], "between 0 and 1"),
        (["--tokens", "300"], "longer contexts"),
        (["--contexts", "0"], "at least 1"),
        (["--recent-ratio", "1.5"], "from 0 to 1"),
        (["--texts", "missing.txt"], "missing.txt"),
        (["--dtype", "float3"], "float3"),
    ],
)
def test_wrong_arguments_are_said_at_once(arguments, says, capsys):
    assert main(["no-such-model", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_check_imports_no_vllm():
    code = (
        "import sys, vllm_kvcompress.check.__main__\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_check_of_the_bundled_model(tmp_path, capsys):
    from vllm_kvcompress.bundled import model_directory

    code = main(
        [
            str(model_directory()),
            *("--contexts", "1", "--tokens", "1000", "--shares", "0.25", "0.5"),
            *("--json", str(tmp_path / "check.json")),
        ]
    )
    read = json.loads((tmp_path / "check.json").read_text())
    assert code == (0 if read["advice"]["use"] else 1)
    assert "rank correlation" in capsys.readouterr().out
    losses = {(loss["method"], loss["removed"], loss["skip"]): loss for loss in read["losses"]}
    # Nothing that looks at keys may do worse on text than chance does at twice the share.
    assert losses["keydiff", 0.25, False]["text"] < losses["random", 0.5, False]["text"] + 0.05
    assert len(read["correlation"]["knorm"]) == 30
    assert max(range(30), key=lambda layer: read["layer_loss"][layer]) == 18
    assert 18 in read["skip_layers"]["0.5"]
