"""Connecting layers to the pages that hold their KV heads, at start-up."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.attention.heads import Place, builders_by_heads, place
from vllm_kvcompress.heads import places
from vllm_kvcompress.settings import Settings, SettingsError


def place_heads(runner: Any, settings: Settings, shared: set[str]) -> list[str]:
    """Make layers find their heads where ``skip_heads`` and ``boost_heads`` put them.

    After the pages were learned: that writes all heads of a layer into its own.

    Parameters
    ----------
    runner : GPUModelRunner
        Of either kind, with its KV cache allocated and its attention groups taken over.
    settings : Settings
    shared : set of str
        Layers whose cache other layers share.

    Returns
    -------
    list of str
        Names of the layers whose heads lie in pages of several layers.

    Raises
    ------
    SettingsError
        If one of them shares its cache.
    """
    config: VllmConfig = runner.vllm_config
    layers = config.compilation_config.static_forward_context
    groups = {
        name: group for part in runner.attn_groups for group in part for name in group.layer_names
    }
    names = {extract_layer_index(name): name for name in groups}
    kv_heads = config.model_config.get_total_num_kv_heads()
    counts: dict[int, set[int]] = defaultdict(set)
    num_layers = config.model_config.get_num_layers(config.parallel_config)
    placed = places(settings, num_layers, kv_heads)
    if sharing := shared & {names[index] for index in placed}:
        raise SettingsError(
            f"kvcompress: layers {sorted(sharing)} share their cache with other layers, "
            "which cannot be combined with skip_heads and boost_heads."
        )
    for parts in placed.values():
        for part in parts:
            counts[id(groups[names[part.layer]])].add(len(part.heads))
    for group in groups.values():
        if sizes := counts.get(id(group)):
            group.by_heads = builders_by_heads(group.metadata_builders[0], sorted(sizes))
    for index, parts in placed.items():
        layer = layers[names[index]]
        size = layer.num_heads // layer.num_kv_heads
        device = layer.kv_cache.device
        own = []
        for part in parts:
            name = names[part.layer]
            planned = len(part.heads) in groups[name].by_heads
            own.append(Place(name, part.first, part.heads, size, device, planned))
        place(layer, own)
    return [names[index] for index in placed]
