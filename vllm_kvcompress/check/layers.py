"""What each layer alone loses, and all methods again with some layers whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from vllm_kvcompress.check.dense import Context, Shape, compress, compute, kept_tokens
from vllm_kvcompress.check.findings import Loss
from vllm_kvcompress.check.tally import Tally, against, tell, tell_recalls
from vllm_kvcompress.check.texts import Sample
from vllm_kvcompress.methods import Method
from vllm_kvcompress.shares import Shares

LAYER_REMOVED = 0.9
"""Share of the context's tokens removed from the one layer that is compressed."""

Say = Callable[[str], None]


def layer_losses(
    model: Any, samples: Sequence[Sample], method: Method, shape: Shape, full: Tally, say: Say
) -> list[float]:
    """What it costs to compress each layer alone, all others whole.

    Contexts that are followed together must have equal lengths in each layer, so each layer is
    a pass of its own, over the questions only.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`~vllm_kvcompress.check.attention.own_attention`.
    samples : sequence of Sample
    method : Method
    shape : Shape
    full : Tally
        Of the same samples, with the full cache.
    say : callable
        Told of progress.

    Returns
    -------
    list of float
        By layer, loss of mean log-probability of answers, nats per token; mean over contexts.
    """
    started = time.monotonic()
    alone: list[Tally] = []
    for number, sample in enumerate(samples, 1):
        context = compute(model, sample.context)
        layers = len(context.keys)
        alone = alone or [Tally() for _ in range(layers)]
        for layer, tally in enumerate(alone):
            keep = [context.tokens] * layers
            keep[layer] = kept_tokens(LAYER_REMOVED, context.tokens, shape)
            small = compress(context, method, keep, shape)
            tell_recalls(model, [small], context.tokens, sample, [tally])
        seconds = time.monotonic() - started
        say(f"each layer alone, context {number} of {len(samples)}: {seconds:.0f} s")
    return [fmean(full.recall) - fmean(tally.recall) for tally in alone]


def tell_compressed(
    model: Any,
    context: Context,
    sample: Sample,
    methods: Mapping[str, Method],
    keep: Sequence[int],
    shape: Shape,
    tallies: Mapping[str, Tally],
) -> None:
    """Compress a sample's context by each method and add to the method's tally.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    context : Context
    sample : Sample
    methods : mapping of str to Method
    keep : sequence of int
        Tokens that stay in each layer.
    shape : Shape
    tallies : mapping of str to Tally
        By method.
    """
    small = [compress(context, method, keep, shape) for method in methods.values()]
    tell(model, small, context.tokens, sample, [tallies[label] for label in methods])


def skipping_losses(
    model: Any,
    samples: Sequence[Sample],
    methods: Mapping[str, Method],
    skip_layers: Mapping[float, Sequence[int]],
    shape: Shape,
    num_layers: int,
    full: Tally,
    say: Say,
) -> list[Loss]:
    """Measure methods with some layers whole, at the same shares removed in the mean.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`~vllm_kvcompress.check.attention.own_attention`.
    samples : sequence of Sample
    methods : mapping of str to Method
    skip_layers : mapping of float to sequence of int
        Layers that stay whole, by the share removed in the mean over all layers.
    shape : Shape
    num_layers : int
    full : Tally
        Of the same samples, with the full cache.
    say : callable
        Told of progress.

    Returns
    -------
    list of Loss
    """
    started = time.monotonic()
    lossy = {share: {label: Tally() for label in methods} for share in skip_layers}
    for number, sample in enumerate(samples, 1):
        context = compute(model, sample.context)
        for share, tallies in lossy.items():
            skipped = skip_layers[share]
            stay = round(Shares(len(skipped) / num_layers).keep_ratio(share) * context.tokens)
            keep = [stay] * num_layers
            for layer in skipped:
                keep[layer] = context.tokens
            tell_compressed(model, context, sample, methods, keep, shape, tallies)
        seconds = time.monotonic() - started
        say(f"layers skipped, context {number} of {len(samples)}: {seconds:.0f} s")
    return [
        Loss(label, share, *against(full, tallies[label]), skip=True)
        for label in methods
        for share, tallies in lossy.items()
    ]
