"""What a check measured, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

TEXT, RECALL, RIGHT = "text", "recall", "right"


@dataclass(frozen=True)
class Loss:
    """What a method costs at a share removed, against the full cache.

    Attributes
    ----------
    method : str
    removed : float
        Share of the context's tokens removed, from 0 to 1.
    text : float
        Loss of mean log-probability of how the text goes on, nats per token.
    recall : float
        The same of answers to questions about facts in the context, nats per token.
    right : float
        Share of these answers that the model no longer gets right although the full cache
        did; negative if it gets more of them.
    """

    method: str
    removed: float
    text: float
    recall: float
    right: float


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
    """

    model: str
    tokens: int
    correlation: dict[str, list[list[float]]]
    losses: list[Loss]
    full_right: float
    seconds: float
    sinks: int
    recent: int

    @property
    def methods(self) -> list[str]:
        """Names, in the order of measuring."""
        return list(dict.fromkeys(loss.method for loss in self.losses))

    @property
    def shares(self) -> list[float]:
        """Shares removed, ascending."""
        return sorted({loss.removed for loss in self.losses})

    def loss(self, method: str, removed: float) -> Loss:
        """Of one method at one share."""
        return next(
            loss for loss in self.losses if (loss.method, loss.removed) == (method, removed)
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
