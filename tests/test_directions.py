"""Scores by direction, compiled, held against the same scores in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled_case import DIM, HEADS, LAYERS, LAYOUTS, Case
from page_cases import TYPES

from vllm_kvcompress.methods import METHODS, ScoreContext
from vllm_kvcompress.methods.kvdiff import KVDiff
from vllm_kvcompress.worker.cpu.band import CompiledBandPages
from vllm_kvcompress.worker.cpu.directions import score_keys_and_values
from vllm_kvcompress.worker.cpu.intrinsics import LANES
from vllm_kvcompress.worker.cpu.moves import place_of
from vllm_kvcompress.worker.cpu.vectors import WIDTH

SOURCES = [4, 7, 1, 9]


def context(layer: int) -> ScoreContext:
    return ScoreContext(layer, 512, 0, HEADS)


def compiled_scores(case: Case) -> torch.Tensor:
    """Scores of KVDiff of all heads, ``[LAYERS * HEADS, tokens]``, as kernels have them."""
    pages, blocks = case.compiled, np.array(SOURCES)
    keys, values = pages._key_runs.part, pages._value_runs.part
    scores, norms = (
        np.empty((LAYERS * HEADS, len(SOURCES) * case.size), np.float32) for _ in range(2)
    )
    block, means = np.empty((DIM, LANES), np.float32), np.empty((DIM, WIDTH), np.float32)
    for row, out in enumerate(scores):
        places = (place_of.py_func(part, *divmod(row, HEADS), blocks) for part in (keys, values))
        score_keys_and_values(
            *places, values.across, case.size, pages._scale, pages._like, block, means,
            norms[row], out,
        )  # fmt: skip
    return torch.from_numpy(scores)


@pytest.mark.parametrize(
    ("type_name", "layout", "size"),
    [(name, "cpu", 32) for name in TYPES] + [("bfloat16", "both across", 64)],
)
def test_scores_of_keys_and_values(type_name: str, layout: str, size: int) -> None:
    case = Case(type_name, LAYOUTS[layout], size)
    expected = case.torch.score(KVDiff(), context, torch.tensor(SOURCES))
    found = compiled_scores(case)
    # Sums in another order end at most one step of rounding away, and rarely.
    assert (found - expected).abs().max() <= 1.01 / 4096
    assert (found == expected).float().mean() > 0.98


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_values_that_hardly_differ(spread: float) -> None:
    """A standard deviation of less than 1e-5 counts as none, in torch and in kernels."""
    case = Case("float32", LAYOUTS["cpu"])
    blocks, tokens = torch.tensor(SOURCES), len(SOURCES) * case.size
    values = torch.zeros(LAYERS * HEADS, tokens, DIM)
    values[..., 0] = 1 + spread * torch.linspace(-1, 1, tokens)
    keys, raw = case.torch.read_keys(blocks), case.torch.as_raw(values)
    case.both(lambda pages: pages.write(blocks, keys, raw))
    expected = case.torch.score(KVDiff(), context, blocks)
    # Norms near 1 have steps of 1e-7 or so, which is as much of a small deviation.
    noise = 1e-7 / spread if spread > 1e-5 else 0
    assert (compiled_scores(case) - expected).abs().max() <= 1.01 / 4096 + 2 * noise


@pytest.mark.parametrize("number", [0.0, 3.0])
@pytest.mark.parametrize("method", ["keydiff", "kvdiff"])
def test_of_equal_tokens_the_oldest_stay(method: str, number: float) -> None:
    case = Case("bfloat16", LAYOUTS["cpu"])
    case.caches[0].fill_(number)
    ranking = METHODS[method]()
    kept = case.compiled.evict(ranking, context, SOURCES, [3, 10], 0, kept_wanted=True)
    assert kept is not None
    assert kept.equal(torch.arange(2 * case.size).expand(LAYERS * HEADS, -1))


@pytest.mark.parametrize("layout", ["cpu", "triton"])
def test_torch_scores_only_where_keys_lie_along_tokens(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("bfloat16", LAYOUTS[layout])
    asked = []
    original = CompiledBandPages.score

    def score(self: CompiledBandPages, *arguments: object) -> torch.Tensor:
        asked.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(CompiledBandPages, "score", score)
    case.compiled.evict(KVDiff(), context, SOURCES, [3, 10], 0)
    assert bool(asked) == (layout == "triton")
