"""Attention that allows layers of different lengths and can note what each token receives.

``AttentionInterface.register`` is transformers' documented way to put an attention function
beside its own. This one makes its causal mask from the lengths at hand, because transformers
makes one for all layers, and layers here hold different numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "kvcompress_check"

Received = dict[int, torch.Tensor]
"""By layer ``[kv_heads, tokens]``, float32: attention that tokens received, summed over
queries and over the query heads of a KV head."""

_NOTED: ContextVar[Received | None] = ContextVar("attention received", default=None)


@contextmanager
def noting_attention() -> Iterator[Received]:
    """Note the attention that tokens receive in forward calls of checked models."""
    received: Received = {}
    token = _NOTED.set(received)
    try:
        yield received
    finally:
        _NOTED.reset(token)


@contextmanager
def own_attention(
    model: Any, function: Callable[..., Any] | None = None, name: str = IMPLEMENTATION
) -> Iterator[None]:
    """Let a model use this attention for a while, or a function of the same arguments.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    function : callable, optional
        By default :func:`attend`.
    name : str
        Under which transformers knows it, each function by its own.

    Raises
    ------
    ValueError
        A model whose attention cannot be exchanged.
    """
    before = model.config._attn_implementation
    AttentionInterface.register(name, function or attend)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} does not let its attention be exchanged.")
        yield
    finally:
        model.set_attn_implementation(before)


def causal_mask(queries: int, tokens: int, device: torch.device) -> torch.Tensor:
    """What each of the last tokens sees, ``[queries, tokens]``, bool: the last one sees all."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the last tokens to all, as transformers calls it."""
    for name in ("sliding_window", "softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"Models whose attention has a {name} cannot be checked.")
    group = query.shape[1] // key.shape[1]
    queries, tokens = query.shape[2], key.shape[2]
    noted = _NOTED.get()
    if noted is None and queries == tokens:
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=group > 1
        )
        return output.transpose(1, 2).contiguous(), None
    seen = causal_mask(queries, tokens, query.device)
    if noted is None:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling, enable_gqa=group > 1
        )
        return output.transpose(1, 2).contiguous(), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.unflatten(1, (key.shape[1], group))  # [1, kv_heads, group, queries, dim]
    logits = (grouped @ key[:, :, None].transpose(-2, -1)).float() * scale
    weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    noted[int(module.layer_idx)] = weights[0].sum(dim=(1, 2))  # type: ignore[arg-type]
    output = (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)
    return output.transpose(1, 2).contiguous(), None
