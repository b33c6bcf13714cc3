"""The pure-torch eviction methods: every registered one, then each by hand."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracle import Compaction, best_candidates, candidate_scores, kept_sets_agree

from vllm_kvcompress.methods import METHODS, Method, ScoreContext, select_tokens
from vllm_kvcompress.methods.base import settle_near_ties
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.kvdiff import KVDiff
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.streaming import Streaming
from vllm_kvcompress.settings import Settings

HEADS, TOKENS, HEAD_DIM = 3, 50, 8
CONTEXT = ScoreContext(layer=4, position=200, first_head=0, total_heads=HEADS)

ROUNDING = 2.5e-4
"""Two scores that differ by rounding noise only may be rounded apart by this, relatively."""

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def keys() -> torch.Tensor:
    """Random keys, ``[HEADS, TOKENS, HEAD_DIM]``, with a mean direction as real keys have."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(HEADS, TOKENS, HEAD_DIM, generator=generator) + 0.5


def values_of(keys: torch.Tensor) -> torch.Tensor:
    """Values of the shape of some keys, and of nothing else of them."""
    return torch.randn(keys.shape, generator=torch.Generator().manual_seed(5))


def assert_close(scores: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 noise, which may turn into one step of the rounding."""
    torch.testing.assert_close(scores, expected, rtol=ROUNDING, atol=1e-6)


# The contract of every method.


@every_method
def test_registered_name_is_a_method_and_a_setting(name):
    method = METHODS[name]()
    assert isinstance(method, Method)
    assert type(method).__name__.lower() == name
    assert Settings(method=name).method == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.seed = 1


@every_method
@pytest.mark.parametrize("shape", [(3, 50, 8), (1, 1, 2), (1, 16, 64), (8, 200, 64)])
def test_scores_are_float32_per_head_and_token(name, shape):
    torch.manual_seed(0)
    context = ScoreContext(layer=0, position=300, total_heads=shape[0])
    scores = METHODS[name]().score(torch.randn(shape), context, torch.randn(shape))
    assert scores.shape == shape[:2]
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@every_method
def test_scores_are_deterministic_and_leave_the_keys_alone(name, keys):
    values = values_of(keys)
    before = keys.clone(), values.clone()
    first = METHODS[name](seed=3).score(keys, CONTEXT, values)
    torch.manual_seed(99)
    torch.rand(5)
    second = METHODS[name](seed=3).score(keys, CONTEXT, values)
    assert torch.equal(first, second)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@every_method
def test_scores_leave_the_global_generator_alone(name, keys):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    METHODS[name]().score(keys, CONTEXT, values_of(keys))
    assert torch.equal(torch.rand(4), expected)


@every_method
def test_scores_do_not_depend_on_strides(name, keys):
    strided = keys.transpose(0, 1).contiguous().transpose(0, 1)
    values = values_of(keys)
    across = values.transpose(0, 1).contiguous().transpose(0, 1)
    scores = METHODS[name]().score(strided, CONTEXT, across)
    assert_close(scores, METHODS[name]().score(keys, CONTEXT, values))


@every_method
def test_ranks_of_tensor_parallelism_see_slices_of_the_whole(name, keys):
    """A rank that holds some heads keeps what a single rank would keep for them."""
    method = METHODS[name](seed=11)
    values = values_of(keys)
    whole = method.score(keys, CONTEXT, values)
    for first, last in ((0, 1), (1, 2), (2, 3), (0, 2), (1, 3)):
        context = dataclasses.replace(CONTEXT, first_head=first)
        part = method.score(keys[first:last], context, values[first:last])
        assert_close(part, whole[first:last])


@every_method
def test_methods_read_what_they_say_they_need_and_nothing_else(name, keys):
    method = METHODS[name]()
    values = values_of(keys)
    scores = method.score(keys, CONTEXT, values)
    unread = torch.full_like(keys, math.nan)
    if method.needs_keys:
        assert not torch.equal(method.score(keys.flip(1), CONTEXT, values), scores)
    else:
        assert torch.equal(method.score(unread, CONTEXT), scores)
    if method.needs_values:
        assert not torch.equal(method.score(keys, CONTEXT, values.flip(1)), scores)
        with pytest.raises(ValueError, match="no values"):
            method.score(keys, CONTEXT)
    else:
        assert torch.equal(method.score(keys, CONTEXT), scores)
        assert torch.equal(method.score(keys, CONTEXT, unread), scores)


@every_method
def test_choice_is_that_of_the_independent_oracle(name, keys):
    settings = Settings(method=name, seed=2)
    try:
        expected = candidate_scores(
            settings, keys, CONTEXT.layer, CONTEXT.position, values_of(keys)
        )
    except ValueError as unknown:
        pytest.skip(str(unknown))
    method = METHODS[name](seed=2)
    scores = method.score(keys, CONTEXT, values_of(keys))
    expected[:, :4] = math.inf
    compaction = Compaction(
        position=CONTEXT.position,
        band=0,
        candidate_blocks=5,
        kept_blocks=2,
        kept={4: best_candidates(expected, 20).nonzero()[:, 1].view(HEADS, 20)},
        candidates={4: torch.arange(TOKENS).repeat(HEADS, 1)},
        scores={4: expected},
    )
    kept = select_tokens(scores, keep=20, sinks=4)
    assert kept_sets_agree(compaction, 4, kept, rtol=ROUNDING if method.needs_keys else 0)


def test_importing_methods_imports_no_vllm():
    code = (
        "import sys, vllm_kvcompress.methods\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


# Each method by hand.


def test_knorm_keeps_the_lowest_norms_per_head():
    keys = torch.tensor(
        [
            [[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [2.0, 0.0]],  # norms 5, 1, 10, 2
            [[0.0, 0.5], [3.0, 0.0], [0.0, 0.0], [1.0, 1.0]],  # norms 0.5, 3, 0, 1.4
        ]
    )
    scores = KNorm().score(keys, ScoreContext(0, 4, total_heads=2))
    assert scores.argsort(descending=True).tolist() == [[1, 3, 0, 2], [2, 0, 3, 1]]
    assert select_tokens(scores, keep=2, sinks=0).tolist() == [[1, 3], [0, 2]]


def test_keydiff_keeps_the_keys_unlike_the_mean_direction():
    # Unit keys at 0, 0, 90 and 180 degrees: the mean is (0.25, 0.25), at 45 degrees.
    # Cosines 0.7071, 0.7071, 0.7071, -0.7071: the last is the least similar; lengths count not.
    keys = torch.tensor([[[1.0, 0.0], [100.0, 0.0], [0.0, 0.01], [-3.0, 0.0]]])
    scores = KeyDiff().score(keys, ScoreContext(0, 4))
    half = math.sqrt(0.5)
    assert_close(scores, torch.tensor([[-half, -half, -half, half]]))
    assert (scores[0, :3] == scores[0, 0]).all()


def test_keydiff_ignores_lengths(keys):
    lengths = torch.rand(HEADS, TOKENS, 1, generator=torch.Generator().manual_seed(1)) * 50 + 0.1
    assert_close(KeyDiff().score(keys * lengths, CONTEXT), KeyDiff().score(keys, CONTEXT))


def test_keydiff_of_zero_keys_is_finite():
    assert KeyDiff().score(torch.zeros(1, 3, 2), ScoreContext(0, 3)).isfinite().all()


def test_kvdiff_adds_both_in_standard_deviations():
    # Unit keys at 0, 0, 90 and 180 degrees: cosines 0.7071 three times and -0.7071, whose mean
    # is 0.3536 and standard deviation 0.6124. Norms 1, 2, 2, 1: 0.5 from their mean, all of them.
    keys = torch.tensor([[[1.0, 0.0], [100.0, 0.0], [0.0, 0.01], [-3.0, 0.0]]])
    values = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.2, 1.6], [0.6, 0.8]]])
    scores = KVDiff().score(keys, ScoreContext(0, 4), values)
    like, unlike = -math.sqrt(1 / 3), math.sqrt(3)
    assert_close(scores, torch.tensor([[like - 1, like + 1, like + 1, unlike - 1]]))
    assert scores[0, 1] == scores[0, 2]


def test_kvdiff_ignores_the_scales_of_keys_and_values(keys):
    values = values_of(keys)
    scores = KVDiff().score(keys, CONTEXT, values)
    torch.testing.assert_close(
        KVDiff().score(keys * 7, CONTEXT, values * 0.03), scores, rtol=0, atol=1 / 4096
    )


def test_kvdiff_of_equal_tokens_is_zero_and_of_zeros_finite():
    same = torch.rand(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 500, 8)
    assert (KVDiff().score(same, ScoreContext(0, 500), same * 3) == 0).all()
    zeros = torch.zeros(1, 3, 2)
    assert (KVDiff().score(zeros, ScoreContext(0, 3), zeros) == 0).all()


def test_streaming_keeps_sinks_and_the_most_recent(keys):
    scores = Streaming().score(keys, CONTEXT)
    kept = select_tokens(scores, keep=5, sinks=2)
    assert kept.tolist() == [[0, 1, 47, 48, 49]] * HEADS


def test_streaming_order_is_exact_for_long_contexts():
    scores = Streaming().score(torch.empty(1, 1_000_000, 1), ScoreContext(0, 1_000_000))
    assert (scores.diff() == 1).all()


def test_random_depends_on_seed_layer_position_and_head(keys):
    scores = Random(seed=1).score(keys, CONTEXT)
    others = [
        Random(seed=2).score(keys, CONTEXT),
        Random(seed=1).score(keys, dataclasses.replace(CONTEXT, layer=5)),
        Random(seed=1).score(keys, dataclasses.replace(CONTEXT, position=201)),
    ]
    assert all(not torch.equal(scores, other) for other in others)
    assert not torch.equal(scores[0], scores[1])


def test_random_is_uniform():
    scores = Random().score(torch.empty(4, 20_000, 1), ScoreContext(0, 20_000, total_heads=4))
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    assert (scores.mean(1) - 0.5).abs().max() < 0.01


def test_random_slices_of_ranks_are_exactly_the_full_draw(keys):
    whole = Random(seed=8).score(keys, CONTEXT)
    parts = [
        Random(seed=8).score(keys[head : head + 1], dataclasses.replace(CONTEXT, first_head=head))
        for head in range(HEADS)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("seed", [0, 1, 2**22, 2**31, 2**63, 2**100])
def test_every_seed_that_settings_accept_can_be_drawn_with(seed, keys):
    try:
        settings = Settings(method="random", seed=seed)
    except ValueError:
        return
    assert Random(seed=settings.seed).score(keys, CONTEXT).shape == (HEADS, TOKENS)


# Rounding of near ties.


def numbers(**kwargs):
    return st.floats(width=32, allow_nan=False, allow_infinity=False, **kwargs)


@given(st.lists(numbers(min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=50))
@hypothesis_settings(max_examples=200, deadline=None)
def test_settled_scores_are_close_in_order_and_settled(values):
    scores = torch.tensor(sorted(values))
    settled = settle_near_ties(scores)
    assert settled.shape == scores.shape
    assert settled.dtype == torch.float32
    # Nearest of the numbers with 12 bits after the leading one; denormal ones aside.
    assert ((settled - scores).abs() <= scores.abs() * 2.0**-13 + 2.0**-136).all()
    assert (settled.diff() >= 0).all()
    assert torch.equal(settle_near_ties(settled), settled)
    assert torch.equal(settle_near_ties(-scores), -settled)


def test_settled_scores_keep_infinity_and_strides():
    assert settle_near_ties(torch.tensor([-math.inf, math.inf])).tolist() == [-math.inf, math.inf]
    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(settle_near_ties(scores.T), settle_near_ties(scores).T)


def test_knorm_ties_one_key_rotated_to_many_positions():
    """Occurrences of a token in the first layer: only their rotation differs."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(32, 2, generator=generator, dtype=torch.float64)
    angles = torch.arange(1000.0, dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(32.0, dtype=torch.float64) / 32
    )
    rotated = torch.view_as_complex(key) * torch.polar(torch.ones_like(angles), angles)
    keys = torch.view_as_real(rotated).flatten(1).float()[None]
    scores = KNorm().score(keys, ScoreContext(0, 1000))
    assert torch.linalg.vecdot(keys, keys).unique().numel() > 1
    assert scores.unique().numel() == 1
    assert select_tokens(scores, keep=3, sinks=0).tolist() == [[0, 1, 2]]


# From scores to kept tokens.


def brute_force_select(scores: np.ndarray, keep: int, sinks: int) -> list:
    """Indices that stay, by sorting (score, age) tuples, for any leading dimensions."""
    if scores.ndim > 1:
        return [brute_force_select(row, keep, sinks) for row in scores]
    ranked = sorted(range(sinks, len(scores)), key=lambda token: (-scores[token], token))
    return sorted([*range(sinks), *ranked[: keep - sinks]])


@st.composite
def selections(draw):
    """Scores with many ties, tokens to keep and sinks."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=2, max_side=30))
    value = st.one_of(
        st.integers(-2, 2).map(float),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -0.0]),
    )
    scores = draw(hnp.arrays(np.float32, shape, elements=value))
    keep = draw(st.integers(0, shape[-1]))
    return scores, keep, draw(st.integers(0, keep))


@given(selections())
@hypothesis_settings(max_examples=200, deadline=None)
def test_select_tokens_is_brute_force(selection):
    scores, keep, sinks = selection
    kept = select_tokens(torch.from_numpy(scores), keep, sinks)
    assert kept.dtype == torch.int64
    assert kept.shape == (*scores.shape[:-1], keep)
    assert kept.tolist() == brute_force_select(scores, keep, sinks)


@given(selections())
@hypothesis_settings(max_examples=100, deadline=None)
def test_select_tokens_keeps_sinks_and_age_order(selection):
    scores, keep, sinks = selection
    kept = select_tokens(torch.from_numpy(scores), keep, sinks)
    assert (kept[..., :sinks] == torch.arange(sinks)).all()
    assert (kept.diff(dim=-1) > 0).all()
    assert ((kept >= 0) & (kept < scores.shape[-1])).all()


def test_select_tokens_keeps_the_older_of_equal_scores():
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [0.0] * 6])
    assert select_tokens(scores, keep=4, sinks=0).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert select_tokens(scores, keep=3, sinks=1).tolist() == [[0, 1, 3], [0, 1, 2]]


def test_select_tokens_breaks_ties_by_age_on_long_rows():
    # Long enough for the sort to leave its insertion-sort regime, which is always stable.
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (2, 5000), generator=generator).float()
    kept = select_tokens(scores, keep=2000, sinks=4)
    assert kept.tolist() == brute_force_select(scores.numpy(), 2000, 4)


def test_select_tokens_at_its_edges():
    scores = torch.tensor([[5.0, 1.0, 4.0]])
    assert select_tokens(scores, keep=3, sinks=0).tolist() == [[0, 1, 2]]
    assert select_tokens(scores, keep=3, sinks=3).tolist() == [[0, 1, 2]]
    assert select_tokens(scores, keep=2, sinks=2).tolist() == [[0, 1]]
    assert select_tokens(scores, keep=0, sinks=0).tolist() == [[]]


@every_method
@given(
    keys=hnp.arrays(
        np.float32, (2, 24, 4), elements=st.floats(-8, 8, width=32, allow_subnormal=False)
    ),
    keep=st.integers(1, 24),
    sinks=st.integers(0, 8),
)
@hypothesis_settings(max_examples=50, deadline=None)
def test_select_after_score_keeps_a_valid_set(name, keys, keep, sinks):
    sinks = min(sinks, keep)
    values = torch.from_numpy(keys).flip(1)
    scores = METHODS[name]().score(
        torch.from_numpy(keys), ScoreContext(0, 24, total_heads=2), values
    )
    kept = select_tokens(scores, keep, sinks)
    assert kept.shape == (2, keep)
    assert (kept.diff(dim=-1) > 0).all()
    assert (kept[:, :sinks] == torch.arange(sinks)).all()
    dropped = torch.ones(2, 24, dtype=torch.bool).scatter_(1, kept, False)
    if keep > sinks and dropped.any():
        lowest_kept = scores.gather(1, kept)[:, sinks:].amin(1)
        highest_dropped = scores.masked_fill(~dropped, -math.inf).amax(1)
        assert (lowest_kept >= highest_dropped).all()
