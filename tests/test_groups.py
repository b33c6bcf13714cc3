"""Start-up fails, or says so, where vLLM's groups are not those that were meant."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from vllm_kvcompress.bands import plan_bands
from vllm_kvcompress.scheduler.groups import check_groups
from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec
from vllm_kvcompress.settings import Settings, SettingsError, parse_settings
from vllm_kvcompress.worker.setup import _check_groups

BLOCK, LAYERS, KV_HEADS = 32, 6, 2


def spec_of(band: int, limits: Any, settings: Settings) -> CompressedAttentionSpec:
    return CompressedAttentionSpec(
        block_size=BLOCK,
        num_kv_heads=KV_HEADS,
        head_size=16,
        dtype=torch.float32,
        band=band,
        limits=limits,
        phase=settings.phase,
        interval=settings.interval,
        prune_after=settings.prune_after,
    )


def groups_of(settings: Settings) -> list[KVCacheGroupSpec]:
    """One group for each band."""
    return [
        KVCacheGroupSpec(
            [f"model.layers.{layer}.self_attn" for layer in band.layers],
            spec_of(band.index, band.limits, settings),
        )
        for band in plan_bands(settings, LAYERS, BLOCK, kv_heads=KV_HEADS)
    ]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged; vLLM's loggers do not hand on to the root."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.kvcompress")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def check(raw: dict[str, Any], groups: list[KVCacheGroupSpec] | None = None, longest: int = 4096):
    settings = parse_settings(raw)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        cache_config=SimpleNamespace(block_size=BLOCK),
    )
    made = groups_of(settings) if groups is None else groups
    return check_groups(KVCacheConfig(100, [], made), config, settings)


def test_groups_are_named(said: list[str]) -> None:
    heads = {"skip_heads": "0:1,1:0", "boost_heads": "2:0,3:0,4:0,4:1", "boost": 3}
    limits = check({"budget": 256, **heads})
    assert [limit and limit.budget for limit in limits] == [256, 768, None]
    text = "\n".join(said)
    for part in (
        "layers 1 to 5 keep 256 tokens per request",
        "band 1: boosted KV heads keep 768 tokens per request",
        "5 of 6 layers are compressed, 1 keep every token; 3 KV cache groups",
        "4 KV heads keep 3 times as many tokens as the others; they lie in the pages of layers 2,",
        "2 KV heads keep every token; they lie in the pages of layers 0,",
    ):
        assert part in text, text


def test_layers_that_keep_every_token_are_counted(said: list[str]) -> None:
    """Boosted heads that keep everything, too: the peak is not bounded there."""
    ratio = {"keep_ratio": 0.3, "phase": "during_prefill"}
    check({**ratio, "skip_layers": [5], "boost_heads": "0:0,1:0", "boost": 4})
    assert "the pages of 2 layers hold every token of a request" in said[-1]
    check(ratio)
    assert "hold every token" not in said[-1]


def test_no_group_is_compressed() -> None:
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=16, dtype=torch.float32
    )
    with pytest.raises(SettingsError, match=r"no KV cache group .* \['FullAttentionSpec'\]"):
        check({}, [KVCacheGroupSpec(["model.layers.0.self_attn"], spec)])


def test_a_band_is_missing() -> None:
    groups = groups_of(parse_settings({"bands": 3, "pyramid_beta": 2.0}))
    with pytest.raises(SettingsError, match=r"bands=3 was asked for, .* bands \[0, 1\] only"):
        check({"bands": 3, "pyramid_beta": 2.0}, groups[:2])


def test_nothing_will_ever_be_compressed(said: list[str]) -> None:
    check({"budget": 1024}, longest=512)
    assert "nothing will ever be compressed" in said[-1]
    assert "at most 512 tokens" in said[-1]
    check({"budget": 256}, longest=512)
    assert "nothing will ever" not in said[-1]


def test_a_layer_in_a_group_of_another_band() -> None:
    """VLLM may put layers with nearly equal specs together: one would be left alone."""
    settings = parse_settings({"bands": 2, "pyramid_beta": 2.0})
    groups = groups_of(settings)
    intended: Any = {name: group.kv_cache_spec for group in groups for name in group.layer_names}
    _check_groups(intended, groups)
    swallowed = replace(groups[0], layer_names=[*groups[0].layer_names, groups[1].layer_names[0]])
    with pytest.raises(SettingsError, match=r"layers\.3\.self_attn was meant for band 1, but vLLM"):
        _check_groups(intended, [swallowed])
