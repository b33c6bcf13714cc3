"""Where KV heads lie when some of them keep every token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.bands import plan_bands
from vllm_kvcompress.heads import Part, places, whole_layers
from vllm_kvcompress.settings import Settings, SettingsError, parse_settings


@st.composite
def choices(draw: st.DrawFn) -> tuple[Settings, int, int]:
    """Heads that fill pages, of a model's layers that are not skipped."""
    layers, kv_heads = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    skipped = draw(st.sets(st.integers(0, layers - 1), max_size=layers // 3))
    free = [(i, h) for i in range(layers) if i not in skipped for h in range(kv_heads)]
    count = draw(st.integers(0, len(free) // kv_heads)) * kv_heads
    heads = draw(st.permutations(free))[:count]
    settings = parse_settings({"skip_layers": sorted(skipped), "skip_heads": heads})
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
def test_pages_hold_whole_heads_only_or_none(choice: tuple[Settings, int, int]) -> None:
    settings, _, kv_heads = choice
    whole = whole_layers(*choice)
    assert len(whole) == len(settings.skip_layers) + len(settings.skip_heads) // kv_heads
    for layer, parts in everywhere(*choice).items():
        for part in parts:
            for head in part.heads:
                named = layer in settings.skip_layers or (layer, head) in settings.skip_heads
                assert (part.layer in whole) == named


@given(choices())
def test_no_more_heads_move_than_must(choice: tuple[Settings, int, int]) -> None:
    """Whole heads outside of the layers that have most of them, and as many in their stead."""
    settings, _, kv_heads = choice
    counts = [0] * choice[1]
    for layer, _ in settings.skip_heads:
        counts[layer] += 1
    hosts = len(settings.skip_heads) // kv_heads
    fewest = 2 * sum(sorted(counts)[: len(counts) - hosts])
    placed = places(*choice)
    moved = sum(
        len(part.heads) for layer, parts in placed.items() for part in parts if part.layer != layer
    )
    assert moved == fewest
    assert all(len(parts) > 1 for parts in placed.values() if kv_heads > 1)


def test_heads_change_places() -> None:
    """Layer 2 has most whole heads, so its third goes where that of layer 0 came from."""
    settings = parse_settings({"skip_heads": "0:1,2:0,2:2"})
    assert whole_layers(settings, 4, 3) == (2,)
    assert places(settings, 4, 3) == {
        0: (Part(0, 0, (0, 2)), Part(2, 2, (1,))),
        2: (Part(0, 2, (1,)), Part(2, 0, (0, 2))),
    }


def test_a_layer_whose_heads_are_all_named_is_a_skipped_layer() -> None:
    settings = parse_settings({"skip_heads": "1:0,1:1,1:2"})
    assert whole_layers(settings, 4, 3) == (1,)
    assert places(settings, 4, 3) == {}


def test_bands_skip_the_layers_that_hold_whole_heads() -> None:
    settings = parse_settings({"skip_heads": "0:1,2:0,2:2", "skip_layers": [5]})
    bands = plan_bands(settings, 8, 32, kv_heads=3)
    assert [band.layers for band in bands if band.limits is None] == [(2, 5)]
    assert sorted(i for band in bands if band.limits for i in band.layers) == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"skip_heads": "4:0,0:0,0:1"}, "there is no 4:0; the model has layers 0 to 3"),
        ({"skip_heads": "0:3,0:0,0:1"}, "there is no 0:3; .* with KV heads 0 to 2"),
        ({"skip_heads": "0:0,0:1"}, "2 heads do not fill pages of 3 KV heads; name 3"),
        ({"skip_heads": "0:0,0:1,1:0,1:1"}, "name 3 or 6"),
        ({"skip_heads": "0:0,1:1,2:2", "skip_layers": [1]}, r"1:1 is in skip_layers=\[1\]"),
        ({"skip_heads": ",".join(f"{i}:{h}" for i in range(4) for h in range(3))}, "every layer"),
    ],
)
def test_heads_that_cannot_be_kept(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        plan_bands(parse_settings(settings), 4, 32, kv_heads=3)
