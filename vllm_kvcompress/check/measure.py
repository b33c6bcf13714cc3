"""Measuring a model: rank correlation with real attention, and loss at each share removed.

Then which layers lose most if compressed alone, and all losses again with these whole.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from vllm_kvcompress.check.attention import noting_attention, own_attention
from vllm_kvcompress.check.dense import Context, Shape, compute, follow, kept_tokens, layer_scores
from vllm_kvcompress.check.findings import BASELINES, Findings, Loss
from vllm_kvcompress.check.layers import (
    Say,
    layer_losses,
    skipping_losses,
    tell_compressed,
)
from vllm_kvcompress.check.skip import OTHERS_KEEP, choose_layers
from vllm_kvcompress.check.tally import Tally, against, tell
from vllm_kvcompress.check.texts import Sample
from vllm_kvcompress.methods import Method


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
    full = Tally()
    lossy = {share: {label: Tally() for label in methods} for share in shares}
    tokens = 0
    with own_attention(model):
        for number, sample in enumerate(samples, 1):
            context = compute(model, sample.context)
            tokens += context.tokens
            tell(model, [context], context.tokens, sample, [full])
            questions = [recall.question + recall.answer for recall in sample.recalls]
            received = received_attention(model, context, [sample.continuation, *questions])
            for label, method in methods.items():
                found = [
                    _correlation(context, method, layer, own, shape)
                    for layer, own in enumerate(received)
                ]
                correlation[label].append(torch.stack(found))
            for share, tallies in lossy.items():
                keep = [kept_tokens(share, context.tokens, shape)] * len(context.keys)
                tell_compressed(model, context, sample, methods, keep, shape, tallies)
            say(f"context {number} of {len(samples)}: {time.monotonic() - started:.0f} s")
        losses = [
            Loss(label, share, *against(full, tallies[label]))
            for label in methods
            for share, tallies in lossy.items()
        ]
        best = _least_lossy(losses)
        alone: list[float] = []
        skip: dict[float, tuple[int, ...]] = {}
        if best is not None:
            alone = layer_losses(model, samples, methods[best], shape, full, say)
            shortest = min(len(sample.context) for sample in samples)
            least = max(OTHERS_KEEP, (shape.sinks + shape.recent) / shortest)
            chosen = {share: choose_layers(alone, share, least) for share in shares}
            skip = {share: layers for share, layers in chosen.items() if layers}
        if skip:
            losses += skipping_losses(model, samples, methods, skip, shape, len(alone), full, say)
    return Findings(
        model=name,
        tokens=tokens,
        correlation={
            label: torch.stack(own).mean(0).tolist() for label, own in correlation.items()
        },
        losses=losses,
        full_right=fmean(full.right),
        seconds=time.monotonic() - started,
        sinks=shape.sinks,
        recent=shape.recent,
        recent_ratio=shape.recent_ratio,
        layer_method=best,
        layer_loss=alone,
        skip_layers=skip,
    )


def _least_lossy(losses: Sequence[Loss]) -> str | None:
    """The method that looks at keys and loses least, if any does."""
    total: dict[str, float] = defaultdict(float)
    for loss in losses:
        if loss.method not in BASELINES:
            total[loss.method] += loss.text + loss.recall
    return min(total, key=lambda method: total[method], default=None)


def _correlation(
    context: Context, method: Method, layer: int, received: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """Over the tokens that a method may choose from at some share: ``recent`` are never."""
    scores = layer_scores(context, method, layer, shape.recent)
    return rank_correlation(scores[:, shape.sinks :], received[:, shape.sinks : scores.shape[1]])
