"""Measuring a model: rank correlation with real attention, and loss at each share removed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import torch

from vllm_kvcompress.check.attention import noting_attention, own_attention
from vllm_kvcompress.check.dense import (
    Context,
    Shape,
    compress,
    compute,
    follow,
    kept_tokens,
    layer_scores,
)
from vllm_kvcompress.check.findings import Findings, Loss
from vllm_kvcompress.check.texts import Sample
from vllm_kvcompress.methods import Method

Say = Callable[[str], None]


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0 along the last axis, equal values sharing their mean rank; float64."""
    ordered = values.sort(dim=-1).values.contiguous()
    values = values.contiguous()
    first = torch.searchsorted(ordered, values, side="left")
    last = torch.searchsorted(ordered, values, side="right")
    return (first + last - 1).double() / 2


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation along the last axis; 0 where one side is constant.

    Parameters
    ----------
    one, other : torch.Tensor
        ``[..., tokens]``.

    Returns
    -------
    torch.Tensor
        ``[...]``, float64.
    """
    one, other = (ranks(side) - (side.shape[-1] - 1) / 2 for side in (one, other))
    scale = (one.square().sum(-1) * other.square().sum(-1)).sqrt()
    return (one * other).sum(-1) / scale.clamp_min(1e-9)


def received_attention(
    model: Any, context: Context, probes: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Attention that each token of a context receives from what may follow it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`~vllm_kvcompress.check.attention.own_attention`.
    context : Context
    probes : sequence of sequence of int
        Token ids of continuations, each of at least two; they count alike.

    Returns
    -------
    list of torch.Tensor
        By layer ``[kv_heads, tokens]``, float32: mean over queries and probes.
    """
    total = [torch.zeros(keys.shape[:2], device=keys.device) for keys in context.keys]
    for probe in probes:
        with noting_attention() as noted:
            follow(model, [context], context.tokens, probe)
        for layer, own in enumerate(total):
            own += noted[layer][:, : context.tokens] / (len(probe) - 1) / len(probes)
    return total


class _Tally:
    """What samples add to a loss."""

    def __init__(self) -> None:
        self.text: list[float] = []
        self.recall: list[float] = []
        self.right: list[float] = []


def _tell(
    model: Any,
    contexts: Sequence[Context],
    position: int,
    sample: Sample,
    tallies: Sequence[_Tally],
) -> None:
    """Add a sample to the tally of each context, all of equal length."""
    told, _ = follow(model, contexts, position, sample.continuation)
    for tally, own in zip(tallies, told.mean(1).tolist(), strict=True):
        tally.text.append(own)
    for recall in sample.recalls:
        told, best = follow(model, contexts, position, recall.question + recall.answer)
        answer = len(recall.answer)
        means = told[:, -answer:].mean(1).tolist()
        right = best[:, -answer:].all(1).tolist()
        for tally, mean, all_right in zip(tallies, means, right, strict=True):
            tally.recall.append(mean)
            tally.right.append(float(all_right))


def measure(
    model: Any,
    name: str,
    samples: Sequence[Sample],
    methods: Mapping[str, Method],
    shares: Sequence[float],
    shape: Shape,
    say: Say = lambda line: None,
) -> Findings:
    """Measure methods on a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal LM with full attention in all layers.
    name : str
        Of the model, for the report.
    samples : sequence of Sample
        With at least one recall each.
    methods : mapping of str to Method
    shares : sequence of float
        Shares of the context's tokens to remove, between 0 and 1.
    shape : Shape
    say : callable
        Told of progress.

    Returns
    -------
    Findings
    """
    started = time.monotonic()
    correlation: dict[str, list[torch.Tensor]] = defaultdict(list)
    full = _Tally()
    lossy = {pair: _Tally() for pair in product(methods, shares)}
    tokens = 0
    with own_attention(model):
        for number, sample in enumerate(samples, 1):
            context = compute(model, sample.context)
            tokens += context.tokens
            _tell(model, [context], context.tokens, sample, [full])
            questions = [recall.question + recall.answer for recall in sample.recalls]
            received = received_attention(model, context, [sample.continuation, *questions])
            for label, method in methods.items():
                found = [
                    _correlation(context, method, layer, own, shape)
                    for layer, own in enumerate(received)
                ]
                correlation[label].append(torch.stack(found))
            for share in shares:
                keep = [kept_tokens(share, context.tokens, shape)] * len(context.keys)
                small = [compress(context, method, keep, shape) for method in methods.values()]
                tallies = [lossy[label, share] for label in methods]
                _tell(model, small, context.tokens, sample, tallies)
            say(f"context {number} of {len(samples)}: {time.monotonic() - started:.0f} s")
    losses = [Loss(label, share, *_against(full, tally)) for (label, share), tally in lossy.items()]
    means = {label: torch.stack(own).mean(0).tolist() for label, own in correlation.items()}
    seconds = time.monotonic() - started
    return Findings(
        name, tokens, means, losses, fmean(full.right), seconds, shape.sinks, shape.recent
    )


def _correlation(
    context: Context, method: Method, layer: int, received: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """Over the tokens that a method chooses from."""
    scores = layer_scores(context, method, layer, shape)
    return rank_correlation(scores[:, shape.sinks :], received[:, shape.sinks : scores.shape[1]])


def _against(full: _Tally, lossy: _Tally) -> tuple[float, float, float]:
    return (
        fmean(full.text) - fmean(lossy.text),
        fmean(full.recall) - fmean(lossy.recall),
        fmean(full.right) - fmean(lossy.right),
    )
