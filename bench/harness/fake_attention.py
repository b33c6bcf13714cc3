"""Attention groups of the CPU backend, stock and ours, over a batch that decodes.

Nothing is computed; what is built is what attention would be given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.worker.utils import AttentionGroup

from bench.harness.fake_engine import Engine, Model, layer_specs, vllm_config
from vllm_kvcompress.attention.group import CompressedAttentionGroup
from vllm_kvcompress.attention.holes import HoleCounts

HOLES = 3
"""Null blocks at the start of every row, where there are some."""


def attention_lanes(groups: int, requests: int, context: int) -> dict[str, Callable[[], None]]:
    """What builds the metadata of a step, by contender.

    Parameters
    ----------
    groups, requests : int
    context : int
        Tokens of each request.
    """
    engine = Engine(Model(30, kv_heads=3, head_size=64), block_size=32)
    width = engine.max_model_len // engine.block_size
    names = [str(index) for index in range(requests)]
    batches = [batch(requests, context, width) for _ in range(groups)]
    stock = stock_groups(engine, groups)

    def build_stock() -> None:
        for group, common in zip(stock, batches, strict=True):
            group.build_metadata(common)

    lanes = {"stock": build_stock}
    for label, count in (("ours without holes", 0), ("ours with holes", HOLES)):
        holes = HoleCounts(groups, requests)
        wrapped = [CompressedAttentionGroup.wrap(g, holes, requests, width) for g in stock]
        if count:
            for name in names:
                for group in range(groups):
                    holes.set(name, group, count)
        lanes[label] = builder(wrapped, batches, holes, names)
    return lanes


def builder(
    groups: list[CompressedAttentionGroup],
    batches: list[CommonAttentionMetadata],
    holes: HoleCounts,
    names: list[str],
) -> Callable[[], None]:
    """What our runner does in a step: lay out the hole counts, then build for every group."""

    def build() -> None:
        holes.arrange(names)
        for group, common in zip(groups, batches, strict=True):
            group.build_metadata(common)

    return build


def stock_groups(engine: Engine, groups: int) -> list[AttentionGroup]:
    """Groups of vLLM's own with the CPU backend's builders."""
    config = vllm_config(engine)
    specs = layer_specs(engine)
    layers = list(specs)
    size = len(layers) // groups
    made = []
    for index in range(groups):
        own = layers[index * size : (index + 1) * size]
        group = AttentionGroup(CPUAttentionBackend, own, specs[own[0]], index)
        group.create_metadata_builders(config, torch.device("cpu"), engine.block_size)
        made.append(group)
    return made


def batch(requests: int, context: int, width: int) -> CommonAttentionMetadata:
    """Metadata of a batch in which every request decodes one token."""
    starts = torch.arange(requests + 1, dtype=torch.int32)
    lengths = torch.full((requests,), context, dtype=torch.int32)
    table = np.arange(requests * width, dtype=np.int32).reshape(requests, width)
    arguments: dict[str, Any] = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts.clone(),
        "seq_lens": lengths,
        "seq_lens_cpu_upper_bound": lengths.clone(),
        "num_reqs": requests,
        "num_actual_tokens": requests,
        "max_query_len": 1,
        "max_seq_len": context,
        "block_table_tensor": torch.from_numpy(table),
        "slot_mapping": torch.zeros(requests, dtype=torch.int64),
    }
    return CommonAttentionMetadata(**arguments)
