"""Connecting a worker's layers to compaction at start-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVCacheSpec

from vllm_kvcompress.attention.group import CompressedAttentionGroup
from vllm_kvcompress.attention.heads import check, restore
from vllm_kvcompress.attention.holes import HoleCounts
from vllm_kvcompress.bands import largest_limits, plan_bands
from vllm_kvcompress.heads import places
from vllm_kvcompress.methods import MERGING, METHODS, POOLINGS
from vllm_kvcompress.methods.pooling import Rotation
from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec
from vllm_kvcompress.settings import CONFIG_KEY, Settings, SettingsError, parse_settings
from vllm_kvcompress.worker.band import BandPages
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.heads import place_heads
from vllm_kvcompress.worker.merger import Merger
from vllm_kvcompress.worker.pages import LayerPages
from vllm_kvcompress.worker.rotary import learn_rotation


@dataclass
class WorkerState:
    """What compression adds to a runner."""

    compactor: Compactor
    holes: HoleCounts


def compressed_specs(specs: dict[str, KVCacheSpec], config: VllmConfig) -> dict[str, KVCacheSpec]:
    """Replace the specs of compressible layers by those of their bands.

    Every eligible layer gets one of ours, skipped layers too: a plain spec beside them
    would swallow them all into one group.

    Parameters
    ----------
    specs : dict of str to KVCacheSpec
        vLLM's specs by layer name.
    config : VllmConfig

    Raises
    ------
    SettingsError
        If no layer is eligible, or the settings do not fit the layers.
    """
    settings = parse_settings(config.additional_config[CONFIG_KEY])
    layers = config.compilation_config.static_forward_context
    eligible = {
        extract_layer_index(name): name
        for name, spec in specs.items()
        if _is_eligible(spec, layers[name])
    }
    if not eligible:
        raise SettingsError(
            "kvcompress: this model has no compressible layer: its KV cache specs are "
            f"{sorted({type(spec).__name__ for spec in specs.values()})}, and only plain full "
            "attention can be compressed."
        )
    if others := sorted(specs.keys() - eligible.values()):
        raise SettingsError(
            f"kvcompress: layers {', '.join(others[:3])} have another kind of cache "
            f"({type(specs[others[0]]).__name__}); models that mix kinds of layers cannot be "
            "compressed yet."
        )
    if len({specs[name] for name in eligible.values()}) > 1:
        raise SettingsError("kvcompress: mixed head sizes cannot be compressed yet.")
    num_layers = config.model_config.get_num_layers(config.parallel_config)
    block_size = next(iter(specs.values())).block_size
    longest = config.model_config.max_model_len
    kv_heads = config.model_config.get_total_num_kv_heads()
    bands = plan_bands(
        settings, num_layers, block_size, sorted(eligible), longest=longest, kv_heads=kv_heads
    )
    moving = places(settings, num_layers, kv_heads).keys()
    named = settings.skip_heads + settings.boost_heads
    if missing := sorted(({layer for layer, _ in named} | moving) - eligible.keys()):
        raise SettingsError(
            "kvcompress: skip_heads and boost_heads cannot be used: "
            f"layers {missing} of this model have no cache that can be compressed; use skip_layers."
        )
    for layer in moving:
        check(layers[eligible[layer]], kv_heads)
    largest = largest_limits(settings, num_layers, block_size, longest, kv_heads)
    result = dict(specs)
    for band in bands:
        for layer in band.layers:
            spec = specs[eligible[layer]]
            assert isinstance(spec, FullAttentionSpec)
            result[eligible[layer]] = CompressedAttentionSpec.from_full(
                spec,
                band=band.index,
                limits=band.limits,
                phase=settings.phase,
                interval=settings.interval,
                prune_after=settings.prune_after,
                largest=largest.get(band.index),
            )
    return result


def _is_eligible(spec: KVCacheSpec, layer: Any) -> bool:
    if type(spec) is not FullAttentionSpec:
        return False
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        return False
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        raise SettingsError("kvcompress: ALiBi cannot be combined with compression yet.")
    if spec.head_size_v != spec.head_size:
        raise SettingsError(
            f"kvcompress: keys of size {spec.head_size} with values of size {spec.head_size_v} "
            "cannot be compressed yet."
        )
    return not spec.non_causal


def connect(runner: Any, widths: list[int], holes_by_slot: bool) -> WorkerState:
    """Learn the pages of every compressed layer and take over its attention group.

    Parameters
    ----------
    runner : GPUModelRunner
        Of either kind, with its KV cache allocated.
    widths : list of int
        Columns of the block table of each group.
    holes_by_slot : bool
        Whether attention metadata names request slots (V2) instead of rows (V1).
    """
    config: VllmConfig = runner.vllm_config
    settings = parse_settings(config.additional_config[CONFIG_KEY])
    layers = config.compilation_config.static_forward_context
    restore(layers.values())  # A cache that is made anew is learned anew.
    _check_groups(runner.get_kv_cache_spec(), runner.kv_cache_config.kv_cache_groups)
    # The V2 runner has no list of them, and puts them into their target's group.
    shared = {
        target
        for layer in layers.values()
        if (target := getattr(layer, "kv_sharing_target_layer_name", None))
    }
    holes = HoleCounts(len(runner.attn_groups), runner.max_num_reqs, holes_by_slot)
    groups: dict[int, BandPages] = {}
    names: list[str] = []
    num_blocks = runner.kv_cache_config.num_blocks
    for index, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if not isinstance(spec, CompressedAttentionSpec):
            continue
        runner.attn_groups[index][:] = [
            CompressedAttentionGroup.wrap(g, holes, runner.max_num_reqs, widths[index])
            for g in runner.attn_groups[index]
        ]
        if spec.limits is None:
            continue
        if sharing := shared & set(group.layer_names):
            raise SettingsError(
                f"kvcompress: layers {sorted(sharing)} share their cache with other layers, "
                "which cannot be combined with compression yet."
            )
        of_group = {
            extract_layer_index(name): _pages(
                layers[name], spec, num_blocks, config.cache_config.cache_dtype
            )
            for name in sorted(group.layer_names, key=extract_layer_index)
        }
        first = next(iter(of_group.values()))
        if not all(other.lie_like(first) for other in of_group.values()):
            raise SettingsError(
                f"kvcompress: layers {sorted(of_group)} share a block table, but their page "
                "layouts differ, which is not supported."
            )
        groups[index] = band_pages(of_group)
        names += group.layer_names
    names += place_heads(runner, settings, shared)
    pages = next(iter(groups.values()))
    _, heads, dim = pages.shape
    total = config.model_config.get_total_num_kv_heads()
    size = config.parallel_config.tensor_parallel_size
    # With more ranks than KV heads, neighbouring ranks hold copies of one head.
    first_head = get_tensor_model_parallel_rank() * max(total, 1) // size if size > 1 else 0
    rotation = None
    if settings.method in MERGING and POOLINGS[settings.pooling].needs_rotation:
        rotation = learn_rotation(runner.get_model(), names, dim)
    compactor = make_compactor(
        settings, groups, num_blocks, rotation, first_head, max(total, heads)
    )
    pooling = None if compactor.merger is None else compactor.merger.pooling
    pages.warm_up(pooling, rotation, ranked=MERGING.get(settings.method) is not None)
    return WorkerState(compactor, holes)


def band_pages(layers: Mapping[int, LayerPages]) -> BandPages:
    """Pages of layers that lie alike, with kernels where there are any for them."""
    # Imported late: a device never needs the other one's compiler.
    device = next(iter(layers.values())).device.type
    if device == "cpu":
        from vllm_kvcompress.worker.cpu.band import CompiledBandPages

        if CompiledBandPages.fits(layers):
            return CompiledBandPages(layers)
    elif device == "cuda":
        from vllm_kvcompress.worker.gpu.band import TritonBandPages

        if TritonBandPages.fits(layers):
            return TritonBandPages(layers)
    return BandPages(layers)


def make_compactor(
    settings: Settings,
    groups: dict[int, BandPages],
    num_blocks: int,
    rotation: Rotation | None,
    first_head: int,
    total_heads: int,
) -> Compactor:
    """What runs plans with these settings.

    Parameters
    ----------
    settings : Settings
    groups : dict of int to BandPages
        Pages of the compressed groups, by KV cache group index.
    num_blocks : int
        Blocks of the pool.
    rotation : Rotation or None
        The model's, where pooling turns keys and the model has one.
    first_head, total_heads : int
        First KV head held by this worker and KV heads of the model.
    """
    ranking = MERGING.get(settings.method, settings.method)
    methods = {name: method(seed=settings.seed) for name, method in METHODS.items()}
    merger = None
    if settings.method in MERGING:
        centres = None
        if rotation is not None and ranking is not None:
            pages = next(iter(groups.values()))
            size, heads, _ = pages.shape
            centres = {
                layer: torch.zeros(num_blocks, heads, size, device=pages.device)
                for band in groups.values()
                for layer in band.layers
            }
        merger = Merger(POOLINGS[settings.pooling](), rotation, centres)
    return Compactor(groups, methods, merger, first_head, total_heads)


def _check_groups(intended: dict[str, KVCacheSpec], groups: Sequence[KVCacheGroupSpec]) -> None:
    """Fail if a layer landed in a group of another spec: it would silently be left alone."""
    for group in groups:
        for name in group.layer_names:
            spec = intended.get(name)
            if isinstance(spec, CompressedAttentionSpec) and spec != group.kv_cache_spec:
                raise SettingsError(
                    f"kvcompress: {name} was meant for band {spec.band}, but vLLM put it into "
                    f"a group with {type(group.kv_cache_spec).__name__}."
                )


def _pages(layer: Any, spec: CompressedAttentionSpec, num_blocks: int, dtype: str) -> LayerPages:
    if layer.kv_cache.shape[0] != num_blocks:
        raise SettingsError(
            f"kvcompress: {type(layer.impl).__name__} splits blocks of {spec.block_size} tokens "
            "into smaller ones, which is not supported; set a block size the backend takes."
        )
    return LayerPages(
        layer, layer.kv_cache, spec.block_size, spec.num_kv_heads, spec.head_size, dtype
    )
