"""A gate per KV head between its whole and its compressed cache, learned as DuoAttention does.

Xiao et al. 2024 (arXiv 2410.10819) mix, in every KV head, attention to all tokens and attention
to sinks and recent ones, ``gate * whole + (1 - gate) * other``, and learn the gates alone: the
output shall stay what it was, and open gates cost. Two things differ here. The other side is what
a method of ours leaves of the head's cache, and the loss is the KL divergence of the
next-token distributions where answers are given, because that is what we want to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.methods import Told
from vllm_kvcompress.check.attention import attend, causal_mask, own_attention
from vllm_kvcompress.check.dense import Context, Shape, cache_of, compute, kept_of
from vllm_kvcompress.methods import Method

_GATED: ContextVar[tuple[Sequence[torch.Tensor], torch.Tensor] | None] = ContextVar(
    "kept tokens and gates by layer", default=None
)


@dataclass(frozen=True)
class Lesson:
    """A case to learn from.

    Attributes
    ----------
    task : str
    context : Context
        Whole.
    kept : tuple of torch.Tensor
        One per layer, bool ``[kv_heads, context]``: what the compressed cache has.
    tokens : list of int
        Fed after the context.
    places : torch.Tensor
        ``[places]``, int64, ascending: indices in ``tokens`` after which an answer's token comes.
    teacher : torch.Tensor
        ``[places, vocabulary]``: log-probabilities there with the whole cache.
    """

    task: str
    context: Context
    kept: tuple[torch.Tensor, ...]
    tokens: list[int]
    places: torch.Tensor
    teacher: torch.Tensor


def mix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    gates: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of the last tokens, between all tokens and those kept.

    Parameters
    ----------
    query : torch.Tensor
        ``[1, heads, queries, head_dim]``.
    key, value : torch.Tensor
        ``[1, kv_heads, tokens, head_dim]``.
    kept : torch.Tensor
        Bool ``[kv_heads, context]``; tokens after the context all stay.
    gates : torch.Tensor
        ``[kv_heads]``: 1 for all tokens, 0 for those kept.
    scale : float

    Returns
    -------
    torch.Tensor
        ``[1, heads, queries, head_dim]``.
    """
    kv_heads, queries, tokens = key.shape[1], query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (kv_heads, -1))  # [1, kv_heads, group, queries, head_dim]
    logits = (grouped @ key[:, :, None].transpose(-2, -1)) * scale
    seen = causal_mask(queries, tokens, query.device)
    stays = F.pad(kept, (0, tokens - kept.shape[1]), value=True)[:, None, None]
    whole = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    small = logits.masked_fill(~(seen & stays), -torch.inf).softmax(dim=-1)
    # Both sides have the same values, so their weights can be mixed instead of their outputs.
    weights = small.lerp(whole, gates[:, None, None, None])
    return (weights @ value[:, :, None]).flatten(1, 2)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    gated = _GATED.get()
    if gated is None:  # contexts and the teacher; this also refuses what cannot be mixed
        return attend(module, query, key, value, attention_mask, scaling, **kwargs)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = mix(query, key, value, gated[0][layer], gated[1][layer], scale)
    return output.transpose(1, 2).contiguous(), None


def gated_attention(model: Any) -> AbstractContextManager[None]:
    """Let a model use attention that can be gated, for a while; raises as ``own_attention``."""
    return own_attention(model, _attend, "kvcompress_gates")


def _answers(
    model: Any, context: Context, tokens: Sequence[int], places: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities ``[places, vocabulary]`` of what comes after these places."""
    ids = torch.tensor([list(tokens)], device=model.device)[:, :-1]
    positions = torch.arange(context.tokens, context.tokens + ids.shape[1], device=ids.device)
    output = model(
        ids,
        past_key_values=cache_of([context]),
        position_ids=positions[None],
        use_cache=True,
        logits_to_keep=places,
    )
    return output.logits[0].float().log_softmax(dim=-1)


@torch.no_grad()
def make_lesson(
    model: Any,
    task: str,
    context_ids: Sequence[int],
    fed: Told,
    method: Method,
    keep: float,
    shape: Shape,
    *,
    answered: bool,
) -> Lesson | None:
    """Compute a case with the whole cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`gated_attention`.
    task : str
    context_ids : sequence of int
    fed : Told
    method : Method
        What the other side of the gates keeps by.
    keep : float
        Which share of the context.
    shape : Shape
    answered : bool
        Take only answers of which the whole cache would have chosen every token.

    Returns
    -------
    Lesson or None
        None if there is no such answer.
    """
    context = compute(model, context_ids)
    spans = [torch.arange(first - 1, last - 1) for first, last in fed.answers]
    places = torch.cat(spans).unique()
    teacher = _answers(model, context, fed.tokens, places)
    if answered:
        told = torch.tensor(fed.tokens)[places + 1]
        right = set(places[teacher.argmax(dim=-1).cpu() == told].tolist())
        spans = [span for span in spans if right.issuperset(span.tolist())]
        if not spans:
            return None
        chosen = torch.isin(places, torch.cat(spans))
        places, teacher = places[chosen], teacher[chosen]
    stay = min(max(round(keep * context.tokens), shape.sinks + shape.recent), context.tokens)
    kept = []
    for layer, keys in enumerate(context.keys):
        tokens = kept_of(context, method, layer, stay, shape)
        mask = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
        kept.append(mask.scatter_(1, tokens, True))
    return Lesson(task, context, tuple(kept), fed.tokens, places, teacher)


def divergence(model: Any, lesson: Lesson, gates: torch.Tensor) -> torch.Tensor:
    """KL divergence of the gated model from the whole one, nats per token of the answers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`gated_attention`.
    lesson : Lesson
    gates : torch.Tensor
        ``[layers, kv_heads]``.

    Returns
    -------
    torch.Tensor
        A scalar.
    """
    token = _GATED.set((lesson.kept, gates))
    try:
        own = _answers(model, lesson.context, lesson.tokens, lesson.places)
    finally:
        _GATED.reset(token)
    return F.kl_div(own, lesson.teacher, reduction="batchmean", log_target=True)
