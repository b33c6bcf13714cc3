"""Attention of a layer whose KV heads lie in pages of several layers.

Targets: ``do_kv_cache_update`` and ``forward`` of the attention implementation of such layers.
Why there: it is the one place that knows queries, keys, pages and metadata of a layer, and both
runners and every backend pass it. How: :func:`place` exchanges the implementation object for one of
a subclass, which runs each part with the pages and metadata of the layer that holds it.
Upstream plan: none yet; vLLM would need KV cache specs of heads instead of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context

from vllm_kvcompress.settings import SettingsError

if TYPE_CHECKING:
    # Every implementation has these; the mixin never stands alone.
    Base: Any = object
else:
    Base = object

BACKENDS = ("CPU_ATTN", "TRITON_ATTN")
"""Backends that are known to take some heads of a page, by test."""

BY_HEADS = "kvcompress_by_heads"
"""Attribute of a group's metadata: what differs for fewer heads, by number of KV heads."""


class Place:
    """Heads of a layer that lie side by side, ready to be picked from its tensors.

    Parameters
    ----------
    name : str
        Of the layer in whose pages they lie.
    first : int
        Where the first head lies in them.
    heads : sequence of int
        KV heads of the layer.
    group_size : int
        Query heads of a KV head.
    device : torch.device
    planned : bool
        Whether metadata for so many heads is a part of the group's metadata.
    """

    def __init__(
        self,
        name: str,
        first: int,
        heads: Sequence[int],
        group_size: int,
        device: torch.device,
        planned: bool = False,
    ) -> None:
        self.name = name
        self.planned = planned
        self.slots = slice(first, first + len(heads))
        self.count = len(heads)
        self.heads = torch.tensor(heads, device=device)
        self.queries = (
            self.heads[:, None] * group_size + torch.arange(group_size, device=device)
        ).flatten()


class PlacedHeads(Base):
    """Mixin of implementations whose layer's heads lie in pages of several layers."""

    places: tuple[Place, ...]

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write each head's new keys and values where the head lies.

        Parameters
        ----------
        layer : Attention
        key, value : torch.Tensor
            ``[tokens, kv_heads, head_dim]``.
        kv_cache, slot_mapping : torch.Tensor
            Of the layer itself; each part has those of the layer that holds it.
        """
        for place in self.places:
            _, _, pages, slots = get_attention_context(place.name)
            super().do_kv_cache_update(
                layer,
                key.index_select(1, place.heads),
                value.index_select(1, place.heads),
                pages[:, place.slots],
                slots,
            )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend part by part.

        Parameters
        ----------
        layer : Attention
        query, output : torch.Tensor
            ``[tokens, heads, head_dim]``.
        key, value : torch.Tensor
            ``[tokens, kv_heads, head_dim]``.
        kv_cache : torch.Tensor
            Of the layer itself.
        attn_metadata : Any
            Of the layer's group; ``None`` in warm-ups.
        output_scale, output_block_scale : torch.Tensor or None
            For quantized outputs, which are refused at start-up.
        """
        if attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, None, output, output_scale, output_block_scale
            )
        for place in self.places:
            metadata, _, pages, _ = get_attention_context(place.name)
            own = query.index_select(1, place.queries)
            done = super().forward(
                layer,
                own,
                key.index_select(1, place.heads),
                value.index_select(1, place.heads),
                pages[:, place.slots],
                getattr(metadata, BY_HEADS)[place.count] if place.planned else metadata,
                torch.empty_like(own, dtype=output.dtype),
                output_scale,
                output_block_scale,
            )
            output.index_copy_(1, place.queries, done)
        return output


def check(layer: Any, kv_heads: int) -> None:
    """Refuse layers whose heads cannot lie in pages of other layers.

    Parameters
    ----------
    layer : Attention
    kv_heads : int
        Of a layer, by the model's configuration.

    Raises
    ------
    SettingsError
        For backends and kinds of attention that were never tried so.
    """
    ours = "kvcompress: skip_heads and boost_heads"
    backend = layer.attn_backend.get_name()
    if backend not in BACKENDS:
        raise SettingsError(
            f"{ours} are not supported with the attention backend {backend} yet; "
            f"choose {' or '.join(BACKENDS)} with --attention-backend, or use skip_layers."
        )
    if getattr(layer.impl, "sinks", None) is not None:
        raise SettingsError(f"{ours} cannot be combined with attention sinks; use skip_layers.")
    if layer.query_quant is not None:
        raise SettingsError(
            f"{ours} cannot be combined with quantized queries, which this backend "
            f"has with kv_cache_dtype={layer.kv_cache_dtype}; use skip_layers or another type."
        )
    for fused in ("fused_rope_kvcache_supported", "fused_qk_norm_rope_kvcache_supported"):
        if getattr(layer.impl, fused, bool)():
            # It would write past us, all heads into the layer's own pages.
            raise SettingsError(
                f"{ours} cannot be combined with cache updates that are fused with "
                "the rotary embedding (ROCm with AITER); use skip_layers."
            )
    if layer.num_kv_heads != kv_heads:
        raise SettingsError(
            f"{ours} cannot be used: {layer.layer_name} has {layer.num_kv_heads} "
            f"KV heads here, not the {kv_heads} of the model; use skip_layers."
        )


def place(layer: Any, places: Sequence[Place]) -> None:
    """Make a layer attend to heads that lie in pages of several layers, in place.

    Parameters
    ----------
    layer : Attention
        That :func:`check` did not refuse.
    places : sequence of Place
    """
    cls = type(layer.impl)
    placed_cls = type(f"KVCompress{cls.__name__}", (PlacedHeads, cls), {})
    # Not by __class__: implementations differ from the mixin in the layout of their objects.
    placed: Any = object.__new__(placed_cls)
    placed.__dict__.update(vars(layer.impl), places=tuple(places))
    layer.impl = placed


def restore(layers: Iterable[Any]) -> None:
    """Give layers back the implementation that :func:`place` exchanged."""
    for layer in layers:
        if isinstance(impl := getattr(layer, "impl", None), PlacedHeads):
            stock: Any = object.__new__(type(impl).__mro__[2])
            stock.__dict__.update(vars(impl))
            layer.impl = stock


def builders_by_heads(builder: Any, counts: Sequence[int]) -> dict[int, Any]:
    """Builders of a backend's metadata for fewer KV heads, by their number.

    Only metadata of the CPU backend depends on it: a plan of the work, made by heads. (On x86-64
    without AMX a plan for more heads gave the same numbers; nothing promises that elsewhere.)

    Parameters
    ----------
    builder : AttentionMetadataBuilder
        The group's.
    counts : sequence of int
    """
    if not hasattr(builder, "isa"):
        return {}
    group_size = builder.num_heads // builder.num_kv_heads
    found = {}
    for count in counts:
        found[count] = copy(builder)
        found[count].num_kv_heads, found[count].num_heads = count, count * group_size
    return found
