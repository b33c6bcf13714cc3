"""Bands: vLLM's grouping rule, budgets by hand, and helpful refusals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import pytest
import torch
from engine_stub import EngineOptions, build_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, SlidingWindowSpec

from vllm_kvcompress.bands import MAX_PADDING, Band, group_layout, plan_bands
from vllm_kvcompress.limits import Limits, Merging
from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec
from vllm_kvcompress.settings import Settings, SettingsError

HALF = Fraction(1, 2)
ALL = Merging(None, count=True)

SHAPE = {"block_size": 32, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}


def bands_of(sizes: list[int]) -> list[Band]:
    """Bands of these sizes, one after the other."""
    ends = list(itertools.accumulate(sizes))
    return [
        Band(index, tuple(range(end - size, end)), Limits(64, None, 0, 0, 32))
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def width_of(groups: list[KVCacheGroupSpec]) -> int:
    return max(len(group.layer_names) for group in groups)


def groups_of(bands: list[Band], windows: Sequence[int] = ()) -> list[KVCacheGroupSpec]:
    """What vLLM makes of these bands and of layers with a sliding window."""
    specs = {
        f"model.layers.{layer}.attn": CompressedAttentionSpec(
            **SHAPE,
            band=band.index,
            limits=band.limits,
            phase="after_prefill",
            interval=128,
            prune_after=0,
        )
        for band in bands
        for layer in band.layers
    }
    for index, count in enumerate(windows):
        spec = SlidingWindowSpec(**SHAPE, sliding_window=32 * (index + 1))
        specs |= {f"model.layers.{1000 * (index + 1) + i}.attn": spec for i in range(count)}
    return _get_kv_cache_groups_uniform_page_size(specs)


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    windows=st.lists(st.integers(1, 40), max_size=2),
)
def test_group_layout_is_vllms(sizes: list[int], windows: list[int]) -> None:
    bands = bands_of(sizes)
    groups = groups_of(bands, windows)
    width, count, padding = group_layout([*sizes, *windows])
    assert count == len(groups)
    assert width == width_of(groups)
    real = sum(sizes) + sum(windows)
    assert padding == pytest.approx((count * width - real) / real)
    for group in groups:
        spec = group.kv_cache_spec
        if isinstance(spec, CompressedAttentionSpec):
            layers = {int(name.split(".")[2]) for name in group.layer_names}
            assert layers <= set(bands[spec.band].layers)


@settings(max_examples=300, deadline=None)
@given(
    num_layers=st.integers(1, 64),
    skipped=st.integers(0, 4),
    wanted=st.none() | st.integers(1, 12),
    beta=st.sampled_from([1.0, 0.5, 2.0, 4.0]),
    windows=st.lists(st.integers(1, 40), max_size=1),
)
def test_planned_bands_cover_the_layers_without_waste(
    num_layers: int, skipped: int, wanted: int | None, beta: float, windows: list[int]
) -> None:
    chosen = Settings(bands=wanted, pyramid_beta=beta, skip_layers=list(range(skipped)))
    try:
        bands = plan_bands(chosen, num_layers, 32, other_groups=windows)
    except SettingsError:
        return
    layers = [layer for band in bands for layer in band.layers]
    assert sorted(layers) == list(range(num_layers))
    groups = groups_of(bands, windows)
    assert len(groups) * width_of(groups) <= (num_layers + sum(windows)) * (1 + MAX_PADDING)
    assert {b.index for b in bands} == {
        group.kv_cache_spec.band
        for group in groups
        if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
    }
    compressed = [band for band in bands if band.limits is not None]
    assert wanted is None or len(compressed) == wanted
    assert max(len(b.layers) for b in compressed) - min(len(b.layers) for b in compressed) <= 1


# -- budgets by hand ----------------------------------------------------------------------


def budgets(bands: list[Band]) -> list[int | None]:
    return [band.limits.budget if band.limits else None for band in bands]


def test_pyramid_of_six_bands() -> None:
    # Means of layers 2, 7, ... 27: 768 * (1 - k/30 * 3/4) = 729.6, 633.6, ... 249.6.
    bands = plan_bands(Settings(budget=768, pyramid_beta=4.0), 30, 32)
    assert budgets(bands) == [736, 640, 544, 448, 352, 256]
    assert [band.layers for band in bands] == [tuple(range(i, i + 5)) for i in range(0, 30, 5)]


def test_pyramid_that_widens() -> None:
    # 256 * (1 + k/4): 256, 320, 384, 448.
    bands = plan_bands(Settings(budget=256, pyramid_beta=0.5, bands=4), 4, 32)
    assert budgets(bands) == [256, 320, 384, 448]


def test_pyramid_counts_skipped_layers() -> None:
    # Layers 1, 2 and 3 of 4: 512 * (1 - k/4 * 1/2) = 448, 384, 320; layer 0 keeps all.
    chosen = Settings(budget=512, pyramid_beta=2.0, bands=3, skip_layers=[0])
    bands = plan_bands(chosen, 4, 32)
    assert budgets(bands) == [448, 384, 320, None]
    assert [(band.index, band.layers) for band in bands] == [
        (0, (1,)),
        (1, (2,)),
        (2, (3,)),
        (-1, (0,)),
    ]


def test_flat_budget_is_one_band_rounded_up_to_a_block() -> None:
    (band,) = plan_bands(Settings(budget=500), 30, 32)
    assert band.limits == Limits(512, None, 4, 64, 32)
    (band,) = plan_bands(Settings(budget=500, recent_ratio=0.3), 30, 32)
    assert band.limits == Limits(512, None, 4, 64, 32, recent_share=Fraction(3, 10))
    assert band.layers == tuple(range(30))


def test_ratio_follows_the_pyramid_and_ends_at_one() -> None:
    bands = plan_bands(Settings(keep_ratio=0.3, pyramid_beta=2.0, bands=2), 2, 32)
    assert [band.limits.ratio for band in bands] == [Fraction(3, 10), Fraction(9, 40)]
    bands = plan_bands(Settings(keep_ratio=0.9, pyramid_beta=0.5, bands=2), 2, 32)
    assert [band.limits.ratio for band in bands] == [Fraction(9, 10), Fraction(1)]


def test_decode_has_no_sinks() -> None:
    (band,) = plan_bands(Settings(budget=256, phase="decode", sink_tokens=8), 4, 32)
    assert band.limits is not None
    assert band.limits.sinks == 0


def test_only_eligible_layers_are_planned() -> None:
    bands = plan_bands(Settings(skip_layers=[0, 1, 2]), 6, 32, eligible=[1, 3, 5])
    assert [(band.index, band.layers) for band in bands] == [(0, (3, 5)), (-1, (1,))]


# -- how much stays -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "live", "position", "old_and_kept"),
    [
        (Limits(64, None, 4, 16, 16), 64, 64, (3, 3)),  # not over its budget
        (Limits(64, None, 4, 16, 16), 65, 65, (3, 2)),  # 17 untouched, 2 blocks fit
        (Limits(64, None, 4, 16, 16), 200, 500, (11, 2)),  # 24 untouched
        (Limits(96, None, 40, 16, 16), 200, 200, (11, 4)),
        (Limits(96, None, 80, 16, 16), 200, 200, (11, 5)),  # five blocks for the sinks
        (Limits(None, Fraction(1, 2), 0, 0, 16), 160, 160, (10, 5)),
        (Limits(None, Fraction(1, 2), 0, 0, 16), 161, 161, (10, 5)),  # 81 - 1 untouched
        (Limits(None, Fraction(1, 2), 0, 32, 16), 161, 161, (8, 3)),  # 81 - 33 untouched
        (Limits(None, Fraction(1, 2), 0, 32, 16), 162, 162, (8, 3)),  # 81 - 34 untouched
        (Limits(None, Fraction(1, 100), 0, 0, 16), 160, 160, (10, 1)),  # never nothing
        # A share of what is kept is recent: 64 of 128, with 8 untouched beside.
        (Limits(128, None, 4, 16, 16, None, HALF), 200, 200, (8, 3)),
        (Limits(64, None, 4, 40, 16, None, HALF), 200, 500, (10, 1)),  # 32 are fewer than 40
        (Limits(None, HALF, 0, 0, 16, None, HALF), 160, 160, (7, 2)),  # 40 of 80, 8 beside
        (Limits(None, HALF, 0, 0, 16, None, HALF), 200, 320, (7, 5)),  # 80 of 160, 8 beside
        # All of it, but for the block that stays and one that is not full.
        (Limits(128, None, 4, 16, 16, None, Fraction(1)), 200, 200, (6, 1)),  # 97, 7 beside
        (Limits(96, None, 40, 16, 16, None, HALF), 200, 200, (10, 3)),  # 3 stay: 33, 7 beside
        # 200 tokens are 12 blocks, four binary digits: 5 stay with the sinks', 97 are recent.
        (Limits(192, None, 4, 0, 16, ALL, Fraction(1)), 200, 200, (6, 5)),
    ],
)
def test_blocks_kept(
    limits: Limits, live: int, position: int, old_and_kept: tuple[int, int]
) -> None:
    assert limits.blocks_kept(live, position) == old_and_kept


@given(
    ratio=st.fractions(Fraction(1, 50), 1, max_denominator=50),
    tokens=st.integers(1, 2000),
    recent=st.integers(0, 100),
    size=st.sampled_from([1, 16, 32]),
    latest=st.fractions(0, 1, max_denominator=10),
)
def test_ratio_keeps_at_least_its_share_and_at_most_a_block_more(
    ratio: Fraction, tokens: int, recent: int, size: int, latest: Fraction
) -> None:
    limits = Limits(None, ratio, 0, recent, size, None, latest)
    old, kept = limits.blocks_kept(tokens, tokens)
    if kept < old:
        held = tokens - (old - kept) * size
        share = ceil(ratio * tokens)
        assert held >= share
        assert held < share + size or kept == 1


# -- refusals -----------------------------------------------------------------------------


def refusal(num_layers: int, block_size: int = 32, **chosen: object) -> str:
    with pytest.raises(SettingsError) as error:
        plan_bands(Settings(**chosen), num_layers, block_size)
    return str(error.value)


def test_wasteful_bands_name_the_nearest_good_choices() -> None:
    message = refusal(30, bands=4, skip_layers=[0, 1])
    assert "bands=4 is not allowed: with 2 skipped layers it makes 17 groups" in message
    assert "wastes 13% of the memory" in message
    good = []
    for count in range(1, 29):
        sizes = [28 // count + (index < 28 % count) for index in range(count)]
        groups = groups_of(bands_of([*sizes, 2]))
        if len(groups) * width_of(groups) <= 30 * (1 + MAX_PADDING):
            good.append(count)
    nearest = sorted(sorted(good, key=lambda count: (abs(count - 4), count))[:3])
    assert message.endswith(f"the nearest good choices are {', '.join(map(str, nearest))}.")


def test_more_bands_than_layers() -> None:
    message = refusal(4, bands=9)
    assert "bands=9 is not allowed: only 4 layers are compressed" in message
    assert "the nearest good choices are 2, 3, 4." in message


def test_layers_that_do_not_exist() -> None:
    assert "skip_layers=[3, 30] is not allowed: the model has layers 0 to 29." in refusal(
        30, skip_layers=[3, 30]
    )


def test_every_layer_skipped() -> None:
    message = refusal(2, skip_layers=[0, 1])
    assert "names every layer" in message
    assert "use method=none" in message


def test_budget_below_two_blocks() -> None:
    assert "budget=63 is not allowed: it must hold at least two blocks, 64 tokens." in refusal(
        4, budget=63
    )


def test_protected_tokens_must_fit_the_smallest_band() -> None:
    # One block of sinks, 64 recent and 31 beside: 127 tokens. The budgets are 128, 112, 96 and
    # 80, rounded up to blocks: 128, 128, 96 and 96.
    message = refusal(4, budget=128, pyramid_beta=2.0, bands=4)
    assert "sink_tokens=4 and recent_tokens=64 do not fit the smallest band" in message
    assert "they need 127 tokens, and band 2 (layers 2 to 2) has 96" in message
    assert "raise budget, lower pyramid_beta or protect fewer tokens." in message


def test_smallest_budget_that_holds_the_protected_tokens() -> None:
    plan_bands(Settings(budget=128), 4, 32)
    assert "has 96" in refusal(4, budget=96)


def test_scheduler_finds_the_groups_it_was_given() -> None:
    options = EngineOptions((Limits(64, None, 0, 0, 4), None, Limits(32, None, 0, 0, 4)))
    assert build_scheduler(options).kvcompress.schedule.limits == options.limits
    with pytest.raises(SettingsError, match="no KV cache group that can be compressed"):
        build_scheduler(EngineOptions((None, None)))
