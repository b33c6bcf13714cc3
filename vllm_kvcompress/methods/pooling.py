"""Pooling two neighbouring cache slots into one: ``mean``, ``max`` or ``best``. Pure torch.

A slot of level ``l`` stands for ``2**l`` consecutive tokens. Both slots of a pair have the
same level, so plain means of pairs stay exact means of tokens. Merging follows the idea of
published pooling caches, but pools neither sinks nor rotated keys: keys of different
positions cancel when averaged, so ``mean`` first rotates both to the centre of their span.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.levels import Round
from vllm_kvcompress.methods.base import settle_near_ties


@dataclass(frozen=True)
class Rotation:
    """The model's rotary embedding, as far as it turns keys by whole or half positions.

    Attributes
    ----------
    angles : torch.Tensor
        ``[rotary_dim / 2]``, float32: radians per position of each pair of channels.
    neox : bool
        Whether channel ``i`` pairs with ``i + rotary_dim / 2`` (NeoX), or ``2 i`` with
        ``2 i + 1`` (GPT-J). Channels from ``rotary_dim`` on are not rotated.
    """

    angles: torch.Tensor
    neox: bool = True

    def turn(self, keys: torch.Tensor, positions: torch.Tensor | float) -> torch.Tensor:
        """Rotate keys onwards, as if their tokens stood ``positions`` later.

        Parameters
        ----------
        keys : torch.Tensor
            ``[..., head_dim]``, float32, rotated as cached.
        positions : torch.Tensor or float
            Scalar, or the shape of ``keys`` without its last axis.
        """
        turned = torch.as_tensor(positions, dtype=torch.float32, device=keys.device)
        angle = turned[..., None] * self.angles
        cos, sin = angle.cos(), angle.sin()
        rotary = 2 * self.angles.shape[0]
        first, second = self._pairs(keys[..., :rotary])
        parts = first * cos - second * sin, second * cos + first * sin
        return torch.cat([self._joined(*parts), keys[..., rotary:]], dim=-1)

    def meet(
        self, older: torch.Tensor, newer: torch.Tensor, way: torch.Tensor | float
    ) -> torch.Tensor:
        """Mean of two keys, the older one turned onwards by ``way`` and the newer one back.

        Parameters
        ----------
        older, newer : torch.Tensor
            ``[..., head_dim]``, float32, rotated as cached.
        way : torch.Tensor or float
            Scalar, or the shape of ``older`` without its last axis.
        """
        angle = torch.as_tensor(way, dtype=torch.float32, device=older.device)[..., None]
        # Turned by opposite angles, sums and differences take one cosine and one sine.
        cos, sin = (angle * self.angles).cos() / 2, (angle * self.angles).sin() / 2
        total, apart = older + newer, older - newer
        rotary = 2 * self.angles.shape[0]
        first, second = self._pairs(total[..., :rotary])
        first_apart, second_apart = self._pairs(apart[..., :rotary])
        met = first * cos - second_apart * sin, second * cos + first_apart * sin
        return torch.cat([self._joined(*met), total[..., rotary:] / 2], dim=-1)

    def _pairs(self, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The channels that turn together."""
        if self.neox:
            first, second = rotary.chunk(2, dim=-1)
            return first, second
        return rotary[..., 0::2], rotary[..., 1::2]

    def _joined(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if self.neox:
            return torch.cat([first, second], dim=-1)
        return torch.stack([first, second], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Pooling(ABC):
    """Base of all poolings."""

    needs_rotation: ClassVar[bool] = False
    """Whether :meth:`pool` turns keys."""

    @abstractmethod
    def pool(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        gap: torch.Tensor | float,
        rotation: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool pairs of slots that are neighbours in age.

        Parameters
        ----------
        keys, values : torch.Tensor
            ``[..., 2, head_dim]``, float32; the older slot first. Keys are rotated as
            cached: a slot of ``mean`` to the centre of its span, one of ``best`` as its
            token.
        gap : torch.Tensor or float
            Positions from the centre of the older slot to that of the newer one: a number,
            or ``[...]``, float32.
        rotation : Rotation or None
            The model's; ``None`` if it has none.

        Returns
        -------
        tuple of torch.Tensor
            Keys and values ``[..., head_dim]`` of slots of the next level.
        """


@dataclass(frozen=True)
class Mean(Pooling):
    """The mean, with keys turned to the centre of the span that the new slot stands for."""

    needs_rotation: ClassVar[bool] = True

    def pool(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        gap: torch.Tensor | float,
        rotation: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of pairs, of keys turned half the way towards each other."""
        older, newer = keys[..., 0, :], keys[..., 1, :]
        pooled = (older + newer) / 2 if rotation is None else rotation.meet(older, newer, gap / 2)
        return pooled, (values[..., 0, :] + values[..., 1, :]) / 2


@dataclass(frozen=True)
class Max(Pooling):
    """The elementwise maximum of keys as cached and of values; for comparison."""

    def pool(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        gap: torch.Tensor | float,
        rotation: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Elementwise maxima of pairs."""
        return keys.amax(dim=-2), values.amax(dim=-2)


@dataclass(frozen=True)
class Best(Pooling):
    """The key with the lower L2 norm and its own value, the older one where equal.

    Norms are compared as :class:`~vllm_kvcompress.methods.knorm.KNorm` compares them.
    """

    def pool(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        gap: torch.Tensor | float,
        rotation: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One slot of each pair."""
        norms = settle_near_ties(torch.linalg.vecdot(keys, keys))
        newer = (norms[..., 1] < norms[..., 0])[..., None]
        return (
            torch.where(newer, keys[..., 1, :], keys[..., 0, :]),
            torch.where(newer, values[..., 1, :], values[..., 0, :]),
        )


POOLINGS: dict[str, type[Pooling]] = {"mean": Mean, "max": Max, "best": Best}


def merge_blocks(
    keys: torch.Tensor,
    values: torch.Tensor,
    rounds: Sequence[Round],
    pooling: Pooling,
    rotation: Rotation | None = None,
    centres: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run planned merges.

    Parameters
    ----------
    keys, values : torch.Tensor
        ``[..., blocks, block_size, head_dim]``, float32: the blocks that merge, oldest first.
    rounds : sequence of Round
        Merges over these blocks and those made on the way.
    pooling : Pooling
    rotation : Rotation or None
    centres : torch.Tensor or None
        ``[..., blocks, block_size]``, float32: position to which each slot's key is turned.
        ``None`` if all slots of a level stand for consecutive tokens, so that the centres of
        a pair are ``2**level`` positions apart.

    Returns
    -------
    tuple
        Keys, values and centres of the blocks given and, after them, of the blocks made, in
        the order of their making, ``[..., blocks + made, block_size, head_dim]``.
    """
    first = keys.shape[-3]
    made = sum(len(merges.older) for merges in rounds)
    keys, values = _with_room(keys, made), _with_room(values, made)
    centres = None if centres is None else _with_room(centres[..., None], made)
    for level, older, newer in rounds:
        index = torch.tensor([older, newer], device=keys.device).T.flatten()
        last = first + len(older)
        gap: torch.Tensor | float = 2.0**level
        if centres is not None:
            pairs = _pairs(centres, index)[..., 0]
            gap = pairs[..., 1] - pairs[..., 0]
            centres[..., first:last, :, :] = _blocks(pairs.mean(-1, keepdim=True), len(older))
        pooled = pooling.pool(_pairs(keys, index), _pairs(values, index), gap, rotation)
        keys[..., first:last, :, :] = _blocks(pooled[0], len(older))
        values[..., first:last, :, :] = _blocks(pooled[1], len(older))
        first = last
    return keys, values, None if centres is None else centres[..., 0]


def _with_room(blocks: torch.Tensor, made: int) -> torch.Tensor:
    """``[..., blocks, size, dim]`` with room for so many more."""
    count = blocks.shape[-3]
    roomy = blocks.new_empty(*blocks.shape[:-3], count + made, *blocks.shape[-2:])
    roomy[..., :count, :, :] = blocks
    return roomy


def _pairs(blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``[..., blocks, size, dim]`` to neighbouring slots ``[..., pairs * size, 2, dim]``."""
    size, dim = blocks.shape[-2:]
    chosen = blocks.index_select(-3, index)
    return chosen.reshape(*chosen.shape[:-3], len(index) * size // 2, 2, dim)


def _blocks(slots: torch.Tensor, count: int) -> torch.Tensor:
    return slots.reshape(*slots.shape[:-2], count, -1, slots.shape[-1])
