"""Between a model's attention and a compressed cache: transformers' attention interface.

A model makes one attention mask per forward call, for all layers. Here layers, KV heads and
rows hold different tokens, so the mask is looked up slot by slot where transformers calls
attention. ``register`` is the documented way to put a function there: importing
:mod:`vllm_kvcompress.hf` replaces ``"sdpa"``, the default, by a function that hands on
everything unchanged unless the keys come from a compressed cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "sdpa"

_MARK = "_kvcompress_origin"


class Attended(Protocol):
    """What the attention function needs of a cache."""

    def before_attention(
        self, layer: int, module: Any, mask: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The mask over the slots of a layer, ``[batch, heads or 1, queries or 1, slots]``."""

    def after_attention(self, layer: int, module: Any, mask: torch.Tensor | None) -> None:
        """A layer's attention is done; it may now be compacted."""


class Origin(NamedTuple):
    """Where keys come from.

    Attributes
    ----------
    cache : Attended
    layer : int
    """

    cache: Attended
    layer: int


def mark(keys: torch.Tensor, origin: Origin) -> torch.Tensor:
    """The same keys, marked with their origin.

    A new tensor object: a mark on the cache's own would make it refer to itself, and its
    memory would wait for the garbage collector.
    """
    marked = keys.view_as(keys)
    setattr(marked, _MARK, origin)
    return marked


def register() -> None:
    """Let ``"sdpa"`` see compressed caches; once, however often it is called."""
    original = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    if not hasattr(original, _MARK):
        wrapped = _seeing_caches(original)
        setattr(wrapped, _MARK, original)
        AttentionInterface.register(IMPLEMENTATION, wrapped)


def _seeing_caches(attend: Callable[..., Any]) -> Callable[..., Any]:
    def sdpa_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        origin: Origin | None = getattr(key, _MARK, None)
        if origin is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        _refuse(attention_mask, kwargs)
        mask = origin.cache.before_attention(origin.layer, module, attention_mask, query.dtype)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
        output = attend(module, query, key, value, mask, *args, **kwargs)
        origin.cache.after_attention(origin.layer, module, attention_mask)
        return output

    return sdpa_attention_forward


def _refuse(mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    for name in ("sliding_window", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"Compressed caches do not support attention with {name.replace('_', ' ')}."
            )
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1):
        raise NotImplementedError(
            "Compressed caches support attention masks that are the same for all heads, "
            f"[batch, 1, queries, tokens], not of shape {list(mask.shape)}."
        )
