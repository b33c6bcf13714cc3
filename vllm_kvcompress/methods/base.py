"""What an eviction method is: a score per cached token and KV head. Pure torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class ScoreContext:
    """Where the scored tokens come from.

    Attributes
    ----------
    layer : int
        Index of the layer in the model.
    position : int
        Tokens of the request computed so far (the trigger position).
    first_head, total_heads : int
        First KV head held here and KV heads of the whole model: under tensor
        parallelism a rank sees only its own heads.
    """

    layer: int
    position: int
    first_head: int = 0
    total_heads: int = 1


@dataclass(frozen=True)
class Method(ABC):
    """Base of all eviction methods.

    Attributes
    ----------
    seed : int
        Seed for methods that draw random numbers.
    """

    needs_keys: ClassVar[bool] = True
    """Whether :meth:`score` reads the keys, not only their shape."""

    needs_values: ClassVar[bool] = False
    """Whether :meth:`score` reads the values."""

    same_for_all_layers: ClassVar[bool] = True
    """Whether :meth:`score` ignores layer and heads, so that layers can be scored together."""

    seed: int = 0

    @abstractmethod
    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Score the cached tokens of one layer of one request.

        Parameters
        ----------
        keys : torch.Tensor
            ``[kv_heads, tokens, head_dim]``, float32, in age order, rotated as cached.
            Heads of several layers at once where :attr:`same_for_all_layers`.
            Only the shape is meaningful where ``needs_keys`` is false.
        context : ScoreContext
            Layer, position and heads.
        values : torch.Tensor or None
            As ``keys``; given where ``needs_values`` is true.

        Returns
        -------
        torch.Tensor
            ``[kv_heads, tokens]``, float32; the highest scores are kept.
        """


@dataclass(frozen=True)
class NormMethod(Method):
    """Base of methods that see nothing of a key but its norm, so that it need not be copied."""

    @abstractmethod
    def score_norms(self, squared_norms: torch.Tensor) -> torch.Tensor:
        """Score tokens by the squared L2 norms of their keys, both ``[..., tokens]``, float32."""

    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores by norm, ``[kv_heads, tokens]``."""
        return self.score_norms(torch.linalg.vecdot(keys, keys))


def settle_near_ties(scores: torch.Tensor) -> torch.Tensor:
    """Round scores to 12 bits, so that rounding noise rarely chooses between equal tokens.

    Rotation preserves norms: in the first layer all occurrences of a token tie but for the
    last bits, which depend on how many requests share a matrix product. Rounded, nearly all
    of them tie exactly, and position decides, whatever the batch.

    Parameters
    ----------
    scores : torch.Tensor
        Any shape, float32.

    Returns
    -------
    torch.Tensor
        As ``scores``, within a relative 2**-13 of them.
    """
    half = 1 << 10
    bits = scores.contiguous().view(torch.int32)
    return ((bits + half) & -(2 * half)).view(torch.float32)
