"""Adding up what samples tell about contexts, compressed or not."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from vllm_kvcompress.check.dense import Context, follow
from vllm_kvcompress.check.texts import Sample


class Tally:
    """What samples add to a loss.

    Attributes
    ----------
    text : list of float
        By sample, mean log-probability of how the text goes on, nats per token.
    recall : list of float
        By question, the same of its answer.
    right : list of float
        By question, 1 if every token of the answer was the most probable one, else 0.
    """

    def __init__(self) -> None:
        self.text: list[float] = []
        self.recall: list[float] = []
        self.right: list[float] = []


def tell(
    model: Any,
    contexts: Sequence[Context],
    position: int,
    sample: Sample,
    tallies: Sequence[Tally],
) -> None:
    """Add a sample to the tally of each context, all of equal length.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`~vllm_kvcompress.check.attention.own_attention`.
    contexts : sequence of Context
        The sample's, compressed in several ways, to equally many tokens in each layer.
    position : int
        Tokens of the whole context, before compression.
    sample : Sample
    tallies : sequence of Tally
        One per context.
    """
    told, _ = follow(model, contexts, position, sample.continuation)
    for tally, own in zip(tallies, told.mean(1).tolist(), strict=True):
        tally.text.append(own)
    tell_recalls(model, contexts, position, sample, tallies)


def tell_recalls(
    model: Any,
    contexts: Sequence[Context],
    position: int,
    sample: Sample,
    tallies: Sequence[Tally],
) -> None:
    """Add only the answers to a sample's questions; as :func:`tell`."""
    for recall in sample.recalls:
        told, best = follow(model, contexts, position, recall.question + recall.answer)
        answer = len(recall.answer)
        means = told[:, -answer:].mean(1).tolist()
        right = best[:, -answer:].all(1).tolist()
        for tally, mean, all_right in zip(tallies, means, right, strict=True):
            tally.recall.append(mean)
            tally.right.append(float(all_right))


def against(full: Tally, lossy: Tally) -> tuple[float, float, float]:
    """Losses of text, recall and right answers, as :class:`~.findings.Loss` has them."""
    return (
        fmean(full.text) - fmean(lossy.text),
        fmean(full.recall) - fmean(lossy.recall),
        fmean(full.right) - fmean(lossy.right),
    )
