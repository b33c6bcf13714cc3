"""Pooling of slots: rotation against others' code, merges against whole spans of tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_kvcompress.levels import Round, plan_merges
from vllm_kvcompress.methods.base import settle_near_ties
from vllm_kvcompress.methods.pooling import (
    POOLINGS,
    Best,
    Max,
    Mean,
    Pooling,
    Rotation,
    merge_blocks,
)

EPSILON = 2.0**-9
"""Largest relative error of rounding to bfloat16."""

every_pooling = pytest.mark.parametrize("name", POOLINGS)
both_styles = pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
dims = pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(8, 8), (8, 4), (6, 2), (2, 2), (64, 64), (80, 32)]
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers of their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles_of(rotary_dim: int, base: float = 10000.0) -> torch.Tensor:
    """The plain angles, from 1 down to about ``1 / base``."""
    return base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def spun(
    keys: torch.Tensor, positions: torch.Tensor | float, rotation: Rotation, sign: int = 1
) -> torch.Tensor:
    """Rotate by complex products, in float64, channel pair by channel pair."""
    keys = keys.double().clone()
    angles = rotation.angles.double()
    half = len(angles)
    position = torch.as_tensor(positions, dtype=torch.float64)
    for i in range(half):
        a, b = (i, i + half) if rotation.neox else (2 * i, 2 * i + 1)
        turn = torch.exp(1j * sign * position * angles[i])
        product = torch.complex(keys[..., a], keys[..., b]) * turn
        keys[..., a], keys[..., b] = product.real, product.imag
    return keys


def slot_spans(counts: list[int], size: int) -> list[tuple[int, int]]:
    """First token and number of tokens of every slot held, oldest first."""
    spans = []
    first = 0
    for level in reversed(range(len(counts))):
        for _ in range(counts[level] * size):
            spans.append((first, 2**level))
            first += 2**level
    return spans


def centres(spans: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([first + (length - 1) / 2 for first, length in spans]).double()


def pooled_in_one_pass(
    name: str, keys: torch.Tensor, values: torch.Tensor, spans: list, rotation: Rotation | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every span of tokens pooled at once: ``[..., tokens, dim]`` to ``[..., spans, dim]``.

    ``keys`` are rotated to positions 0, 1, 2, ...; means are those of float64.
    """
    positions = torch.arange(keys.shape[-2])
    pooled = []
    if name == "mean":
        plain = keys.double() if rotation is None else spun(keys, positions, rotation, -1)
        for first, length in spans:
            span = slice(first, first + length)
            pooled.append((plain[..., span, :].mean(-2), values[..., span, :].double().mean(-2)))
    elif name == "max":
        for first, length in spans:
            span = slice(first, first + length)
            pooled.append((keys[..., span, :].amax(-2), values[..., span, :].amax(-2)))
    else:
        norms = settle_near_ties(torch.linalg.vecdot(keys, keys))
        for first, length in spans:
            # The oldest of the lowest: argmin promises nothing about ties.
            kept = torch.full(norms.shape[:-1], first)
            for token in range(first + 1, first + length):
                lowest = norms.gather(-1, kept[..., None])[..., 0]
                kept = torch.where(norms[..., token] < lowest, token, kept)
            pooled.append(
                tuple(
                    rows.gather(-2, kept[..., None, None].expand(*kept.shape, 1, rows.shape[-1]))
                    .squeeze(-2)
                    .clone()
                    for rows in (keys, values)
                )
            )
    new_keys, new_values = (torch.stack(rows, dim=-2) for rows in zip(*pooled, strict=True))
    if name == "mean" and rotation is not None:
        new_keys = spun(new_keys, centres(spans), rotation)
    return new_keys, new_values


def in_blocks(slots: torch.Tensor, size: int) -> torch.Tensor:
    return slots.unflatten(-2, (-1, size))


def compacted(
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: list[int],
    keep: int,
    pooling: Pooling,
    rotation: Rotation | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Plan, merge, and take what is held afterwards."""
    merges = plan_merges(counts, keep)
    keys, values, _ = merge_blocks(keys, values, merges.rounds, pooling, rotation)
    return keys[..., merges.order, :, :], values[..., merges.order, :, :], merges.counts


# -- rotation ------------------------------------------------------------------------------


def test_quarter_turns_by_hand():
    keys = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    angles = torch.tensor([math.pi / 2, 0.0])
    # Only the first pair turns, (x, y) to (-y, x): channels 0 and 2, or 0 and 1.
    neox = Rotation(angles).turn(keys, 1)
    gptj = Rotation(angles, neox=False).turn(keys, 1.0)
    torch.testing.assert_close(neox, torch.tensor([[-3.0, 2.0, 1.0, 4.0, 5.0]]))
    torch.testing.assert_close(gptj, torch.tensor([[-2.0, 1.0, 3.0, 4.0, 5.0]]))


def test_half_positions_turn_half_as_far():
    root = math.sqrt(0.5)
    rotation = Rotation(torch.tensor([math.pi / 2]))
    keys = torch.tensor([[1.0, 0.0]] * 3)
    turned = rotation.turn(keys, torch.tensor([0.5, -0.5, 1.5]))
    torch.testing.assert_close(turned, torch.tensor([[root, root], [root, -root], [-root, root]]))


@both_styles
@dims
def test_turn_is_a_complex_product(neox, head_dim, rotary_dim):
    rotation = Rotation(angles_of(rotary_dim), neox)
    keys = random(3, 7, head_dim)
    before = keys.clone()
    positions = torch.tensor([0, 0.5, -0.5, 1, -16, 33.5, 200])
    expected = spun(keys, positions, rotation).float()
    for given_positions in (positions, positions.double(), positions.expand(3, 7)):
        turned = rotation.turn(keys, given_positions)
        assert turned.shape == keys.shape
        assert turned.dtype == torch.float32
        torch.testing.assert_close(turned, expected, rtol=0, atol=1e-4)
    for i, position in enumerate(positions.tolist()):
        for scalar in (position, torch.tensor(position)):
            alone = rotation.turn(keys[:, i], scalar)
            torch.testing.assert_close(alone, expected[:, i], rtol=0, atol=1e-4)
    assert torch.equal(rotation.turn(keys, torch.arange(7)), rotation.turn(keys, torch.arange(7.0)))
    assert torch.equal(rotation.turn(keys, 0), keys)
    assert torch.equal(rotation.turn(keys, positions)[..., rotary_dim:], keys[..., rotary_dim:])
    assert torch.equal(keys, before)


@given(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from([(8, 8), (8, 4), (6, 2), (32, 32)]),
    st.integers(-128, 128),
    st.integers(-128, 128),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_turns_add_up_and_keep_norms(seed, neox, shape, first, second):
    head_dim, rotary_dim = shape
    rotation = Rotation(angles_of(rotary_dim), neox)
    keys = random(5, head_dim, seed=seed)
    turned = rotation.turn(rotation.turn(keys, first / 2), second / 2)
    torch.testing.assert_close(turned, rotation.turn(keys, (first + second) / 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5, atol=1e-5)


MOVES = [(0, 0), (0, 1), (0, 200), (3, -3), (5, -2), (17, 1), (100, 28), (128, -64), (200, -200)]
"""Positions of a token and how far it is turned on."""


@pytest.mark.parametrize("model", ["Llama", "Cohere", "Glm"])
def test_turn_is_transformers_rotation(model):
    """Llama's is NeoX, Cohere's GPT-J, GLM's GPT-J on half of the channels."""
    code = import_module(f"transformers.models.{model.lower()}.modeling_{model.lower()}")
    config = getattr(code, f"{model}Config")(
        hidden_size=64, num_attention_heads=2, head_dim=32, num_hidden_layers=1
    )
    module = getattr(code, f"{model}RotaryEmbedding")(config)
    rotation = Rotation(module.inv_freq, neox=model == "Llama")
    assert len(rotation.angles) == (8 if model == "Glm" else 16)
    keys = random(1, 3, 1, 32)

    def rotate(position: int) -> torch.Tensor:
        cos, sin = module(keys, torch.tensor([[position]]))
        return code.apply_rotary_pos_emb(keys, keys, cos, sin)[1]

    for position, way in MOVES:
        turned = rotation.turn(rotate(position), way)
        torch.testing.assert_close(turned, rotate(position + way), rtol=0, atol=1e-4)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 256}
LONG = {
    "short_factor": [1 + pair / 8 for pair in range(16)],
    "long_factor": [2.0 + pair for pair in range(16)],
}
ROPES: dict[str, dict] = {
    "default": {"rope_type": "default"},
    "base": {"rope_type": "default", "rope_theta": 5e5},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3, **ORIGINAL, "rope_theta": 5e5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "max_trained_positions": 128},
    "dynamic-alpha": {"rope_type": "dynamic", "alpha": 100.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "text-of-mrope": {"rope_type": "default", "mrope_section": [4, 6, 6]},
    "longrope-short": {"rope_type": "longrope", **LONG, **ORIGINAL},
    "longrope-long": {"rope_type": "longrope", **LONG, **ORIGINAL},
}
VLLM_ROPES = [
    pytest.param(name, neox, id=f"{name}-{'neox' if neox else 'gptj'}")
    for name in ROPES
    for neox in (True, False)
    if neox or not name.startswith("longrope")  # vLLM has that for NeoX only
]


def vllm_rotary(name: str, neox: bool) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A module of vLLM's as a function that rotates ``[heads, 32]`` to a position."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    config = VllmConfig()
    # Read by LongRoPE alone: beyond the original length its long factors hold.
    config.model_config = SimpleNamespace(max_model_len=512 if name == "longrope-long" else 256)
    # Modules are cached by their parameters, which say nothing of the length.
    with set_current_vllm_config(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary_embedding, "_ROPE_DICT", {})
        module = rotary_embedding.get_rope(32, 512, neox, ROPES[name], torch.float32)
    # LongRoPE is no CustomOp: it has the one implementation.
    forward = module.forward if name.startswith("longrope") else module.forward_native

    def rotate(keys: torch.Tensor, position: int) -> torch.Tensor:
        row = keys.reshape(1, -1)
        return forward(torch.tensor([position]), row.clone(), row.clone())[1].view_as(keys)

    return rotate


@pytest.mark.parametrize(("name", "neox"), VLLM_ROPES)
def test_turn_is_vllms_rotation(name, neox):
    rotate = vllm_rotary(name, neox)
    # The angles are what one position makes of (1, 0) in every pair of channels.
    rotary_dim = 8 if name == "partial" else 32
    half = rotary_dim // 2
    first = range(half) if neox else range(0, rotary_dim, 2)
    second = range(half, rotary_dim) if neox else range(1, rotary_dim, 2)
    unit = torch.zeros(1, 32)
    unit[:, first] = 1.0
    once = rotate(unit, 1)[0]
    rotation = Rotation(torch.atan2(once[second], once[first]), neox)
    assert 0.2 < rotation.angles.max() < 1.001

    keys = random(3, 32)
    for position, way in MOVES:
        turned = rotation.turn(rotate(keys, position), way)
        torch.testing.assert_close(turned, rotate(keys, position + way), rtol=0, atol=1e-4)


# -- the contract of every pooling ---------------------------------------------------------


@every_pooling
def test_registered_name_is_a_frozen_pooling(name):
    pooling = POOLINGS[name]()
    assert isinstance(pooling, Pooling)
    assert type(pooling).__name__.lower() == name
    assert pooling == POOLINGS[name]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        pooling.level = 1


@every_pooling
def test_rotation_matters_where_it_is_said_to(name):
    pooling = POOLINGS[name]()
    keys, values = random(3, 5, 2, 8), random(3, 5, 2, 8, seed=1)
    with_it = pooling.pool(keys, values, 2.0, Rotation(angles_of(8)))
    without = pooling.pool(keys, values, 2.0)
    assert torch.equal(with_it[0], without[0]) is not pooling.needs_rotation
    assert torch.equal(with_it[1], without[1])


@every_pooling
@pytest.mark.parametrize(
    "rotation", [None, Rotation(torch.tensor([1.0, 0.01]))], ids=["plain", "rotary"]
)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_shapes_and_dtypes(name, rotation, lead):
    pooling = POOLINGS[name]()
    keys, values = random(*lead, 6, 2, 4), random(*lead, 6, 2, 5, seed=1)
    pooled = pooling.pool(keys, values, 1.0, rotation)
    assert [part.shape for part in pooled] == [(*lead, 6, 4), (*lead, 6, 5)]
    keys, values = random(*lead, 5, 3, 4), random(*lead, 5, 3, 5, seed=1)
    rounds = plan_merges([5], 2).rounds
    *merged, centres = merge_blocks(keys, values, rounds, pooling, rotation)
    assert centres is None
    assert [part.shape for part in merged] == [(*lead, 8, 3, 4), (*lead, 8, 3, 5)]
    assert {part.dtype for part in (*pooled, *merged)} == {torch.float32}
    assert torch.equal(merged[0][..., :5, :, :], keys)
    assert torch.equal(merged[1][..., :5, :, :], values)
    positions = torch.arange(15.0).view(5, 3).expand(*lead, 5, 3)
    *merged, centres = merge_blocks(keys, values, rounds, pooling, rotation, positions)
    assert [part.shape for part in merged] == [(*lead, 8, 3, 4), (*lead, 8, 3, 5)]
    assert centres.shape == (*lead, 8, 3)
    assert {part.dtype for part in (*merged, centres)} == {torch.float32}
    assert torch.equal(centres[..., :5, :], positions)


@every_pooling
def test_nothing_to_merge_gives_back_the_blocks(name):
    keys, values = random(3, 4, 2, 8), random(3, 4, 2, 8, seed=1)
    centres = torch.arange(24.0).view(3, 4, 2)
    merged = merge_blocks(keys, values, [], POOLINGS[name](), Rotation(angles_of(8)), centres)
    for got, given_blocks in zip(merged, (keys, values, centres), strict=True):
        assert torch.equal(got, given_blocks)


def spread(*shape: int, seed: int = 7) -> torch.Tensor:
    """Positions ``[..., blocks, block_size]`` that rise by one to nine from slot to slot."""
    steps = torch.randint(1, 10, shape, generator=torch.Generator().manual_seed(seed))
    return steps.flatten(-2).cumsum(-1).view(shape).float()


@every_pooling
def test_inputs_are_left_alone_and_strides_do_not_matter(name):
    pooling, rotation = POOLINGS[name](), Rotation(angles_of(8))
    blocks = random(3, 6, 4, 8), random(3, 6, 4, 8, seed=1)
    centres = spread(3, 6, 4)
    before = [part.clone() for part in (*blocks, centres)]
    rounds = plan_merges([6], 2).rounds
    plain = merge_blocks(*blocks, rounds, pooling, rotation, centres)
    assert all(torch.equal(*pair) for pair in zip((*blocks, centres), before, strict=True))
    # As a paged cache has them: [blocks, slots, heads, dim], seen by head.
    strided = [part.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for part in blocks]
    assert not strided[0].is_contiguous()
    turned = centres.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    again = merge_blocks(*strided, rounds, pooling, rotation, turned)
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)


@every_pooling
@pytest.mark.parametrize("with_centres", [False, True])
def test_leading_dimensions_are_merged_each_alone(name, with_centres):
    pooling, rotation = POOLINGS[name](), Rotation(angles_of(8))
    given_blocks = [random(3, 4, 9, 3, 8), random(3, 4, 9, 3, 8, seed=1)]
    rounds = plan_merges([7, 2], 4).rounds
    assert len(rounds) > 1
    if with_centres:
        given_blocks.append(spread(3, 4, 9, 3))

    def merged(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        done = merge_blocks(*parts[:2], rounds, pooling, rotation, *parts[2:])
        return list(done[: len(parts)])

    whole = merged(given_blocks)
    for layer in range(3):
        for at in (layer, *((layer, head) for head in range(4))):
            alone = merged([part[at] for part in given_blocks])
            torch.testing.assert_close([part[at] for part in whole], alone, rtol=1e-6, atol=1e-6)


@every_pooling
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_every_grad_mode_gives_the_same_without_gradients(name, mode):
    pooling, rotation = POOLINGS[name](), Rotation(angles_of(8))
    blocks = random(2, 5, 4, 8), random(2, 5, 4, 8, seed=1)
    centres = spread(2, 5, 4)
    rounds = plan_merges([5], 2).rounds
    expected = merge_blocks(*blocks, rounds, pooling, rotation, centres)
    with mode():
        cached = [part.clone() for part in (*blocks, centres)]
        inside = merge_blocks(*cached[:2], rounds, pooling, rotation, cached[2])
    # Tensors made in inference mode refuse to be written to out of it.
    outside = merge_blocks(*cached[:2], rounds, pooling, rotation, cached[2])
    for got in (inside, outside):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        assert not any(part.requires_grad for part in got)


# -- single pairs by hand ------------------------------------------------------------------


def pool_pair(
    pooling: Pooling, keys: list, values: list, gap: float = 1, rotation: Rotation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return pooling.pool(torch.tensor(keys), torch.tensor(values), gap, rotation)


def test_mean_by_hand_turns_to_the_centre():
    root = math.sqrt(0.5)
    rotation = Rotation(torch.tensor([math.pi / 2]))
    # The same key at positions 0 and 1, 0 and 90 degrees: at 0.5 it stands at 45.
    keys, values = pool_pair(Mean(), [[1.0, 0.0], [0.0, 1.0]], [[2.0], [4.0]], 1, rotation)
    torch.testing.assert_close(keys, torch.tensor([root, root]))
    assert values.tolist() == [3.0]
    # Two slots of two: centres 0.5 and 2.5, at 45 and 225 degrees; the new one is 1.5, at 135.
    pair = [[root, root], [-root, -root]]
    keys, _ = pool_pair(Mean(), pair, [[2.0], [4.0]], 2, rotation)
    torch.testing.assert_close(keys, torch.tensor([-root, root]))
    # Unrotated (1, 0) at 0 and (0, 1), at 1 turned to (-1, 0): mean (.5, .5), turned by 45.
    keys, _ = pool_pair(Mean(), [[1.0, 0.0], [-1.0, 0.0]], [[2.0], [4.0]], 1, rotation)
    torch.testing.assert_close(keys, torch.tensor([0.0, root]))
    # A gap of its own for each pair.
    pairs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[root, root], [-root, -root]]])
    keys, _ = Mean().pool(pairs, torch.zeros(2, 2, 1), torch.tensor([1.0, 2.0]), rotation)
    torch.testing.assert_close(keys, torch.tensor([[root, root], [-root, root]]))


def test_mean_by_hand_without_rotation():
    for gap in (1, 8):
        keys, values = pool_pair(Mean(), [[1.0, 0.0], [0.0, 3.0]], [[2.0], [-4.0]], gap)
        assert keys.tolist() == [0.5, 1.5]
        assert values.tolist() == [-1.0]


def test_max_by_hand():
    keys, values = pool_pair(Max(), [[1.0, -2.0], [0.0, -1.0]], [[2.0, 0.0], [-4.0, 1.0]])
    assert keys.tolist() == [1.0, -1.0]
    assert values.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("older", "newer", "expected"),
    [
        ([5.0, 0.0], [3.0, 3.0], "newer"),  # squares of 25 and 18, although sums of 5 and 6
        ([1.0, -2.0], [-3.0, 0.0], "older"),  # 5 and 9
        ([-3.0, 0.0], [0.0, 3.0], "older"),  # equal
        ([0.0, 0.0], [0.0, 0.0], "older"),
        ([1.0 + 2.0**-20, 0.0], [1.0, 0.0], "older"),  # equal within 12 bits
        ([1.0 + 2.0**-9, 0.0], [1.0, 0.0], "newer"),
    ],
)
def test_best_by_hand(older, newer, expected):
    keys, values = pool_pair(Best(), [older, newer], [[10.0], [20.0]])
    assert (keys.tolist(), values.tolist()) == (
        (older, [10.0]) if expected == "older" else (newer, [20.0])
    )


def test_best_decides_per_head_and_slot():
    keys = torch.tensor([[[[1.0], [2.0]], [[2.0], [1.0]]], [[[5.0], [-4.0]], [[3.0], [3.0]]]])
    values = torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]], [[[5.0], [6.0]], [[7.0], [8.0]]]])
    pooled = Best().pool(keys, values, 1)
    assert pooled[0].tolist() == [[[1.0], [1.0]], [[-4.0], [3.0]]]
    assert pooled[1].tolist() == [[[1.0], [4.0]], [[6.0], [7.0]]]


# -- blocks --------------------------------------------------------------------------------


def test_blocks_by_hand():
    """Three blocks of three and one merge, twice."""
    values = torch.arange(12.0).view(4, 3, 1)
    keys = torch.zeros(4, 3, 2)
    rounds = [Round(0, [0, 2], [1, 3]), Round(1, [4], [5])]
    centres = values.squeeze(-1) * 10
    merged = merge_blocks(keys, values, rounds, Mean(), None, centres)
    expected = torch.tensor([[0.5, 2.5, 4.5], [6.5, 8.5, 10.5], [1.5, 5.5, 9.5]])
    assert merged[1][:4].flatten().tolist() == list(range(12))
    assert torch.equal(merged[1][4:].squeeze(-1), expected)
    assert torch.equal(merged[2], torch.cat([centres, expected * 10]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 32])
@pytest.mark.parametrize(
    ("counts", "keep"), [([7], 5), ([7], 3), ([5, 3, 1], 5), ([1, 4, 0, 2], 4)]
)
def test_merged_and_unmerged_blocks_stand_for_the_right_tokens(size, counts, keep):
    """Values are token numbers: the mean is the centre, the maximum the last of a span."""
    spans = slot_spans(counts, size)
    total = spans[-1][0] + spans[-1][1]
    tokens = torch.arange(float(total))
    # Norms fall until the middle of the cache, then rise: best takes the last, or the first.
    norms = 1 + (tokens - total // 2).abs()
    new_counts = plan_merges(counts, keep).counts
    new_spans = slot_spans(new_counts, size)
    firsts = torch.tensor([float(first) for first, _ in new_spans])
    lasts = torch.tensor([float(first + length - 1) for first, length in new_spans])
    lowest = (total // 2 + 0.0 * firsts).clamp(firsts, lasts)
    expected = {"mean": (firsts + lasts) / 2, "max": lasts, "best": lowest}
    for name, pooling in POOLINGS.items():
        held = pooled_in_one_pass(name, norms[:, None], tokens[:, None], spans, None)
        keys, values = (in_blocks(part.float(), size) for part in held)
        _, after, counts_after = compacted(keys, values, counts, keep, pooling())
        assert counts_after == new_counts
        assert after.shape == (keep, size, 1)
        assert torch.equal(after.flatten(), expected[name])


@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(0, 5),
    size=st.integers(1, 4),
    shape=st.sampled_from([(8, 8), (8, 4), (6, 2), (16, 16)]),
    neox=st.booleans(),
    start=st.integers(0, 100_000),
)
@hypothesis_settings(max_examples=80, deadline=None)
def test_mean_of_many_rounds_is_the_mean_of_all_tokens(seed, levels, size, shape, neox, start):
    """Unrotated, averaged and rotated to the centre, with complex numbers in float64."""
    head_dim, rotary_dim = shape
    rotation = Rotation(angles_of(rotary_dim), neox)
    length = 2**levels
    tokens = size * length
    plain = random(2, tokens, head_dim, seed=seed)
    values = random(2, tokens, head_dim, seed=seed + 1)
    keys = spun(plain, start + torch.arange(tokens), rotation).float()
    held_keys, held_values, counts = compacted(
        in_blocks(keys, size), in_blocks(values, size), [length], 1, Mean(), rotation
    )
    assert counts == [0] * levels + [1]
    middles = start + torch.arange(size) * length + (length - 1) / 2
    expected = spun(plain.unflatten(-2, (size, length)).mean(-2), middles, rotation).float()
    torch.testing.assert_close(held_keys.squeeze(-3), expected, rtol=0, atol=1e-4)
    means = values.unflatten(-2, (size, length)).mean(-2)
    torch.testing.assert_close(held_values.squeeze(-3), means, rtol=0, atol=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    blocks=st.integers(1, 33),
    share=st.floats(0, 1),
    size=st.integers(1, 4),
    neox=st.booleans(),
    start=st.integers(0, 50_000),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_mean_of_scattered_tokens_is_turned_to_their_mean_position(
    seed, blocks, share, size, neox, start
):
    """With tokens left out in between, others in each head, centres say how far to turn."""
    rotation = Rotation(angles_of(8), neox)
    tokens = blocks * size
    plain, values = random(2, tokens, 8, seed=seed), random(2, tokens, 8, seed=seed + 1)
    positions = start + spread(2, blocks, size, seed=seed)
    flat = positions.flatten(-2)
    keys = torch.stack([spun(plain[head], flat[head], rotation) for head in (0, 1)]).float()
    keep = blocks.bit_count() + int(share * (blocks - blocks.bit_count()))
    merges = plan_merges([blocks], keep)
    rounds = merges.rounds
    merged = merge_blocks(
        in_blocks(keys, size), in_blocks(values, size), rounds, Mean(), rotation, positions
    )
    held = merged[0][:, merges.order].flatten(1, 2), merged[1][:, merges.order].flatten(1, 2)
    middles = merged[2][:, merges.order].flatten(1, 2)
    for slot, (first, length) in enumerate(slot_spans(merges.counts, size)):
        span = slice(first, first + length)
        assert torch.equal(middles[:, slot], flat[:, span].mean(-1))
        for head in range(2):
            middle = flat[head, span].double().mean()
            expected = spun(plain[head, span].mean(0), middle, rotation).float()
            torch.testing.assert_close(held[0][head, slot], expected, rtol=0, atol=1e-4)
        means = values[:, span].mean(1)
        torch.testing.assert_close(held[1][:, slot], means, rtol=0, atol=1e-5)


@every_pooling
@both_styles
def test_centres_of_consecutive_tokens_change_nothing(name, neox):
    """Given or not: and where they are not given, none come back."""
    pooling, rotation = POOLINGS[name](), Rotation(angles_of(8), neox)
    counts = [6, 2, 1]
    keys, values = random(2, 9, 3, 8), random(2, 9, 3, 8, seed=1)
    middles = centres(slot_spans(counts, 3)).float().view(9, 3).expand(2, 9, 3)
    merges = plan_merges(counts, 4)
    given_none = merge_blocks(keys, values, merges.rounds, pooling, rotation)
    given_them = merge_blocks(keys, values, merges.rounds, pooling, rotation, middles)
    assert given_none[2] is None
    torch.testing.assert_close(given_them[:2], given_none[:2], rtol=0, atol=1e-5)
    expected = centres(slot_spans(merges.counts, 3)).float().view(4, 3).expand(2, 4, 3)
    assert torch.equal(given_them[2][:, merges.order], expected)


@both_styles
@pytest.mark.parametrize("size", [1, 2, 16])
def test_equal_tokens_stay_themselves_under_mean(neox, size):
    """One unrotated key and one value everywhere: pooled, still that key at each centre."""
    rotation = Rotation(angles_of(8), neox)
    plain, value = random(8), random(8, seed=1)
    total = 23 * size
    keys = spun(plain.expand(total, 8), torch.arange(total), rotation).float()
    values = value.expand(total, 8)
    keys, values, counts = compacted(
        in_blocks(keys, size), in_blocks(values, size), [23], 6, Mean(), rotation
    )
    spans = slot_spans(counts, size)
    expected = spun(plain.expand(len(spans), 8), centres(spans), rotation).float()
    torch.testing.assert_close(keys.flatten(0, 1), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(values.flatten(0, 1), value.expand(len(spans), 8))


@pytest.mark.parametrize("name", ["max", "best"])
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 4),
    blocks=st.integers(1, 33),
    share=st.floats(0, 1),
    highest=st.sampled_from([1, 2, 9, 1000]),
)
@hypothesis_settings(max_examples=80, deadline=None)
def test_max_and_best_are_one_pass_over_the_span(name, seed, size, blocks, share, highest):
    """However the merges nest. Whole numbers: many ties of norms, and exact ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, blocks * size, 4)
    keys = torch.randint(-highest, highest + 1, shape, generator=generator).float()
    values = torch.randn(shape, generator=generator)
    keep = blocks.bit_count() + int(share * (blocks - blocks.bit_count()))
    held = compacted(
        in_blocks(keys, size), in_blocks(values, size), [blocks], keep, POOLINGS[name]()
    )
    spans = slot_spans(held[2], size)
    expected = pooled_in_one_pass(name, keys, values, spans, None)
    assert torch.equal(held[0].flatten(-3, -2), expected[0])
    assert torch.equal(held[1].flatten(-3, -2), expected[1])


@every_pooling
@both_styles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "new", "keep"), [(2, 3, 8), (4, 7, 12), (3, 1, 7)])
def test_fifty_compactions_stay_true(name, neox, dtype, size, new, keep):
    """New blocks, a compaction, storage in the cache's type, again and again."""
    pooling, rotation = POOLINGS[name](), Rotation(angles_of(8), neox)
    total = 50 * new * size
    plain = random(2, total, 8)
    tokens = spun(plain, torch.arange(total), rotation).to(dtype).float()
    all_values = random(2, total, 8, seed=1, dtype=dtype).float()
    counts = [0]
    keys, values = torch.empty(2, 0, size, 8), torch.empty(2, 0, size, 8)
    for done in range(50):
        arrived = slice(done * new * size, (done + 1) * new * size)
        keys = torch.cat([keys, in_blocks(tokens[:, arrived], size)], dim=1)
        values = torch.cat([values, in_blocks(all_values[:, arrived], size)], dim=1)
        counts[0] += new
        target = min(keep, sum(counts))
        keys, values, counts = compacted(keys, values, counts, target, pooling, rotation)
        assert keys.shape == values.shape == (2, target, size, 8)
        keys, values = keys.to(dtype).float(), values.to(dtype).float()
        assert keys.isfinite().all() and values.isfinite().all()
    spans = slot_spans(counts, size)
    assert spans[-1][0] + spans[-1][1] == total
    expected = pooled_in_one_pass(name, tokens, all_values, spans, rotation)
    held = keys.flatten(1, 2), values.flatten(1, 2)
    if name != "mean":
        # Both choose among what is stored: nothing is ever rounded again.
        assert torch.equal(held[0], expected[0]) and torch.equal(held[1], expected[1])
        return
    # Each round rounds the mean of a pair, of no longer vectors, once more.
    rounds = torch.tensor([length.bit_length() for _, length in spans])[:, None]
    for got, want, source in zip(held, expected, (tokens, all_values), strict=True):
        longest = source.norm(dim=-1).max().item()
        slack = 1e-5 + (rounds * EPSILON * longest if dtype == torch.bfloat16 else 0)
        assert ((got - want).abs() <= slack).all()


# -- what attention sees -------------------------------------------------------------------


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | float = 0
) -> torch.Tensor:
    logits = query @ keys.mT / math.sqrt(query.shape[-1]) + bias
    return logits.softmax(dim=-1) @ values


@cache
def long_request(name: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and lengths of the slots of two heads after ten compactions."""
    keys, values = torch.empty(2, 0, size, 8), torch.empty(2, 0, size, 8)
    counts = [0]
    for done in range(10):
        keys = torch.cat([keys, random(2, 4, size, 8, seed=2 * done)], dim=1)
        values = torch.cat([values, random(2, 4, size, 8, seed=2 * done + 1)], dim=1)
        counts[0] += 4
        keep = min(8, sum(counts))
        rotation = Rotation(angles_of(8))
        keys, values, counts = compacted(keys, values, counts, keep, POOLINGS[name](), rotation)
    lengths = torch.tensor([length for _, length in slot_spans(counts, size)])
    assert lengths.sum() == 40 * size and len(lengths.unique()) > 2
    return keys.flatten(1, 2), values.flatten(1, 2), lengths


@every_pooling
@pytest.mark.parametrize("size", [1, 4])
def test_counting_a_slot_n_times_is_adding_log_n(name, size):
    """A merged slot's weight: as if it stood there once for each of its tokens."""
    keys, values, lengths = long_request(name, size)
    query = 3 * random(2, 5, 8, seed=77)
    repeated = [part.repeat_interleave(lengths, dim=1) for part in (keys, values)]
    weighted = attention(query, keys, values, lengths.log())
    torch.testing.assert_close(weighted, attention(query, *repeated), rtol=0, atol=1e-5)
    # Counted once, the old tokens lose weight.
    assert (attention(query, keys, values) - weighted).abs().max() > 0.01


@every_pooling
def test_merging_equal_tokens_changes_no_attention(name):
    """Tokens of a span all alike, without rotation: weighted slots are the whole cache."""
    size = 2
    counts = plan_merges([20], 6).counts
    spans = slot_spans(counts, size)
    lengths = torch.tensor([length for _, length in spans])
    keys = random(2, len(spans), 8).repeat_interleave(lengths, dim=1)
    values = random(2, len(spans), 8, seed=1).repeat_interleave(lengths, dim=1)
    held = compacted(in_blocks(keys, size), in_blocks(values, size), [20], 6, POOLINGS[name]())
    assert held[2] == counts
    query = 3 * random(2, 5, 8, seed=2)
    torch.testing.assert_close(
        attention(query, held[0].flatten(1, 2), held[1].flatten(1, 2), lengths.log()),
        attention(query, keys, values),
        rtol=0,
        atol=1e-5,
    )


def test_importing_pooling_imports_no_vllm():
    code = (
        "import sys, vllm_kvcompress.methods.pooling\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
