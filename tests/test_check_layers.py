"""The check of layers: which lose most alone, which to skip, and what is recommended then."""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import pytest
import torch
from check_tools import (
    ANSWER,
    MARK,
    QUESTION,
    VOCABULARY,
    encode,
    findings,
    losses_at,
    planted_model,
    retrieving_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.bands import MAX_PADDING, group_layout, plan_bands
from vllm_kvcompress.check.dense import Shape, compress
from vllm_kvcompress.check.findings import Findings
from vllm_kvcompress.check.measure import measure
from vllm_kvcompress.check.recommend import advise
from vllm_kvcompress.check.report import as_json, markdown, plot
from vllm_kvcompress.check.skip import (
    MAX_GROUPS,
    OTHERS_KEEP,
    allowed_sizes,
    choose_layers,
    named,
    sensitive_layers,
)
from vllm_kvcompress.check.texts import Recall, Sample, built_in_text, samples
from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.settings import parse_settings
from vllm_kvcompress.shares import Shares


@pytest.fixture(scope="module")
def marked_cases():
    """Contexts with one mark, the answer to every question."""
    generator = torch.Generator().manual_seed(4)
    cases = []
    for place in (90, 201):
        text = torch.randint(10, VOCABULARY, (440,), generator=generator).tolist()
        text[place] = MARK
        recalls = tuple(Recall((5, 6, number, QUESTION), (ANSWER, ANSWER)) for number in (7, 8))
        cases.append(Sample(tuple(text[:400]), tuple(text[400:]), recalls))
    return cases


@pytest.fixture(scope="module")
def cases():
    return samples(built_in_text(), encode, count=1, tokens=400, continuation=40, facts=2)


# Measuring.


def test_the_layer_that_retrieves_is_found_and_skipped(marked_cases):
    found = measure(
        retrieving_model(8, 2),
        "retrieving",
        marked_cases,
        {"knorm": METHODS["knorm"]()},
        [0.5, 0.7, 0.9],
        Shape(4, 16),
    )
    assert found.full_right == 1
    assert found.layer_method == "knorm"
    assert found.layer_loss[2] > 1
    assert found.layer_loss[:2] + found.layer_loss[3:] == pytest.approx([0] * 7, abs=1e-5)
    assert set(found.skip_layers) == {0.5, 0.7}  # layer 2 alone is 12.5 % of the cache
    assert len(found.skip_layers[0.5]) == 3 and 2 in found.skip_layers[0.5]
    assert found.skip_layers[0.7] == (2,)
    assert found.loss("knorm", 0.5).right == 1
    assert found.loss("knorm", 0.5, skip=True).right == 0
    assert found.loss("knorm", 0.5, skip=True).recall == pytest.approx(0, abs=1e-5)
    assert found.measured(skip=True) == [0.5, 0.7]
    advice = advise(found)
    assert advice.settings == {
        "method": "knorm",
        "keep_ratio": 0.2,  # (0.3 - 0.125) / 0.875
        "skip_layers": [2],
        "sink_tokens": 4,
        "recent_tokens": 16,
        "recent_ratio": 0.0,
    }
    assert parse_settings(advice.settings).skip_layers == (2,)
    assert "70% of the cached tokens in the mean" in advice.words[0]
    assert "layer 2 stays whole and the others keep 20.0%" in advice.words[0]
    assert "out of reach" in advice.words[1]
    assert advice.verdicts["knorm"].endswith("at no share, up to 70% removed with layers skipped")


def test_skipping_removes_the_same_in_the_mean(marked_cases, monkeypatch):
    from vllm_kvcompress.check import layers

    kept = []

    def spy(context, method, keep, shape):
        kept.append(list(keep))
        return compress(context, method, keep, shape)

    monkeypatch.setattr(layers, "compress", spy)
    methods = {"knorm": METHODS["knorm"]()}
    measure(retrieving_model(4, 1), "spied", marked_cases[:1], methods, [0.4], Shape(4, 16))
    flat, alone, skipping = kept[0], kept[1:5], kept[5]
    assert flat == [240] * 4
    assert alone == [[40 if layer == own else 400 for layer in range(4)] for own in range(4)]
    assert sorted(skipping) == [80, 80, 400, 400]  # 0.6 * 4 * 400 = 960 in all
    assert skipping[1] == 400
    assert len(kept) == 6


def test_layers_that_lose_alike_are_all_compressed(cases):
    methods = {"knorm": METHODS["knorm"]()}
    found = measure(planted_model(1.0), "planted", cases, methods, [0.5], Shape(4, 16))
    assert len(found.layer_loss) == 3
    assert found.skip_layers == {}
    assert found.ways == [("knorm", False)]


def test_baselines_alone_say_nothing_of_layers(cases):
    methods = {"streaming": METHODS["streaming"]()}
    found = measure(planted_model(1.0), "planted", cases, methods, [0.5], Shape(4, 16))
    assert (found.layer_method, found.layer_loss, found.skip_layers) == (None, [], {})


# Choice.


def losses_of(sensitive: dict[int, float], layers: int = 30) -> list[float]:
    """Small losses that rise with the layer, but for some."""
    return [sensitive.get(layer, 0.0001 * layer) for layer in range(layers)]


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        (30, [0, 3, 5, 6, 9, 10, 12, 15, 18, 20, 21, 24, 25, 27]),
        (32, [0, 4, 8, 10, 11, 12, 16, 20, 21, 24, 28]),
        (28, [0, 4, 7, 8, 12, 14, 16, 20, 21, 24]),
        (22, [0, 11]),
        (4, [0, 1, 2, 3]),
        (1, [0]),
    ],
)
def test_sizes_that_may_be_skipped(layers, sizes):
    assert allowed_sizes(layers) == sizes


@pytest.mark.parametrize(
    ("losses", "removed", "chosen"),
    [
        (losses_of({18: 0.65}), 0.75, (18, 28, 29)),
        (losses_of({7: 0.03, 18: 0.65}), 0.75, (7, 18, 29)),
        (losses_of({7: 0.03, 18: 0.65}), 0.5, (7, 18, *range(20, 30))),
        (losses_of(dict.fromkeys(range(10), 0.5)), 0.75, (0, 1, 2)),
        (losses_of({18: 0.65}), 0.7, (18, 26, 27, 28, 29)),  # the others keep 16 % beside five
        (losses_of({18: 0.65}), 0.9, ()),
        (losses_of({18: 0.65}), 0.95, ()),
        (losses_of({18: 0.09}), 0.5, ()),
        (losses_of(dict.fromkeys(range(16), 0.5)), 0.5, ()),
        ([0.5] * 29 + [2.0], 0.75, ()),
        ([0.5] * 29 + [2.6], 0.75, (0, 1, 29)),
        ([-0.2] * 29 + [0.2], 0.75, (0, 1, 29)),
        ([0.0, 0.0, 5.0], 0.75, ()),
    ],
    ids=[
        *("one", "two", "more at a smaller share", "as many as may be", "five"),
        *("out of reach", "below what others keep", "too small", "most", "not apart", "apart"),
        *("others gain", "too few layers"),
    ],
)
def test_choice_of_layers(losses, removed, chosen):
    assert choose_layers(losses, removed) == chosen


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-0.5, 5) | st.floats(-0.01, 0.01), min_size=1, max_size=64),
    st.floats(0.05, 0.95),
)
def test_chosen_layers_are_the_worst_and_make_few_groups(losses, removed):
    chosen = choose_layers(losses, removed)
    sensitive = sensitive_layers(losses)
    assert len(sensitive) <= len(losses) / 2
    assert bool(chosen) <= bool(sensitive)
    if not chosen:
        return
    assert Shares(len(chosen) / len(losses)).keep_ratio(removed) >= OTHERS_KEEP
    larger = [size for size in allowed_sizes(len(losses)) if size > len(chosen)]
    assert all(Shares(size / len(losses)).keep_ratio(removed) < OTHERS_KEEP for size in larger)
    others = [loss for layer, loss in enumerate(losses) if layer not in chosen]
    assert min(losses[layer] for layer in chosen) >= max(others)
    bands = plan_bands(parse_settings({"skip_layers": list(chosen)}), len(losses), 32)
    _, groups, padding = group_layout([len(band.layers) for band in bands])
    assert groups <= MAX_GROUPS
    assert padding <= MAX_PADDING


def test_keep_ratio_beside_whole_layers():
    assert Shares(3 / 30).keep_ratio(0.75) == pytest.approx(0.15 / 0.9)
    assert Shares().keep_ratio(0.75) == 0.25
    assert Shares(3 / 30).keep_ratio(0.9) == pytest.approx(0)
    for removed, skipped, layers in product((0.1, 0.3, 0.6), (1, 3, 5), (20, 30)):
        mean = (
            skipped + (layers - skipped) * Shares(skipped / layers).keep_ratio(removed)
        ) / layers
        assert mean == pytest.approx(1 - removed)


def test_fewer_layers_are_skipped_where_the_others_must_keep_more():
    losses = losses_of({18: 0.65})
    assert len(choose_layers(losses, 0.5, least=0.16)) == 12
    assert len(choose_layers(losses, 0.5, least=0.17)) == 10  # as sinks and recent window may ask
    assert choose_layers(losses, 0.5, least=0.5) == ()


def test_layers_in_words():
    assert named([3]) == "layer 3"
    assert named([3, 5]) == "layers 3 and 5"
    assert named([7, 18, 23]) == "layers 7, 18 and 23"


# Advice.


def with_skipping(found: Findings, losses: dict[str, list[float]]) -> Findings:
    """The same with layers 7, 18 and 23 of 30 skipped."""
    return dataclasses.replace(
        found,
        losses=found.losses + losses_at((0.25, 0.5, 0.75), losses, skip=True),
        layer_method="kvdiff",
        layer_loss=losses_of({7: 0.03, 18: 0.65, 23: 0.02}),
        skip_layers=dict.fromkeys((0.25, 0.5, 0.75), (7, 18, 23)),
    )


FLAT = {"kvdiff": [0.1, 0.9, 3.0], "random": [2.0, 3.0, 4.0]}
SIGNAL = {"kvdiff": 0.2, "random": 0.0}


def test_skipping_is_recommended_where_more_can_be_removed():
    advice = advise(
        with_skipping(findings(FLAT, SIGNAL), {"kvdiff": [0, 0, 0.5], "random": [3] * 3})
    )
    assert advice.settings == {
        "method": "kvdiff",
        "keep_ratio": 0.1667,  # (0.25 - 0.1) / 0.9
        "skip_layers": [7, 18, 23],
        "sink_tokens": 4,
        "recent_tokens": 64,
        "recent_ratio": 0.0,
    }
    assert advice.words[0].startswith(
        "kvdiff may remove 75% of the cached tokens in the mean over all layers if layers 7, 18 "
        "and 23 stay whole and the others keep 16.7%: it costs 0.050 nats"
    )
    assert "up to 50% removed, up to 75% removed with layers skipped" in (advice.verdicts["kvdiff"])


@pytest.mark.parametrize(
    "skipping",
    [
        {"kvdiff": [0.1, 1.1, 1.2], "random": [3, 3, 3]},
        {"kvdiff": [0.2, 0.9, 3.0], "random": [3, 3, 3]},
        {"kvdiff": [0.2, 0.9], "random": [3, 3]},
        {"kvdiff": [0.0, 0.1, 0.2], "random": [0.0, 0.1, 0.1]},
        {},
    ],
    ids=["removes less", "loses more", "one share fewer", "no better than random", "out of reach"],
)
def test_skipping_is_not_recommended_where_it_gains_nothing(skipping):
    flat = advise(findings(FLAT, SIGNAL))
    advice = advise(with_skipping(findings(FLAT, SIGNAL), skipping))
    assert advice.settings == flat.settings
    assert "skip_layers" not in advice.settings
    assert advice.words == flat.words


def test_a_method_that_fits_only_with_layers_skipped_may_be_used():
    found = with_skipping(findings({"kvdiff": [2, 3, 4]}, SIGNAL), {"kvdiff": [0.1, 0.2]})
    advice = advise(found)
    assert advice.settings["keep_ratio"] == round(0.4 / 0.9, 4)
    assert advice.words[1] == "75% is out of reach while layers stay whole."
    worse = with_skipping(findings({"kvdiff": [2, 3, 4]}, SIGNAL), {"kvdiff": [1.5, 2]})
    assert not advise(worse).use


def test_advice_without_sensitive_layers_is_as_before():
    found = findings(FLAT, SIGNAL)
    measured = dataclasses.replace(found, layer_method="kvdiff", layer_loss=losses_of({}))
    assert advise(measured) == advise(found)
    assert advise(found).settings["keep_ratio"] == 0.5


# Report.


def test_report_tells_of_layers(tmp_path):
    found = with_skipping(findings(FLAT, SIGNAL), {"kvdiff": [0.0, 0.5], "random": [3, 3]})
    advice = advise(found)
    told = markdown(found, advice)
    row = "| `kvdiff`, layers skipped | +0.20 | 0.000 / 0.00 / 0% | 0.050 / 0.35 / 5% | "
    assert row + "out of reach |" in told
    assert "the worst are layer 18 (0.650), layer 7 (0.030), layer 23 (0.020), layer 29" in told
    assert "at 25% removed layers 7, 18 and 23; at 50% removed layers" in told
    assert '"skip_layers": [7, 18, 23]' in told
    read = json.loads(as_json(found, advice))
    assert read["advice"]["settings"]["skip_layers"] == read["skip_layers"]["0.25"] == [7, 18, 23]
    assert (read["layer_method"], read["layer_loss"][18]) == ("kvdiff", 0.65)
    assert [loss["skip"] for loss in read["losses"]] == [False] * 6 + [True] * 4
    pytest.importorskip("matplotlib")
    plot(dataclasses.replace(found, skip_layers={}), tmp_path / "none.png")
    plot(found, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes() != (tmp_path / "none.png").read_bytes()


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (losses_of({}), "No layer loses so much more"),
        (losses_of({5: 2.0}, 22), "Layer 5 loses far more, but"),
        (losses_of({5: 2.0, 6: 1.0}, 22), "Layers 5 and 6 lose far more, but"),
    ],
)
def test_report_tells_why_no_layer_is_skipped(losses, says):
    found = dataclasses.replace(findings(FLAT, SIGNAL), layer_method="kvdiff", layer_loss=losses)
    assert says in markdown(found, advise(found))
