"""What a check measured, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

BASELINES = frozenset({"random", "streaming"})
"""Methods that look at no key. Another one must beat them, or its scores say nothing."""


@dataclass(frozen=True)
class Loss:
    """What a method costs at a share removed, against the full cache.

    Attributes
    ----------
    method : str
    removed : float
        Share of the context's tokens removed, from 0 to 1; the mean over all layers.
    text : float
        Loss of mean log-probability of how the text goes on, nats per token.
    recall : float
        The same of answers to questions about facts in the context, nats per token.
    right : float
        Share of these answers that the model no longer gets right although the full cache
        did; negative if it gets more of them.
    skip : bool
        Whether layers of ``Findings.skip_layers`` stayed whole and the others lost more.
    """

    method: str
    removed: float
    text: float
    recall: float
    right: float
    skip: bool = False


@dataclass(frozen=True)
class Findings:
    """All measurements of one model.

    Attributes
    ----------
    model : str
    tokens : int
        Of all contexts together.
    correlation : dict of str to list of list of float
        By method, layer and KV head: Spearman's rank correlation of the method's score with
        the attention that tokens receive from what follows the context; mean over contexts.
    losses : list of Loss
    full_right : float
        Share of the answers that the full cache gets right.
    seconds : float
    sinks, recent : int
        Tokens that no method could remove.
    recent_ratio : float
        Share of the tokens kept that were the last ones, where these are more than ``recent``.
    layer_method : str or None
        The method by which each layer alone was compressed; ``None`` if none was.
    layer_loss : list of float
        By layer, what compressing it alone costs: loss of mean log-probability of answers,
        nats per token.
    skip_layers : dict of float to tuple of int
        By share removed, layers that lose most alone; all methods were measured again with
        these whole. Empty if no layer loses far more than the others.
    """

    model: str
    tokens: int
    correlation: dict[str, list[list[float]]]
    losses: list[Loss]
    full_right: float
    seconds: float
    sinks: int
    recent: int
    recent_ratio: float = 0.0
    layer_method: str | None = None
    layer_loss: list[float] = field(default_factory=list)
    skip_layers: dict[float, tuple[int, ...]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Names, in the order of measuring."""
        return list(dict.fromkeys(loss.method for loss in self.losses))

    @property
    def shares(self) -> list[float]:
        """Shares removed, ascending."""
        return sorted({loss.removed for loss in self.losses})

    def measured(self, skip: bool) -> list[float]:
        """Shares removed without or with layers skipped, ascending: not all are in reach then."""
        return sorted({loss.removed for loss in self.losses if loss.skip == skip})

    @property
    def ways(self) -> list[tuple[str, bool]]:
        """Methods, without and with layers skipped, in the order of measuring."""
        return list(dict.fromkeys((loss.method, loss.skip) for loss in self.losses))

    def loss(self, method: str, removed: float, skip: bool = False) -> Loss:
        """Of one method at one share."""
        wanted = (method, removed, skip)
        return next(
            loss for loss in self.losses if (loss.method, loss.removed, loss.skip) == wanted
        )

    def by_layer(self, method: str) -> list[float]:
        """Mean correlation of each layer."""
        return [fmean(heads) for heads in self.correlation[method]]

    def signal(self, method: str) -> float:
        """Mean correlation over layers and heads."""
        return fmean(self.by_layer(method))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
