"""Where KV heads lie when some of them keep more than the others."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.bands import plan_bands
from vllm_kvcompress.heads import Hosts, Part, hosts, places
from vllm_kvcompress.limits import Limits
from vllm_kvcompress.settings import Settings, SettingsError, parse_settings
from vllm_kvcompress.shares import Shares


@st.composite
def choices(draw: st.DrawFn) -> tuple[Settings, int, int]:
    """Heads of two kinds that fill pages, of a model's layers that are not skipped."""
    layers, kv_heads = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    skipped = draw(st.sets(st.integers(0, layers - 1), max_size=layers // 3))
    free = [(i, h) for i in range(layers) if i not in skipped for h in range(kv_heads)]
    whole = draw(st.integers(0, len(free) // kv_heads)) * kv_heads
    boosted = draw(st.integers(0, (len(free) - whole) // kv_heads)) * kv_heads
    heads = draw(st.permutations(free))
    settings = parse_settings(
        {
            "skip_layers": sorted(skipped),
            "skip_heads": heads[:whole],
            "boost_heads": heads[whole : whole + boosted],
        }
    )
    return settings, layers, kv_heads


def everywhere(settings: Settings, layers: int, kv_heads: int) -> dict[int, tuple[Part, ...]]:
    """Places of all layers, those in their own pages too."""
    placed = places(settings, layers, kv_heads)
    own = tuple(range(kv_heads))
    return {layer: placed.get(layer, (Part(layer, 0, own),)) for layer in range(layers)}


@given(choices())
def test_every_head_has_a_place_of_its_own(choice: tuple[Settings, int, int]) -> None:
    _, layers, kv_heads = choice
    slots: dict[tuple[int, int], tuple[int, int]] = {}
    for layer, parts in everywhere(*choice).items():
        assert sorted(head for part in parts for head in part.heads) == list(range(kv_heads))
        for part in parts:
            assert list(part.heads) == sorted(part.heads)
            for number, head in enumerate(part.heads):
                slots[part.layer, part.first + number] = (layer, head)
    assert len(slots) == layers * kv_heads
    assert max(slot for _, slot in slots) == kv_heads - 1


@given(choices())
def test_pages_hold_heads_of_one_kind(choice: tuple[Settings, int, int]) -> None:
    settings, _, kv_heads = choice
    found = hosts(*choice)
    assert len(found.whole) == len(settings.skip_layers) + len(settings.skip_heads) // kv_heads
    assert len(found.boosted) == len(settings.boost_heads) // kv_heads
    assert not set(found.whole) & set(found.boosted)
    for layer, parts in everywhere(*choice).items():
        for part in parts:
            for head in part.heads:
                named = layer in settings.skip_layers or (layer, head) in settings.skip_heads
                assert (part.layer in found.whole) == named
                assert (part.layer in found.boosted) == ((layer, head) in settings.boost_heads)


@given(choices())
def test_few_heads_move(choice: tuple[Settings, int, int]) -> None:
    """Those outside of the layers that have most of their kind, and as many in their stead."""
    settings, layers, kv_heads = choice
    placed, found = places(*choice), hosts(*choice)
    moved = sum(
        len(part.heads) for layer, parts in placed.items() for part in parts if part.layer != layer
    )
    assert moved == sum(
        ((layer, head) in settings.skip_heads) != (layer in found.whole)
        or ((layer, head) in settings.boost_heads) != (layer in found.boosted)
        for layer in set(range(layers)) - set(settings.skip_layers)
        for head in range(kv_heads)
    )
    # One kind of heads apart: no more than must, which is hard to tell for two.
    kinds = [heads for heads in (settings.skip_heads, settings.boost_heads) if heads]
    if len(kinds) > 1:
        return
    counts = [0] * layers
    for layer, _ in kinds[0] if kinds else ():
        counts[layer] += 1
    others = sorted(count for i, count in enumerate(counts) if i not in settings.skip_layers)
    apart = sum(counts) // kv_heads
    assert moved == 2 * sum(others[: len(others) - apart])


def test_three_kinds_of_heads() -> None:
    """Layer 2 holds the whole heads and layer 0 the boosted ones; others go where these left."""
    settings = parse_settings({"skip_heads": "0:1,2:0,2:2", "boost_heads": "0:2,2:1,3:0"})
    assert hosts(settings, 4, 3) == Hosts((2,), (0,))
    assert places(settings, 4, 3) == {
        0: (Part(0, 0, (2,)), Part(2, 2, (1,)), Part(3, 2, (0,))),
        2: (Part(0, 1, (1,)), Part(2, 0, (0, 2))),
        3: (Part(0, 2, (0,)), Part(3, 0, (1, 2))),
    }


def test_heads_change_places() -> None:
    """Layer 2 has most whole heads, so its third goes where that of layer 0 came from."""
    settings = parse_settings({"skip_heads": "0:1,2:0,2:2"})
    assert hosts(settings, 4, 3) == Hosts((2,), ())
    assert places(settings, 4, 3) == {
        0: (Part(0, 0, (0, 2)), Part(2, 2, (1,))),
        2: (Part(0, 2, (1,)), Part(2, 0, (0, 2))),
    }


def test_a_layer_whose_heads_are_all_named_is_a_skipped_layer() -> None:
    settings = parse_settings({"skip_heads": "1:0,1:1,1:2"})
    assert hosts(settings, 4, 3) == Hosts((1,), ())
    assert places(settings, 4, 3) == {}


def test_bands_skip_the_layers_that_hold_whole_heads() -> None:
    settings = parse_settings({"skip_heads": "0:1,2:0,2:2", "skip_layers": [5]})
    bands = plan_bands(settings, 8, 32, kv_heads=3)
    assert [band.layers for band in bands if band.limits is None] == [(2, 5)]
    assert sorted(i for band in bands if band.limits for i in band.layers) == [0, 1, 3, 4, 6, 7]


def limits_of(settings: dict[str, Any]) -> dict[int, Limits | None]:
    heads = {"skip_heads": "0:1,2:0,2:2", "boost_heads": "0:2,2:1,3:0,4:0,4:1,4:2"}
    bands = plan_bands(parse_settings({**heads, **settings}), 12, 32, kv_heads=3)
    assert {band.index: band.layers for band in bands} == {
        0: (1, 3, 5, 6, 7, 8, 9, 10, 11),
        1: (0, 4),
        -1: (2,),
    }
    return {band.index: band.limits for band in bands}


def test_boosted_heads_are_a_band_with_a_larger_budget() -> None:
    found = limits_of({"budget": 100, "boost": 2.5})
    assert [limits and limits.budget for limits in found.values()] == [128, 256, None]
    found = limits_of({"keep_ratio": 0.15, "boost": 6})
    assert [limits and limits.ratio for limits in found.values()] == [
        Fraction(15, 100),
        Fraction(9, 10),
        None,
    ]
    # Not more than every token.
    boosted = limits_of({"keep_ratio": 0.3})[1]
    assert boosted is not None and boosted.ratio == 1
    assert boosted.blocks_kept(1000, 1000)[1] >= boosted.blocks_kept(1000, 1000)[0]


def test_flat_bands_make_room_for_groups_without_padding() -> None:
    """Five layers and two would be groups of two with padding."""
    bands = plan_bands(
        parse_settings({"boost_heads": "0:0,1:0,2:0,3:0,4:0,5:0"}), 7, 32, kv_heads=3
    )
    assert [(band.index, len(band.layers)) for band in bands] == [(0, 2), (1, 2), (2, 1), (3, 2)]
    assert [band.limits and band.limits.budget for band in bands] == [1024, 1024, 1024, 4096]


@given(st.floats(0.01, 0.99), st.integers(0, 12), st.integers(0, 12), st.floats(1, 20))
def test_mean_share_is_kept(removed: float, whole: int, boosted: int, boost: float) -> None:
    shares = Shares(whole / 30, boosted / 30, boost)
    ratio = shares.keep_ratio(removed)
    if ratio <= 0:
        assert whole / 30 >= 1 - removed - 1e-9
        return
    mean = whole + boosted * min(1, ratio * boost) + (30 - whole - boosted) * ratio
    assert mean / 30 == pytest.approx(1 - removed)


def test_budgets_stay_small_enough_for_messages() -> None:
    """VLLM's encoder takes numbers of 64 bits; one that it does not take would end its thread."""
    settings = {"budget": 10**9, "boost_heads": "0:0,1:0,2:0", "boost": 1e300}
    bands = plan_bands(parse_settings(settings), 4, 32, kv_heads=3)
    budgets = [band.limits.budget for band in bands if band.limits and band.limits.budget]
    assert budgets == [10**9, 2**40]


def test_shares_of_settings() -> None:
    settings = {"skip_heads": "0:1,2:0,2:2", "boost_heads": "0:2,2:1,3:0", "skip_layers": [5]}
    assert Shares.of(parse_settings(settings), 10, 3) == Shares(0.2, 0.1, 4)
    assert Shares.of(parse_settings({}), 10, 3) == Shares()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"skip_heads": "4:0,0:0,0:1"}, "there is no 4:0; the model has layers 0 to 3"),
        ({"skip_heads": "0:3,0:0,0:1"}, "there is no 0:3; .* with KV heads 0 to 2"),
        ({"skip_heads": "0:0,0:1"}, "2 heads do not fill pages of 3 KV heads; name 3"),
        ({"skip_heads": "0:0,0:1,1:0,1:1"}, "name 3 or 6"),
        ({"skip_heads": "0:0,1:1,2:2", "skip_layers": [1]}, r"1:1 is in skip_layers=\[1\]"),
        ({"skip_heads": ",".join(f"{i}:{h}" for i in range(4) for h in range(3))}, "every layer"),
        (
            {"boost_heads": ",".join(f"{i}:{h}" for i in range(4) for h in range(3))},
            "leaves no heads with the usual budget; name fewer",
        ),
        ({"boost_heads": "4:0,0:0,0:1"}, "boost_heads=0:0,0:1,4:0 .* there is no 4:0"),
        ({"boost_heads": "0:0,0:1"}, "2 heads do not fill pages of 3 KV heads; name 3"),
        ({"boost_heads": "0:0,1:1,2:2", "skip_layers": [1]}, r"1:1 is in skip_layers=\[1\]"),
    ],
)
def test_heads_that_cannot_be_kept(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        plan_bands(parse_settings(settings), 4, 32, kv_heads=3)
