"""Triton kernels for pages on GPUs, held against torch in Triton's interpreter.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own,
started by :func:`test_in_interpreter`. No test here needs a GPU or says anything about one, but
for :func:`test_compiles_for_gpus`, which compiles the kernels and cannot run them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_path.harness import HERE, REPOSITORY, V2_TRITON
from page_cases import TYPES, ranked_plan

from vllm_kvcompress.methods import METHODS, POOLINGS, ScoreContext, select_tokens
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.pooling import Rotation
from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.merger import Merger
from vllm_kvcompress.worker.setup import band_pages

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

if IN_INTERPRETER:
    from triton_case import BLOCKS, HEADS, LAYERS, LAYOUTS, Case

    from vllm_kvcompress.worker.gpu import band as band_module
    from vllm_kvcompress.worker.gpu import kernels
    from vllm_kvcompress.worker.gpu.band import TritonBandPages

    CASES = [(name, layout, 16, 32) for name in TYPES for layout in LAYOUTS]
    # Sizes that are no powers of two, and runs that consist of ever smaller words.
    CASES += [("bfloat16", "LBNHC", 48, 80), ("fp8_e5m2", "halves", 8, 20)]
    CASES += [("float16", "BLNHC", 24, 3), ("fp8_e4m3", "padded", 16, 5)]
    TRIED = [(name, "BLNHC", 16, 32) for name in TYPES] + CASES[-4:]
else:
    CASES = TRIED = []

interpreted = pytest.mark.skipif(not IN_INTERPRETER, reason="run by test_in_interpreter")
SOURCES = [4, 7, 1, 9]


@pytest.fixture(params=CASES, ids=lambda case: ", ".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of; kernels work again afterwards."""
    said: list[str] = []
    log = SimpleNamespace(warning=lambda text, *args: said.append(text % args))
    monkeypatch.setattr(band_module, "logger", log)
    monkeypatch.setattr(TritonBandPages, "working", True)
    return said


def context(layer: int) -> ScoreContext:
    return ScoreContext(layer, 512, 1, HEADS + 1)


def step_of(method: str, scores: torch.Tensor) -> torch.Tensor:
    """What a method rounds its scores to."""
    if method == "knorm":
        return 2.0**-12 * scores.abs()
    return torch.full_like(scores, 1 / 4096 if method in ("keydiff", "kvdiff") else 0)


def assert_close_scores(method: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order end at most one step of rounding away, and rarely."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= 1.01 * step_of(method, expected)).all()
    assert (found == expected).float().mean() > 0.98


@pytest.mark.skipif(IN_INTERPRETER, reason="starts the interpreter")
def test_in_interpreter() -> None:
    """The cases of this file that kernels run in."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__],
        env=V2_TRITON.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " 2 skipped" in done.stdout
    print(done.stdout.splitlines()[-1])


@pytest.mark.skipif(IN_INTERPRETER, reason="the interpreter compiles nothing")
def test_compiles_for_gpus() -> None:
    """To machine code, for GPUs with and without fp8 arithmetic, which nobody runs here."""
    env = {**V2_TRITON.environment(), "PYTHONPATH": str(REPOSITORY)}
    del env["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "20 kernels" in done.stdout


@interpreted
@pytest.mark.parametrize("method", ["knorm", "keydiff", "kvdiff"])
@pytest.mark.parametrize("sources", [[5], [3, 10, 0, 6, 2, 8, 1]])
def test_scores_in_many_programs(
    monkeypatch: pytest.MonkeyPatch, method: str, sources: list[int]
) -> None:
    monkeypatch.setattr(band_module, "TILE_NUMBERS", 256)
    monkeypatch.setattr(band_module, "TILES", 3)
    case = Case("bfloat16", "BLNHC", 24)
    assert case.triton._tile == 8
    ranking, blocks = METHODS[method](), torch.tensor(sources)
    assert_close_scores(method, *case.both(lambda pages: pages.score(ranking, context, blocks)))


@interpreted
@pytest.mark.parametrize("type_name", ["fp8_e4m3", "fp8_e5m2"])
def test_every_number_of_fp8(type_name: str) -> None:
    case = Case(type_name, size=32, dim=2)
    raw = torch.zeros(LAYERS * HEADS, 256, 2, dtype=torch.uint8)
    raw[..., 0] = torch.arange(256)
    blocks = torch.arange(8)
    case.both(lambda pages: pages.write(blocks, raw, raw))
    found, expected = case.both(lambda pages: pages.squared_norms(blocks))
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


MOVES = [
    ([4, 7, 1, 9], [2, 0], None),
    ([4, 7, 1, 9], [7, 4, 1], None),  # among the sources
    ([4, 7, 1, 9], [1, 4], 3),  # some heads at a time
    ([3, 10], [10, 3], 1),  # all tokens stay, blocks change places
    ([8, 6, 5], [5], None),
]


@interpreted
def test_moves(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    for sources, destinations, rows in MOVES:
        kept = len(destinations) * case.size
        room = band_module.MAX_ROOM if rows is None else rows * kept * case.dim
        drawn = torch.rand(LAYERS * HEADS, len(sources) * case.size).argsort()
        tokens = drawn[:, :kept].sort().values
        before = case.bytes_of(0).clone()
        with monkeypatch.context() as patch:
            patch.setattr(band_module, "MAX_ROOM", room)
            arguments = torch.tensor(sources), tokens, torch.tensor(destinations)
            case.both(lambda pages, own=arguments: pages.move(*own))
        case.assert_same_bytes()
        assert not case.bytes_of(0).equal(before)


@interpreted
def test_moves_nothing() -> None:
    case = Case("bfloat16")
    nothing = torch.empty(LAYERS * HEADS, 0, dtype=torch.int64)
    before = case.bytes_of(0).clone()
    case.triton.move(torch.tensor(SOURCES), nothing, torch.tensor([], dtype=torch.int64))
    assert case.bytes_of(0).equal(before)


@interpreted
@pytest.mark.parametrize(
    ("method", "destinations"),
    [
        ("knorm", [4, 7]),
        ("keydiff", [9, 4]),
        ("kvdiff", [3, 10]),
        ("streaming", [7, 2]),
        ("random", [9, 4]),
    ],
)
def test_evicts(
    monkeypatch: pytest.MonkeyPatch, case: Case, method: str, destinations: list[int]
) -> None:
    sinks, keep, blocks = 5, 2 * case.size, torch.tensor(SOURCES)
    ranking = METHODS[method](seed=3)
    seen: list[torch.Tensor] = []

    def select(self: Any, scores: torch.Tensor, keep: int, sinks: int) -> torch.Tensor:
        seen.append(scores)
        return select_tokens(scores, keep, sinks)

    monkeypatch.setattr(TritonBandPages, "select", select)
    wanted = case.torch.score(ranking, context, blocks)
    found = case.triton.evict(ranking, context, SOURCES, destinations, sinks, kept_wanted=True)
    assert_close_scores(method, seen[0], wanted)
    assert found is not None
    assert found.equal(select_tokens(seen[0], keep, sinks))
    expected = select_tokens(wanted, keep, sinks)
    # Only tokens within a step of rounding from the last one kept may have changed sides.
    last = wanted[:, sinks:].gather(1, expected[:, sinks:] - sinks).amin(1, keepdim=True)
    near = (wanted - last).abs() <= 1.01 * torch.maximum(
        step_of(method, wanted), step_of(method, last)
    )
    chosen, best = (
        torch.zeros_like(wanted, dtype=torch.bool).scatter(1, kept, True)
        for kept in (found, expected)
    )
    assert ((chosen == best) | near).all()
    assert (chosen == best).float().mean() > 0.99
    case.torch.move(blocks, found, torch.tensor(destinations))
    case.assert_same_bytes()


@interpreted
@pytest.mark.parametrize(
    ("method", "launches"),
    [("knorm", 3), ("keydiff", 4), ("kvdiff", 5), ("streaming", 2), ("random", 2)],
)
def test_launches_do_not_grow_with_layers(
    monkeypatch: pytest.MonkeyPatch, method: str, launches: int
) -> None:
    count = 0

    def counted(kernel: Any) -> Any:
        class Counted:
            def __getitem__(self, grid: Any) -> Any:
                nonlocal count
                count += 1
                return kernel[grid]

        return Counted()

    for name in ("squared_norms", "add_unit_keys", "cosines", "gather", "scatter"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name)))
    case = Case("bfloat16")
    for pages in (case.triton, case.triton.part([1])):
        count = 0
        pages.evict(METHODS[method](), context, SOURCES, [4, 7], 3)
        assert count == launches


@interpreted
@pytest.mark.parametrize("pooling", POOLINGS)
def test_merges_what_ranking_leaves(pooling: str) -> None:
    """Ranking and moving are the kernels', pooling is torch's."""
    case = Case("float32", "BLHNC")
    plan = ranked_plan([4, 7, 1, 2])
    kind = POOLINGS[pooling]
    rotation = Rotation(1000.0 ** (-torch.arange(0, 32, 2) / 32)) if kind.needs_rotation else None
    chosen = []
    for pages in (case.triton, case.torch):
        centres = torch.rand(
            LAYERS, BLOCKS, HEADS, case.size, generator=torch.Generator().manual_seed(0)
        )
        own = None if rotation is None else dict(enumerate(centres.cumsum(-1) * 30))
        merger = Merger(kind(), rotation, own)
        compactor = Compactor({0: pages}, {"knorm": KNorm()}, merger, 0, HEADS)
        kept: list[torch.Tensor] = []
        compactor.on_kept = lambda plan, layer, tokens, kept=kept: kept.append(tokens)
        compactor.run([plan])
        chosen.append(torch.cat(kept))
    assert chosen[0].equal(chosen[1])
    case.assert_same_bytes()


@interpreted
@pytest.mark.parametrize("case", TRIED, indirect=True, ids=str)
def test_tries_itself_out(case: Case, warnings: list[str]) -> None:
    before = case.bytes_of(0).clone()
    case.triton.warm_up(None, None, ranked=False)
    assert TritonBandPages.working
    assert not warnings
    assert case.bytes_of(0).equal(before)


def _raises(*_: Any) -> Any:
    raise RuntimeError("no such GPU")


def _no_scores(self: Any, blocks: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.zeros(LAYERS * HEADS, len(blocks) * self.shape[0])


BROKEN = {
    "norms raise": ("_squared_norms", _raises, "RuntimeError: no such GPU"),
    "norms": ("_squared_norms", _no_scores, "scores of KNorm differ from those in torch"),
    "directions": ("_cosines", _no_scores, "scores of KeyDiff differ from those in torch"),
    "reads raise": ("_gather", _raises, "RuntimeError: no such GPU"),
    "reads": ("_gather", lambda *_: None, "moved tokens differ from those moved in torch"),
    "writes": ("_scatter", lambda *_: None, "moved tokens differ from those moved in torch"),
}


@interpreted
@pytest.mark.parametrize(("name", "instead", "said"), BROKEN.values(), ids=BROKEN)
def test_falls_back_to_torch(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str], name: str, instead: Any, said: str
) -> None:
    monkeypatch.setattr(TritonBandPages, name, instead)
    case = Case("bfloat16")
    before = case.bytes_of(0).clone()
    for _ in range(2):
        case.triton.warm_up(None, None, ranked=False)
    assert case.bytes_of(0).equal(before)
    (warning,) = warnings
    assert warning.startswith(
        "kvcompress: TritonBandPages is not used and compactions run in torch: "
    )
    assert warning.endswith(said)
    # Pages that exist go to torch from now on, and there will be no others.
    assert not TritonBandPages.fits(case.triton.layers)
    for method in METHODS.values():
        arguments = method(), context, SOURCES, [9, 3], 2, True
        mine, reference = case.both(lambda pages, own=arguments: pages.evict(*own))
        assert mine.equal(reference)
    case.assert_same_bytes()


@interpreted
def test_where_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Case("bfloat16").triton.layers
    assert TritonBandPages.fits(layers)
    # CPUs have kernels of their own, or torch, also under the interpreter.
    assert type(band_pages(layers)) is not TritonBandPages
    monkeypatch.setattr(layers[0], "device", torch.device("cuda"))
    assert type(band_pages(layers)) is TritonBandPages
    monkeypatch.setattr(layers[0], "element", torch.float64)
    assert type(band_pages(layers)) is BandPages
    monkeypatch.undo()
    monkeypatch.setattr(layers[0], "device", torch.device("cuda"))
    monkeypatch.setattr(layers[0], "values", object())
    assert type(band_pages(layers)) is BandPages
