"""l2_compress and merge_compress on caches small enough to work out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    SmolLM3Config,
    StaticCache,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_kvcompress.hf import CompressedCache, l2_compress, merge_compress, rotation_of
from vllm_kvcompress.methods.pooling import Rotation
from vllm_kvcompress.settings import SettingsError


def cache_of(keys: torch.Tensor, values: torch.Tensor | None = None, layers: int = 1) -> Any:
    """A DynamicCache whose layers all hold ``[batch, heads, tokens, dim]``."""
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(keys, keys if values is None else values, layer)
    return cache


def with_norms(*heads: list[float]) -> torch.Tensor:
    """Keys ``[1, heads, tokens, 2]`` of these norms, in various directions."""
    norms = torch.tensor(heads, dtype=torch.float32)
    angles = torch.arange(norms.numel()).reshape(norms.shape).float()
    return torch.stack([norms * angles.cos(), norms * angles.sin()], dim=-1)[None]


def counting(tokens: int, dim: int = 2) -> torch.Tensor:
    """``[1, 1, tokens, dim]``: 0, 1, 2, ..."""
    return torch.arange(tokens).float()[None, None, :, None].expand(-1, -1, -1, dim).clone()


# l2_compress


def test_lowest_norms_stay_per_head_in_age_order() -> None:
    keys = with_norms([3, 1, 2, 5, 4], [9, 8, 1, 7, 2])
    values = counting(5).expand(-1, 2, -1, -1).clone()
    cache = l2_compress(cache_of(keys, values), keep_ratio=0.5, prune_after=0)
    layer = cache.layers[0]
    assert layer.values[0, :, :, 0].tolist() == [[0, 1, 2], [2, 3, 4]]  # ceil(0.5 * 5) = 3
    assert torch.equal(layer.keys[0, 1], keys[0, 1, 2:])
    assert layer.slot_columns().tolist() == [[[0, 1, 2], [2, 3, 4]]]
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(2, 0) == (7, 0)


@pytest.mark.parametrize(
    ("keep_ratio", "kept"), [(0.01, 1), (0.2, 1), (0.201, 2), (0.8, 4), (0.81, 5), (1.0, 5)]
)
def test_the_number_kept_is_rounded_up(keep_ratio: float, kept: int) -> None:
    cache = l2_compress(cache_of(with_norms([3, 1, 2, 5, 4])), keep_ratio, prune_after=5)
    assert cache.layers[0].keys.shape[2] == kept


def test_short_and_skipped_layers_are_left_alone() -> None:
    keys = with_norms([3, 1, 2, 5, 4])
    assert l2_compress(cache_of(keys), 0.5, prune_after=6).layers[0].keys.shape[2] == 5
    cache = l2_compress(cache_of(keys, layers=3), 0.5, prune_after=5, skip_layers=[0, 2])
    assert [layer.keys.shape[2] for layer in cache.layers] == [5, 3, 5]
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 5]


def test_the_cache_given_is_not_changed_and_the_default_waits_for_2048_tokens() -> None:
    keys = torch.randn(1, 2, 2047, 4)
    full = cache_of(keys)
    assert l2_compress(full, 0.5).layers[0].keys.shape[2] == 2047
    full.update(keys[:, :, :1], keys[:, :, :1], 0)
    once = l2_compress(full, 0.5)
    assert once.layers[0].keys.shape[2] == 1024
    twice = l2_compress(once, 0.5, prune_after=0)
    assert (twice.layers[0].keys.shape[2], twice.get_seq_length()) == (512, 2048)
    assert (once.layers[0].keys.shape[2], full.layers[0].keys.shape[2]) == (1024, 2048)


def test_padding_counts_for_nothing() -> None:
    keys = torch.cat([with_norms([1, 1, 5, 3, 4, 2]), with_norms([6, 5, 4, 3, 2, 1])])
    values = counting(6).expand(2, -1, -1, -1).clone()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    cache = l2_compress(cache_of(keys, values), 0.5, prune_after=0, attention_mask=mask)
    assert cache.layers[0].slot_columns()[:, 0].tolist() == [[-1, 3, 5], [3, 4, 5]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def filled(model: Any, tokens: int = 40) -> tuple[Any, torch.Tensor]:
    ids = torch.randint(5, 500, (1, tokens), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache, ids


def continued(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([ids, torch.tensor([[7]])], dim=1)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, past_key_values=cache, max_new_tokens=16, **options)


def test_ratio_1_is_plain_generation_and_less_is_not(model: Any) -> None:
    plain, ids = filled(model)
    whole = l2_compress(plain, 1.0, prune_after=0)
    half = l2_compress(plain, 0.5, prune_after=0)
    expected = continued(model, plain, ids)
    assert torch.equal(continued(model, whole, ids), expected)
    assert not torch.equal(continued(model, half, ids), expected)
    assert half.get_seq_length() == whole.get_seq_length() == 40 + 16
    assert half.layers[0].keys.shape[2] == 20 + 16


def test_l2_compress_is_the_cache_that_compresses_itself(model: Any) -> None:
    plain, ids = filled(model)
    half = l2_compress(plain, 0.5, prune_after=0)
    settings = {
        "method": "knorm",
        "keep_ratio": 0.5,
        "sink_tokens": 0,
        "recent_tokens": 0,
        "interval": 1000,
    }
    itself = CompressedCache(settings)
    with torch.no_grad():
        model(ids, past_key_values=itself)
    for one, other in zip(half.layers, itself.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_go_on_as_if_alone(model: Any, side: str) -> None:
    plain, ids = filled(model)
    short = ids[:, 5:31]
    pad = (0, 14) if side == "right" else (14, 0)
    batch = torch.cat([ids, torch.nn.functional.pad(short, pad)])
    mask = torch.nn.functional.pad(torch.ones_like(short), pad)
    mask = torch.cat([torch.ones_like(ids), mask])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, alone = DynamicCache(), DynamicCache()
    next_token = torch.tensor([[7], [9]])
    with torch.no_grad():
        model(batch, attention_mask=mask, position_ids=positions, past_key_values=cache)
        model(short, past_key_values=alone)
        cache = l2_compress(cache, 0.5, prune_after=0, attention_mask=mask)
        logits = model(
            next_token,
            attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1),
            position_ids=mask.sum(-1, keepdim=True),
            past_key_values=cache,
        ).logits
        for row, single in enumerate((plain, alone)):
            single = l2_compress(single, 0.5, prune_after=0)
            expected = model(next_token[row : row + 1], past_key_values=single).logits
            torch.testing.assert_close(logits[row], expected[0], atol=1e-4, rtol=0)
    assert cache.layers[0].keys.shape[2] == 20 + 1


# merge_compress


def test_pairs_merge_as_worked_out_by_hand() -> None:
    """12 tokens, 8 slots: 1 sink, 9 to merge into 5, 2 recent.

    Counts by level: [9], [7, 1], [5, 2], [3, 3], and of the two levels with 3 the higher
    merges: [3, 1, 1], which is tokens 1 to 4, 5 and 6, then 7, 8 and 9.
    """
    pooled = {"mean": [2.5, 5.5], "max": [4, 6], "best": [1, 5]}
    for pooling, slots in pooled.items():
        cache = merge_compress(
            cache_of(counting(12)),
            8,
            sink_tokens=1,
            recent_tokens=2,
            seq_pooling_type=pooling,
            rope=None,
        )
        layer = cache.layers[0]
        assert layer.values[0, 0, :, 0].tolist() == [0, *slots, 7, 8, 9, 10, 11], pooling
        assert torch.equal(layer.keys, layer.values), pooling
        assert layer.slot_counts().tolist() == [[1, 4, 2, 1, 1, 1, 1, 1]]
        assert layer.slot_columns()[0, 0].tolist() == [0, 4, 6, 7, 8, 9, 10, 11]
        assert cache.get_seq_length() == 12


def test_best_takes_key_and_value_of_the_lower_norm() -> None:
    keys = with_norms([1, 6, 5, 2, 9, 3, 4, 8, 1, 1, 1, 1])
    cache = merge_compress(
        cache_of(keys, counting(12)), 8, 1.0, 1, "best", recent_tokens=2, rope=None
    )
    # (1 or 2), then with (3 or 4): norms 6, 5, 2, 9 -> token 3; norms 3, 4 -> token 5.
    assert cache.layers[0].values[0, 0, :, 0].tolist() == [0, 3, 5, 7, 8, 9, 10, 11]
    assert torch.equal(cache.layers[0].keys[0, 0, 1], keys[0, 0, 3])


def test_mean_turns_keys_to_the_centre_of_their_span() -> None:
    """One token's key at all positions: unrotated they are equal, and stay so."""
    rotation = Rotation(torch.tensor([1.1, 0.9]))
    key = torch.tensor([1.0, -2.0, 0.5, 3.0])
    keys = rotation.turn(key.expand(12, -1), torch.arange(12.0))[None, None]
    cache = merge_compress(cache_of(keys), 8, 1.0, 1, rope=rotation, recent_tokens=2)
    centres = torch.tensor([0, 2.5, 5.5, 7, 8, 9, 10, 11])
    expected = rotation.turn(key.expand(8, -1), centres)
    torch.testing.assert_close(cache.layers[0].keys[0, 0], expected)
    plain = merge_compress(cache_of(keys), 8, 1.0, 1, rope=None, recent_tokens=2)
    assert plain.layers[0].keys[0, 0, 1].norm() < 0.9 * key.norm()  # they cancel


def test_equal_keys_and_values_stay_as_they_are() -> None:
    keys = torch.full((1, 2, 30, 4), 0.3)
    for pooling in ("mean", "max", "best"):
        cache = merge_compress(cache_of(keys), 16, seq_pooling_type=pooling, rope=None)
        assert torch.equal(cache.layers[0].keys, keys[:, :, :16])
        assert cache.layers[0].slot_counts().sum() == 30


def test_every_layer_has_its_window_on_the_pyramid() -> None:
    cache = merge_compress(cache_of(torch.randn(1, 1, 64, 4), layers=4), 40, 4.0, 2, rope=None)
    # 40 * (1 - 0.75 * k / 4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [40, 33, 25, 18]
    for layer in cache.layers:
        assert layer.slot_counts().sum() == 64
        assert layer.slot_columns()[0, 0, :2].tolist() == [0, 1]


def test_the_prompt_can_be_left_alone() -> None:
    cache = merge_compress(
        cache_of(counting(30)), 10, rope=None, skip_prefill_compression=True, prompt_tokens=12
    )
    layer = cache.layers[0]
    assert layer.values[0, 0, :12, 0].tolist() == list(range(12))
    assert layer.keys.shape[2] == 12 + 10
    assert layer.slot_counts()[0, 12:].sum() == 18
    short = merge_compress(
        cache_of(counting(30)), 20, rope=None, skip_prefill_compression=True, prompt_tokens=12
    )
    assert short.layers[0].keys.shape[2] == 30


def test_merging_goes_on_where_it_stopped() -> None:
    """Levels are known from before: merging twice conserves tokens and means."""
    cache = merge_compress(cache_of(counting(40)), 24, rope=None)
    for token in range(40, 60):
        cache.layers[0].update(*[torch.full((1, 1, 1, 2), float(token))] * 2)
    layer = merge_compress(cache, 24, rope=None).layers[0]
    counts = layer.slot_counts()[0]
    assert (layer.keys.shape[2], int(counts.sum())) == (24, 60)
    first = torch.cumsum(counts, 0) - counts
    assert layer.values[0, 0, :, 0].tolist() == (first + (counts - 1) / 2).tolist()


@pytest.mark.parametrize(("weighting", "exact"), [("count", True), ("none", False)])
def test_a_slot_weighs_what_it_stands_for(weighting: Any, exact: bool) -> None:
    """Equal keys: attention is the mean of all values, if pooled ones count as often."""
    keys, values = torch.ones(1, 1, 30, 2), counting(30)
    cache = merge_compress(cache_of(keys, values), 16, rope=None, merge_weighting=weighting)
    new = torch.ones(1, 1, 1, 2)
    seen_keys, seen_values = cache.update(new, 30 * new, 0)
    module = torch.nn.Module()
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, torch.randn(1, 1, 1, 2), seen_keys, seen_values, None, scaling=1.0
    )
    assert math.isclose(output[0, 0, 0, 0].item(), 15.0, rel_tol=1e-5) == exact


def test_merge_compress_is_the_cache_that_compresses_itself(model: Any) -> None:
    plain, ids = filled(model)
    called = merge_compress(plain, 32, 1.0, 2, rope=model, recent_tokens=5)
    settings = {"method": "merge", "budget": 32, "sink_tokens": 2, "recent_tokens": 5}
    itself = CompressedCache(settings | {"interval": 1000})
    with torch.no_grad():
        model(ids, past_key_values=itself)
    for one, other in zip(called.layers, itself.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.slot_counts(), other.slot_counts())
    assert not torch.equal(continued(model, called, ids), continued(model, plain, ids))


# Rotary embeddings

SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def llama(**rope: Any) -> LlamaConfig:
    return LlamaConfig(**SMALL_MODEL, rope_parameters={"rope_theta": 10000.0} | rope)


@pytest.mark.parametrize(
    ("config", "neox"),
    [
        (llama(rope_type="default"), True),
        (llama(rope_type="linear", factor=4.0), True),
        (
            llama(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
            True,
        ),
        (llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), True),
        (CohereConfig(**SMALL_MODEL), False),
        (PhiConfig(hidden_size=64, num_attention_heads=2), True),
    ],
)
def test_the_rotation_is_the_models_own(config: Any, neox: bool) -> None:
    from transformers import AutoModel

    rotation = rotation_of(config)
    assert rotation is not None
    assert rotation.neox == neox
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, 0
    config.intermediate_size = 16
    embedding = AutoModel.from_config(config).rotary_emb
    assert torch.equal(rotation.angles, embedding.inv_freq)


def test_linear_scaling_differs_from_none() -> None:
    plain, scaled = rotation_of(llama()), rotation_of(llama(rope_type="linear", factor=4.0))
    assert plain is not None and scaled is not None
    torch.testing.assert_close(plain.angles, 4 * scaled.angles)


def test_a_model_without_rope_needs_no_rotation() -> None:
    assert rotation_of(GPT2Config()) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama(rope_type="dynamic", factor=2.0), "RoPE type 'dynamic' change with the length"),
        (
            llama(
                rope_type="longrope",
                factor=4.0,
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
                original_max_position_embeddings=64,
            ),
            "RoPE type 'longrope' change with the length",
        ),
        (Gemma3TextConfig(), "its layers have different RoPEs"),
        (SmolLM3Config(), r"no RoPE \(no_rope_layers\)"),
    ],
)
def test_rotations_that_cannot_be_used_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        rotation_of(config)


# Refusals


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        (
            None,
            TypeError,
            "must be a DynamicCache of transformers without offloading, not NoneType",
        ),
        (((torch.ones(1, 1, 2, 2),) * 2,), TypeError, "not tuple"),
        (StaticCache(LlamaConfig(), max_cache_len=8), TypeError, "not StaticCache"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), TypeError, "not EncoderDecoderCache"),
        (
            DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4)),
            TypeError,
            "full attention in every layer .* not DynamicSlidingWindowLayer",
        ),
        (MtpCache(), TypeError, "not MtpCache"),
        (DynamicCache(), ValueError, "is empty"),
        (CompressedCache({}), ValueError, "compresses itself"),
    ],
)
def test_wrong_caches_are_refused(cache: Any, error: type[Exception], message: str) -> None:
    for compress in (lambda: l2_compress(cache, 0.5), lambda: merge_compress(cache, 8, rope=None)):
        with pytest.raises(error, match=message):
            compress()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio=0.0 is not allowed: it must be in \(0, 1\]"),
        ({"keep_ratio": 1.1}, "keep_ratio=1.1"),
        ({"keep_ratio": -0.5}, "keep_ratio=-0.5"),
        ({"keep_ratio": math.nan}, "keep_ratio=nan"),
        ({"prune_after": -1}, "prune_after=-1 is not allowed: it cannot be negative"),
        ({"skip_layers": [0, 2]}, r"skip_layers=\[0, 2\] .* layers 0 to 1"),
        ({"skip_layers": [-1]}, r"skip_layers=\[-1\]"),
        ({"attention_mask": torch.ones(1, 4)}, r"shape \[1, 5\], .* not \[1, 4\]"),
    ],
)
def test_l2_compress_refuses_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        l2_compress(cache_of(with_norms([3, 1, 2, 5, 4]), layers=2), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_local_window": 0}, "initial_local_window=0"),
        ({"initial_local_window": 8}, "initial_local_window=8 is too small: layer 1 gets 8 slots"),
        ({"steepness_coefficient": 0.0}, "steepness_coefficient=0.0"),
        ({"steepness_coefficient": -2.0}, "steepness_coefficient=-2.0"),
        ({"sink_tokens": -1}, "sink_tokens=-1"),
        ({"recent_tokens": -1}, "recent_tokens=-1"),
        (
            {"recent_tokens": 12},
            "recent_tokens=12 and 5 merged slots, .* 30 tokens may need, are 21",
        ),
        ({"prompt_tokens": -1, "skip_prefill_compression": True}, "prompt_tokens=-1"),
        ({"skip_prefill_compression": True}, "go together"),
        ({"prompt_tokens": 3}, "go together"),
        ({"seq_pooling_type": "median"}, "'median' is not allowed: allowed are mean, max, best"),
        ({"merge_weighting": "twice"}, "merge_weighting='twice' is not allowed"),
        ({"skip_layers": [2]}, "layers 0 to 1"),
    ],
)
def test_merge_compress_refuses_wrong_arguments(options: dict[str, Any], message: str) -> None:
    arguments = {"initial_local_window": 20, "rope": None} | options
    with pytest.raises(ValueError, match=message):
        merge_compress(cache_of(counting(30), layers=2), **arguments)


def test_mean_needs_to_know_the_rotation() -> None:
    with pytest.raises(ValueError, match="rope=None for a model without RoPE"):
        merge_compress(cache_of(counting(30)), 20)
    merge_compress(cache_of(counting(30)), 20, seq_pooling_type="max")


def test_evicting_and_merging_do_not_mix() -> None:
    evicted = l2_compress(cache_of(counting(30)), 0.9, prune_after=0)
    with pytest.raises(ValueError, match="this cache has evicted tokens"):
        merge_compress(evicted, 20, rope=None)
    merged = merge_compress(cache_of(counting(30)), 20, rope=None)
    with pytest.raises(ValueError, match="does not evict merged tokens"):
        l2_compress(merged, 0.5, prune_after=0)
