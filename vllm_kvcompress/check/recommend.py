"""From measurements to settings, or to "do not use"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.check.findings import Findings, Loss

BASELINES = frozenset({"random", "streaming"})
"""Methods that look at no key. Another one must beat them, or its scores say nothing."""

MAX_TEXT = 0.1
"""Acceptable loss on running text, nats per token: perplexity 11 % higher."""

MAX_RIGHT = 0.1
"""Acceptable share of facts that are no longer recalled."""

MAX_RECALL = 0.7
"""Acceptable loss of log-probability of a recalled fact, nats per token (a factor of 2)."""

SIGNAL = 0.05
"""Rank correlation with attention from which scores are said to carry signal."""

AGAINST = -0.2
"""Rank correlation down to which a method is recommended for its losses alone. Most attention
goes to few places that any method keeps, so that a good one may well be at 0."""


@dataclass(frozen=True)
class Advice:
    """What to do with a model.

    Attributes
    ----------
    use : bool
    settings : dict
        For ``additional_config["kvcompress"]``; ``{"method": "none"}`` if not to be used.
    words : tuple of str
        Why, a sentence each.
    verdicts : dict of str to str
        By method, what its scores and losses say.
    """

    use: bool
    settings: dict[str, Any]
    words: tuple[str, ...]
    verdicts: Mapping[str, str] = field(default_factory=dict)


def acceptable(loss: Loss) -> bool:
    """Whether a loss is within what this module calls acceptable."""
    return loss.text <= MAX_TEXT and loss.right <= MAX_RIGHT and loss.recall <= MAX_RECALL


def largest_share(findings: Findings, method: str) -> float | None:
    """The largest share that a method may remove, with all smaller ones acceptable too."""
    best = None
    for share in findings.shares:
        if not acceptable(findings.loss(method, share)):
            break
        best = share
    return best


def advise(findings: Findings) -> Advice:
    """Recommend settings.

    The method that may remove most is recommended, of several the one with the smallest
    losses. It must lose less than each baseline measured: otherwise its scores say nothing
    about the model, and whatever they happen to keep is luck. Nor may its scores run against
    the attention of the model, whatever it lost on these few texts.
    """
    verdicts = {method: _verdict(findings, method) for method in findings.methods}
    rivals = [method for method in findings.methods if method not in BASELINES]
    fitting = {method: share for method in rivals if (share := largest_share(findings, method))}
    honest = {
        method: share
        for method, share in fitting.items()
        if findings.signal(method) > AGAINST and _beats_baselines(findings, method)
    }
    if not honest:
        return Advice(False, {"method": "none"}, _why_not(findings, fitting), verdicts)
    most = max(honest.values())
    method = min(
        (name for name, share in honest.items() if share == most),
        key=lambda name: _total(findings, name),
    )
    settings = {
        "method": method,
        "keep_ratio": round(1 - most, 4),
        "sink_tokens": findings.sinks,
        "recent_tokens": findings.recent,
    }
    loss = findings.loss(method, most)
    words = [
        f"{method} may remove {most:.0%} of the cached tokens: it costs {loss.text:.3f} nats a "
        f"token on running text and {max(loss.right, 0):.0%} of the recalled facts.",
    ]
    worse = [share for share in findings.shares if share > most]
    if worse:
        loss = findings.loss(method, worse[0])
        words.append(
            f"At {worse[0]:.0%} it would cost {loss.text:.3f} nats and "
            f"{max(loss.right, 0):.0%} of the facts: too much."
        )
    if findings.signal(method) < SIGNAL:
        words.append(
            "Its scores hardly follow the attention of this model; it is recommended for its "
            "losses alone, so check your own task."
        )
    if findings.full_right < 0.5:
        words.append(_weak_model(findings))
    return Advice(True, settings, tuple(words), verdicts)


def _total(findings: Findings, method: str) -> float:
    return sum(loss.text + loss.recall for loss in findings.losses if loss.method == method)


def _beats_baselines(findings: Findings, method: str) -> bool:
    rivals = [name for name in findings.methods if name in BASELINES]
    return all(_total(findings, method) < _total(findings, rival) for rival in rivals)


def _verdict(findings: Findings, method: str) -> str:
    layers = findings.by_layer(method)
    against = sum(layer < -SIGNAL for layer in layers)
    signal = findings.signal(method)
    if signal >= SIGNAL:
        meaning = "carries signal"
    elif signal <= AGAINST:
        meaning = "is misleading: it keeps what draws little attention"
    else:
        meaning = "carries no signal"
    share = largest_share(findings, method)
    room = "acceptable at no share" if share is None else f"acceptable up to {share:.0%} removed"
    return (
        f"its score {meaning} (rank correlation {signal:+.2f}; below zero in {against} of "
        f"{len(layers)} layers); {room}"
    )


def _why_not(findings: Findings, fitting: Mapping[str, float]) -> tuple[str, ...]:
    words = ["Do not use compression with this model."]
    if fitting:
        words.append(
            f"{' and '.join(fitting)}: little is lost, but the scores run against this model's "
            "attention, or keeping tokens without looking at their keys loses less."
        )
    else:
        words.append(
            f"Already {findings.shares[0]:.0%} removed costs more than {MAX_TEXT} nats a token on "
            f"running text, or more than {MAX_RIGHT:.0%} of the recalled facts, with every method."
        )
    if findings.full_right < 0.5:
        words.append(_weak_model(findings))
    return tuple(words)


def _weak_model(findings: Findings) -> str:
    return (
        f"The full cache recalls only {findings.full_right:.0%} of the facts, so that recall says "
        "little here; shorter contexts may."
    )
