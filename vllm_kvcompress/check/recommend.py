"""From measurements to settings, or to "do not use"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.check.findings import BASELINES, Findings, Loss
from vllm_kvcompress.check.skip import named
from vllm_kvcompress.shares import Shares

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


def largest_share(findings: Findings, method: str, skip: bool = False) -> float | None:
    """The largest share that a method may remove, with all smaller ones acceptable too."""
    best = None
    for share in findings.measured(skip):
        if not acceptable(findings.loss(method, share, skip)):
            break
        best = share
    return best


def advise(findings: Findings) -> Advice:
    """Recommend settings.

    The method that may remove most is recommended, of several the one with the smallest
    losses; where layers were skipped, each method counts twice, without and with that. It must
    lose less than each baseline measured the same way: otherwise its scores say nothing about
    the model, and whatever they happen to keep is luck. Nor may its scores run against the
    attention of the model, whatever it lost on these few texts.
    """
    verdicts = {method: _verdict(findings, method) for method in findings.methods}
    rivals = [way for way in findings.ways if way[0] not in BASELINES]
    fitting = {way: share for way in rivals if (share := largest_share(findings, way[0], way[1]))}
    honest = {
        (method, skip): share
        for (method, skip), share in fitting.items()
        if findings.signal(method) > AGAINST and _beats_baselines(findings, method, skip)
    }
    if not honest:
        return Advice(False, {"method": "none"}, _why_not(findings, fitting), verdicts)
    most = max(honest.values())
    # Those that remove most are compared at the shares that each of them was measured at.
    best = [way for way, share in honest.items() if share == most]
    shares = [s for s in findings.shares if all(s in findings.measured(skip) for _, skip in best)]
    method, skip = min(best, key=lambda way: _total(findings, way[0], way[1], shares))
    words = _why(findings, method, skip, most)
    return Advice(True, _settings(findings, method, skip, most), words, verdicts)


def _settings(findings: Findings, method: str, skip: bool, removed: float) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": method, "keep_ratio": round(1 - removed, 4)}
    if skip:
        settings["keep_ratio"] = _ratio_beside(findings, removed)
        settings["skip_layers"] = list(findings.skip_layers[removed])
    return settings | {
        "sink_tokens": findings.sinks,
        "recent_tokens": findings.recent,
        "recent_ratio": findings.recent_ratio,
    }


def _ratio_beside(findings: Findings, removed: float) -> float:
    """Share that the layers keep that are not skipped."""
    return round(
        Shares(len(findings.skip_layers[removed]) / len(findings.layer_loss)).keep_ratio(removed), 4
    )


def _why(findings: Findings, method: str, skip: bool, most: float) -> tuple[str, ...]:
    loss = findings.loss(method, most, skip)
    mean = ""
    if skip:
        mean = (
            f" in the mean over all layers if {named(findings.skip_layers[most])} stay"
            f"{'s' * (len(findings.skip_layers[most]) == 1)} whole and the others keep "
            f"{_ratio_beside(findings, most):.1%}"
        )
    words = [
        f"{method} may remove {most:.0%} of the cached tokens{mean}: it costs {loss.text:.3f} nats "
        f"a token on running text and {max(loss.right, 0):.0%} of the recalled facts.",
    ]
    worse = next((share for share in findings.shares if share > most), None)
    if worse is not None and worse not in findings.measured(skip):
        words.append(f"{worse:.0%} is out of reach while layers stay whole.")
    elif worse is not None:
        loss = findings.loss(method, worse, skip)
        words.append(
            f"At {worse:.0%} it would cost {loss.text:.3f} nats and "
            f"{max(loss.right, 0):.0%} of the facts: too much."
        )
    if findings.signal(method) < SIGNAL:
        words.append(
            "Its scores hardly follow the attention of this model; it is recommended for its "
            "losses alone, so check your own task."
        )
    if findings.full_right < 0.5:
        words.append(_weak_model(findings))
    return tuple(words)


def _total(findings: Findings, method: str, skip: bool, shares: Sequence[float]) -> float:
    losses = [findings.loss(method, share, skip) for share in shares]
    return sum(loss.text + loss.recall for loss in losses)


def _beats_baselines(findings: Findings, method: str, skip: bool) -> bool:
    shares = findings.measured(skip)
    own = _total(findings, method, skip, shares)
    rivals = [name for name in findings.methods if name in BASELINES]
    return all(own < _total(findings, rival, skip, shares) for rival in rivals)


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
    room = f"acceptable {_up_to(largest_share(findings, method))}"
    if (method, True) in findings.ways:
        share = largest_share(findings, method, skip=True)
        room += f", {_up_to(share)} with layers skipped"
    return (
        f"its score {meaning} (rank correlation {signal:+.2f}; below zero in {against} of "
        f"{len(layers)} layers); {room}"
    )


def _up_to(share: float | None) -> str:
    return "at no share" if share is None else f"up to {share:.0%} removed"


def _why_not(findings: Findings, fitting: Mapping[tuple[str, bool], float]) -> tuple[str, ...]:
    words = ["Do not use compression with this model."]
    if fitting:
        methods = " and ".join(dict.fromkeys(method for method, _ in fitting))
        words.append(
            f"{methods}: little is lost, but the scores run against this model's "
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
