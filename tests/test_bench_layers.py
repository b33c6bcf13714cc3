"""The greedy order in which layers can be compressed."""

from __future__ import annotations

import json

import pytest
import torch
from check_tools import tiny_model

from bench.layers import Item, losses, next_layer, run, table
from bench.methods import Told, evaluate
from vllm_kvcompress.check.attention import own_attention
from vllm_kvcompress.check.dense import Shape, compress, compute
from vllm_kvcompress.methods import METHODS

LAYERS = 4


@pytest.mark.parametrize(
    ("now", "chosen", "measured"),
    [
        ({0: 0.1}, 0, 1),  # stays the cheapest: nothing else is measured
        ({0: 0.5, 1: 0.25}, 1, 2),
        ({0: 0.5, 1: 0.6, 2: 0.4}, 2, 3),
        ({0: 0.5, 1: 0.6, 2: 0.55}, 0, 3),  # all are measured: the cheapest of them
    ],
)
def test_layers_are_measured_until_one_stays_cheapest(now, chosen, measured):
    asked = []

    def measure(layer):
        asked.append(layer)
        return now[layer]

    layer, costs = next_layer({0: 0.1, 1: 0.2, 2: 0.3}, measure, tries=6)
    assert (layer, len(asked)) == (chosen, measured)
    assert costs == {0: 0.1, 1: 0.2, 2: 0.3} | now


def test_no_more_layers_are_measured_than_tries():
    layer, costs = next_layer({0: 0.1, 1: 0.2, 2: 0.3}, lambda layer: 1 - layer / 10, tries=2)
    assert (layer, costs) == (1, {0: 1, 1: 0.9, 2: 0.3})


@pytest.fixture(scope="module")
def model():
    made = tiny_model(LAYERS)
    with own_attention(made):
        yield made


def items_of(model):
    method, shape = METHODS["kvdiff"](), Shape(2, 4)
    items = []
    for seed, task in enumerate(("one", "one", "other")):
        torch.manual_seed(seed)
        whole = compute(model, torch.randint(64, (60,)).tolist())
        fed = Told(torch.randint(64, (12,)).tolist(), [(6, 9), (9, 12)])
        small = compress(whole, method, [12] * LAYERS, shape)
        ((_, full),) = evaluate(model, [whole], 60, fed)
        items.append(Item(task, whole, small, fed, full))
    return items


def test_nothing_compressed_costs_nothing_and_everything_what_compress_costs(model):
    items = items_of(model)
    assert losses(model, items, frozenset()) == pytest.approx({"one": 0, "other": 0}, abs=1e-6)
    lost = losses(model, items, frozenset(range(LAYERS)))
    ((_, small),) = evaluate(model, [items[2].small], 60, items[2].fed)
    assert lost["other"] == pytest.approx(items[2].full - small)


@pytest.mark.parametrize("tries", [1, 6])
def test_steps_are_greedy_and_resume(model, tries, monkeypatch):
    monkeypatch.setattr("bench.layers.TRIES", tries)
    items = items_of(model)
    rows = list(run(model, items, [], least=1))
    steps = [row for row in rows if row["step"]]
    assert [row["step"] for row in rows[:LAYERS]] == [0] * LAYERS
    assert [row["step"] for row in steps] == [1, 2, 3]
    # With no more tries than layers the first step is the cheapest layer alone.
    assert steps[0]["mean"] == min(row["mean"] for row in rows[:LAYERS])
    for count, row in enumerate(steps, 1):
        compressed = frozenset(step["layer"] for step in steps[:count])
        assert row["tasks"] == losses(model, items, compressed)
    # Written and read again, a run goes on with the same steps.
    for there in (2, LAYERS, LAYERS + 1, LAYERS + 2):
        known = json.loads(json.dumps(rows[:there]))
        again = json.loads(json.dumps(list(run(model, items, known, least=1))))
        assert again == json.loads(json.dumps(rows[there:]))
    lines = table(rows).splitlines()
    assert lines[-1].startswith(f"| 1 | {({*range(LAYERS)} - {s['layer'] for s in steps}).pop()} |")
    assert len(lines) == 6 + len(steps)
