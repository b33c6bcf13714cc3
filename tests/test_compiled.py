"""Compiled page moves, held against the same moves in torch."""

from __future__ import annotations

import itertools
from typing import Any

import numba
import numpy as np
import pytest
import torch
from compiled_case import BLOCKS, DIM, HEADS, LAYERS, LAYOUTS, Case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from page_cases import TYPES, ranked_plan

from vllm_kvcompress.levels import Round, fewest_blocks, plan_merges
from vllm_kvcompress.methods import METHODS, POOLINGS, Method, ScoreContext, select_tokens
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.pooling import Rotation
from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.cpu.band import CompiledBandPages, merges_of
from vllm_kvcompress.worker.cpu.intrinsics import address_of
from vllm_kvcompress.worker.cpu.numbers import SCALES, TAGS
from vllm_kvcompress.worker.cpu.steps import LEVELS, order_steps
from vllm_kvcompress.worker.cpu.vectors import (
    WIDTH,
    load,
    multiply,
    sine_and_cosine,
    splat,
    store,
    store_mean,
)
from vllm_kvcompress.worker.layout import FP8_DTYPES
from vllm_kvcompress.worker.merger import Merger
from vllm_kvcompress.worker.pages import TokenMajor, TokenMinor
from vllm_kvcompress.worker.setup import band_pages

OTHERS = ("bfloat16", "float16", "fp8_e5m2")
ROTATIONS = {
    "plain": None,
    "neox": Rotation(1000.0 ** (-torch.arange(0, DIM, 2) / DIM)),
    "gptj, partial": Rotation(1000.0 ** (-torch.arange(0, DIM // 2, 2) / DIM), neox=False),
}


@pytest.fixture(params=TYPES)
def type_name(request: pytest.FixtureRequest) -> str:
    return request.param


CASES = [(name, "cpu", 32) for name in TYPES]
CASES += [("bfloat16", name, size) for name in LAYOUTS for size in (64, 96)]
CASES += [("float32", "triton", 32), ("fp8_e4m3", "both across", 64)]


@pytest.fixture(params=CASES, ids=lambda case: ", ".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> Case:
    type_name, layout, size = request.param
    return Case(type_name, LAYOUTS[layout], size)


def test_layouts_are_what_they_are_called() -> None:
    kinds = {name: [TokenMinor, TokenMajor] for name in ("cpu",)}
    kinds |= {name: [TokenMajor, TokenMajor] for name in ("triton", "tokens outermost")}
    kinds |= {"both across": [TokenMinor, TokenMinor]}
    for name, expected in kinds.items():
        pages = Case("bfloat16", LAYOUTS[name]).torch.layers[0]
        assert [type(pages.keys), type(pages.values)] == expected


def test_reads_and_writes(case: Case) -> None:
    blocks = torch.tensor([7, 0, 3, 10])
    for read in ("read_keys", "read_values"):
        mine, reference = case.both(lambda pages, read=read: getattr(pages, read)(blocks))
        assert mine.equal(reference)
    mine, reference = case.both(lambda pages: pages.read_float_keys(blocks))
    assert mine.dtype == torch.float32
    assert mine.equal(reference)
    for mine, reference in zip(*case.both(lambda pages: pages.read_slots(blocks)), strict=True):
        assert mine.is_contiguous()
        assert mine.equal(reference)
    keys, values = case.torch.read_keys(blocks), case.torch.read_values(blocks)
    before = case.caches[0].clone()
    case.both(lambda pages: pages.write(blocks.flip(0), keys, values))
    case.assert_same_bytes()
    assert not case.caches[0].view(torch.uint8).equal(before.view(torch.uint8))


def test_squared_norms(case: Case) -> None:
    blocks = torch.tensor([9, 1, 2])
    mine, reference = case.both(lambda pages: pages.squared_norms(blocks))
    assert mine.shape == (LAYERS * HEADS, 3 * case.size)
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("sources", "destinations"),
    [
        ([4, 7, 1, 9], [4, 7]),  # in place
        ([4, 7, 1, 9], [9, 4, 1]),  # in place, in another order
        ([4, 7, 1, 9], [3, 10]),
        ([2, 5], [2, 5]),  # all tokens stay
        ([8, 6, 5], [5]),
    ],
)
def test_moves(case: Case, sources: list[int], destinations: list[int]) -> None:
    total, kept = len(sources) * case.size, len(destinations) * case.size
    rows = LAYERS * HEADS
    tokens = torch.rand(rows, total).argsort()[:, :kept].sort().values
    before = case.caches[0].clone()
    case.both(lambda pages: pages.move(torch.tensor(sources), tokens, torch.tensor(destinations)))
    case.assert_same_bytes()
    changed = (case.caches[0].view(torch.uint8) != before.view(torch.uint8)).flatten(2).any(2)
    same = sources == destinations
    expected = torch.tensor([block in destinations and not same for block in range(BLOCKS)])
    assert changed.equal(expected.expand(LAYERS, -1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("destinations", [[4, 7], [9, 4], [3, 10]])
def test_evicts(case: Case, method: str, destinations: list[int]) -> None:
    sources, sinks, keep = [4, 7, 1, 9], 5, 2 * case.size
    blocks = torch.tensor(sources)
    ranking = METHODS[method](seed=3)

    def context(layer: int) -> ScoreContext:
        return ScoreContext(layer, 512, 1, HEADS + 1)

    scores = case.torch.score(ranking, context, blocks)
    scores[:, :sinks] = torch.inf
    kept = case.compiled.evict(ranking, context, sources, destinations, sinks, kept_wanted=True)
    assert kept is not None
    assert kept.shape == (LAYERS * HEADS, keep)
    assert (kept.diff() > 0).all()
    assert kept[:, :sinks].equal(torch.arange(sinks).expand(LAYERS * HEADS, -1))
    best = select_tokens(scores, keep, sinks)
    if method in ("streaming", "random"):
        assert kept.equal(best)
    else:
        # Sums in another order may end one step of rounding away.
        step = 1 / 4096 if method in ("keydiff", "kvdiff") else 2.0**-12 * scores.abs()
        lowest = scores.gather(1, best).amin(1, keepdim=True)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)
        assert (chosen | (scores <= lowest + 1.01 * step)).all()
        assert (~chosen | (scores >= lowest - 1.01 * step)).all()
    case.torch.move(blocks, kept, torch.tensor(destinations))
    case.assert_same_bytes()


class Firsts(Method):
    """A method that kernels do not know."""

    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        return keys[..., 0]


def test_evicts_by_scores_of_others(case: Case) -> None:
    arguments = Firsts(), lambda layer: ScoreContext(layer, 7), [2, 9, 4], [5], 3, True
    mine, reference = case.both(lambda pages: pages.evict(*arguments))
    assert mine.equal(reference)
    case.assert_same_bytes()


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 5),
    st.integers(1, 100),
    st.data(),
)
def test_selects_as_torch(rows: int, tokens: int, data: st.DataObject) -> None:
    few = st.sampled_from([0.0, -0.0, 1.0, -2.5, float("nan"), -float("nan"), float("inf")])
    numbers = data.draw(st.lists(few, min_size=rows * tokens, max_size=rows * tokens))
    scores = torch.tensor(numbers).view(rows, tokens)
    sinks = data.draw(st.integers(0, tokens))
    keep = data.draw(st.integers(sinks, tokens))
    chosen = CompiledBandPages({}).select(scores, keep, sinks)
    assert chosen.equal(select_tokens(scores, keep, sinks))


def test_selects_many() -> None:
    torch.manual_seed(0)
    for scores in (torch.randn(15, 2000), torch.randn(15, 2000).round(decimals=1)):
        for keep in (4, 5, 700, 1999, 2000):
            chosen = CompiledBandPages({}).select(scores, keep, 4)
            assert chosen.equal(select_tokens(scores, keep, 4))


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
@pytest.mark.parametrize(
    ("counts", "keep", "destinations"),
    [
        ([2], 1, [3]),  # two blocks into one
        ([2], 1, [4]),  # in place
        ([7], 3, [9, 0, 4]),  # several rounds
        ([3, 2, 1], 4, [4, 7, 1, 2]),  # blocks of several levels, some of which only move
    ],
)
def test_merges(
    type_name: str,
    pooling: Any,
    rotation: Rotation | None,
    counts: list[int],
    keep: int,
    destinations: list[int],
) -> None:
    case = Case(type_name, LAYOUTS["cpu"])
    merges = plan_merges(counts, keep)
    sources = [4, 7, 1, 9, 5, 6, 8][: sum(counts)]
    assert len(merges.order) == len(destinations)
    case.both(
        lambda pages: pages.merge(
            sources, merges.rounds, merges.order, destinations, pooling(), rotation
        )
    )
    mine, reference = (
        torch.stack([pages.as_float(read) for read in reads(pages, destinations)])
        for pages in (case.compiled, case.torch)
    )
    # Turned keys are sums of products in another order: a step of the cache's type at most.
    step = torch.finfo(case.torch.layers[0].element)
    tolerance = 3e-6 if type_name == "float32" else 1.01 * step.eps
    scale = reference.abs().amax(-1, keepdim=True)
    assert ((mine - reference).abs() <= tolerance * scale + 1.01 * step.smallest_normal).all()
    if pooling is not POOLINGS["mean"]:
        assert mine.equal(reference)
    rest = [block for block in range(BLOCKS) if block not in destinations]
    assert all(
        one.equal(other)
        for one, other in zip(reads(case.compiled, rest), reads(case.torch, rest), strict=True)
    )


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
@pytest.mark.parametrize("destinations", [[4, 7, 1, 2], [0, 9, 4, 10]])
@pytest.mark.parametrize(
    "type_name",
    # Others differ in reading and writing numbers only, and each takes its time to compile.
    ["float32", "fp8_e4m3", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)],
)
def test_merges_what_ranking_leaves(
    type_name: str, pooling: Any, rotation: Rotation | None, destinations: list[int]
) -> None:
    case = Case(type_name, LAYOUTS["cpu"])
    rotation = rotation if pooling.needs_rotation else None
    plan = ranked_plan(destinations)
    centres = torch.rand(LAYERS, BLOCKS, HEADS, case.size).cumsum(-1) * 30
    written, chosen = [], []
    for pages in (case.compiled, case.torch):
        assert pages.merges_ranked(KNorm(), pooling()) == (
            pages is case.compiled and pooling is not POOLINGS["best"]
        )
        own = None if rotation is None else dict(enumerate(centres.clone()))
        merger = Merger(pooling(), rotation, own)
        compactor = Compactor({0: pages}, {"knorm": KNorm()}, merger, 0, HEADS)
        kept: list[torch.Tensor] = []
        compactor.on_kept = lambda plan, layer, tokens, kept=kept: kept.append(tokens)
        compactor.run([plan])
        chosen.append(torch.cat(kept))
        written.append(own)
    assert chosen[0].equal(chosen[1])
    if rotation is not None:
        for mine, reference in zip(written[0].values(), written[1].values(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=0)
    mine, reference = (
        torch.stack([pages.as_float(read) for read in reads(pages, destinations)])
        for pages in (case.compiled, case.torch)
    )
    step = torch.finfo(case.torch.layers[0].element)
    tolerance = 1e-5 if type_name == "float32" else 1.01 * step.eps
    scale = reference.abs().amax(-1, keepdim=True)
    assert ((mine - reference).abs() <= tolerance * scale + 1.01 * step.smallest_normal).all()
    rest = [block for block in range(BLOCKS) if block not in destinations]
    assert all(
        one.equal(other)
        for one, other in zip(reads(case.compiled, rest), reads(case.torch, rest), strict=True)
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.data())
def test_steps_make_what_rounds_make(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    assume(total > 1)
    keep = data.draw(st.integers(fewest_blocks(counts), total))
    merges = plan_merges(counts, keep)
    flat, outputs = merges_of(merges.rounds), np.array(merges.order, np.int64)
    steps = np.empty((len(flat) + len(outputs), 4), np.int64)
    leaves, firsts = np.empty(total, np.int64), np.empty(len(outputs), np.int64)
    # As Python, which is enough for the order.
    count = order_steps.py_func(flat, outputs, total, steps, leaves, firsts)
    expected = [[block] for block in range(total)]
    for _, older, newer in flat:
        expected.append(expected[older] + expected[newer])
    held: dict[int, list[int]] = {}
    made: dict[int, list[int]] = {}
    read = []
    for level, older, newer, out in steps[:count].tolist():
        sides = [older] if level < 0 else [older, newer]
        read += [side for side in sides if side >= 0]
        found = [[side] if side >= 0 else held[side] for side in sides]
        (made if out >= 0 else held)[out] = [block for part in found for block in part]
        assert min(older, newer, out) >= -LEVELS
    assert made == {place: expected[block] for place, block in enumerate(merges.order)}
    assert leaves.tolist() == read
    bounds = [*firsts.tolist(), total]
    for place, (first, last) in enumerate(itertools.pairwise(bounds)):
        assert sorted(read[first:last]) == made[place]


def reads(pages: BandPages, blocks: list[int]) -> list[torch.Tensor]:
    """Raw keys and values of blocks."""
    chosen = torch.tensor(blocks)
    return [pages.read_keys(chosen), pages.read_values(chosen)]


@pytest.mark.parametrize("layout_name", ["triton", "both across"])
def test_merges_other_layouts_in_torch(layout_name: str) -> None:
    case = Case("bfloat16", LAYOUTS[layout_name])
    pooling = POOLINGS["mean"]()
    rounds = [Round(0, [0], [1])]
    case.both(lambda pages: pages.merge([4, 7], rounds, [2], [4], pooling, ROTATIONS["neox"]))
    case.assert_same_bytes()


def test_every_number_of_a_type_survives() -> None:
    """All bit patterns of 16 and 8 bits, through decoding and encoding."""
    for name, (dtype, cache_dtype) in TYPES.items():
        if dtype == torch.float32:
            continue
        element = FP8_DTYPES.get(cache_dtype, dtype)
        bits = torch.arange(1 << 8 * element.itemsize, dtype=torch.int32)
        raw = bits.to(torch.uint8 if element.itemsize == 1 else torch.int16)
        numbers = raw.view(element).float()
        finite = raw[numbers.isfinite()]
        case = Case(name, LAYOUTS["cpu"])
        size = HEADS * case.size * DIM
        for chunk in finite.split(size):
            part = torch.zeros(size, dtype=chunk.dtype)
            part[: len(chunk)] = chunk
            slots = part.view(1, HEADS * case.size, DIM).reshape(HEADS, case.size, DIM)
            same = slots.repeat(LAYERS, 1, 1)
            for pages in (case.compiled, case.torch):
                pages.write(torch.tensor([2]), same, same)
            case.compiled.merge([2], [Round(0, [], [])], [0], [5], POOLINGS["max"](), None)
            keys, values = reads(case.compiled, [5])
            assert keys.equal(same), name
            assert values.equal(same), name


@numba.njit
def _rounded(numbers: np.ndarray, like: np.ndarray, out: np.ndarray) -> None:
    for at in range(0, numbers.shape[0], WIDTH):
        own = load(address_of(numbers) + at * 4, numbers)
        store(address_of(out) + at * like.itemsize, like, own)


@numba.njit
def _means(one: np.ndarray, other: np.ndarray, like: np.ndarray, out: np.ndarray) -> None:
    half = splat(np.float32(0.5))
    for at in range(0, one.shape[0], WIDTH):
        place = at * like.itemsize
        total = load(address_of(one) + place, like) + load(address_of(other) + place, like)
        store_mean(address_of(out) + place, like, multiply(total, half), like)


@numba.njit
def _sines(angles: np.ndarray, sines: np.ndarray, cosines: np.ndarray) -> None:
    for at in range(0, angles.shape[0], WIDTH):
        s, c = sine_and_cosine(load(address_of(angles) + at * 4, angles))
        store(address_of(sines) + at * 4, angles, s)
        store(address_of(cosines) + at * 4, angles, c)


def test_numbers_round_as_in_torch(type_name: str) -> None:
    """All binades, ties between neighbours, and what is just beside them."""
    dtype, cache_dtype = TYPES[type_name]
    element = FP8_DTYPES.get(cache_dtype, dtype)
    torch.manual_seed(0)
    most = torch.finfo(element).max
    numbers = torch.randn(1 << 14) * torch.exp2(torch.randint(-30, 14, (1 << 14,)).float())
    grid = numbers.to(element).float()
    ties = torch.cat([grid * (1 + k / 32) for k in range(-3, 4)])
    numbers = torch.cat([numbers, ties, ties * (1 + 2**-22), ties * (1 - 2**-22)])
    numbers = numbers.clamp(-most, most).float()
    tag, scale = TAGS[element], SCALES.get(element, 1.0)
    out = np.empty(len(numbers), tag)
    _rounded((numbers / scale).numpy(), np.empty(0, tag), out)
    assert torch.from_numpy(out.view(np.uint8)).equal(numbers.to(element).view(torch.uint8))


@pytest.mark.parametrize("element", FP8_DTYPES.values(), ids=FP8_DTYPES)
def test_means_of_all_pairs_of_fp8(element: torch.dtype) -> None:
    raw = torch.arange(256).to(torch.uint8)
    raw = raw[raw.view(element).float().isfinite()]
    one, other = raw.repeat_interleave(len(raw)), raw.repeat(len(raw))
    room = -len(one) % WIDTH
    one, other = (torch.cat([part, part[:room]]) for part in (one, other))
    expected = ((one.view(element).float() + other.view(element).float()) / 2).to(element)
    tag = TAGS[element]
    out = np.empty(len(one), tag)
    _means(one.numpy().view(tag), other.numpy().view(tag), np.empty(0, tag), out)
    assert torch.from_numpy(out.view(np.uint8)).view(element).float().equal(expected.float())


def test_sines_and_cosines() -> None:
    torch.manual_seed(0)
    angles = torch.cat([torch.randn(1 << 14) * scale for scale in (1e-3, 1, 100, 1e4, 5e4)])
    sines, cosines = np.empty_like(angles.numpy()), np.empty_like(angles.numpy())
    _sines(angles.numpy(), sines, cosines)
    exact = angles.double()
    assert (torch.from_numpy(sines) - exact.sin()).abs().max() < 3e-7
    assert (torch.from_numpy(cosines) - exact.cos()).abs().max() < 3e-7


def test_falls_back_where_there_are_no_kernels() -> None:
    case = Case("bfloat16", LAYOUTS["cpu"])
    layers = dict(case.torch.layers)
    size, heads, dim = case.torch.shape
    layers[0].shape = (size + 1, heads, dim)
    assert type(band_pages(layers)) is BandPages
