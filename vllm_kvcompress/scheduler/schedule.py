"""The settings that decide when a request compacts, and which KV cache groups share them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_kvcompress.limits import Limits
from vllm_kvcompress.settings import Phase, Settings

NEVER = 1 << 62
"""Position of a compaction that never comes."""


@dataclass(frozen=True)
class Schedule:
    """The settings that decide when a request compacts: the server's, or the request's own.

    Attributes
    ----------
    method : str
    phase : str
        ``after_prefill``, ``during_prefill`` or ``decode``.
    interval : int
        Tokens between two grid points.
    prune_after : int
        No compaction before this many tokens.
    limits : tuple of (Limits or None)
        One entry per KV cache group; ``None`` for groups that keep every token.
    block_size : int
    max_position : int
        Longest request, in tokens.
    """

    method: str
    phase: Phase
    interval: int
    prune_after: int
    limits: tuple[Limits | None, ...]
    block_size: int
    max_position: int

    @classmethod
    def of(
        cls,
        settings: Settings,
        limits: Iterable[Limits | None],
        block_size: int,
        max_position: int,
    ) -> Schedule:
        """The schedule that settings make with the limits of the groups."""
        return cls(
            method=settings.method,
            phase=settings.phase,
            interval=settings.interval,
            prune_after=settings.prune_after,
            limits=tuple(limits),
            block_size=block_size,
            max_position=max_position,
        )

    @functools.cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """Compressed groups by equal limits: such groups always compact alike."""
        kinds: dict[Limits, list[int]] = {}
        for group, limits in enumerate(self.limits):
            if limits is not None:
                kinds.setdefault(limits, []).append(group)
        return tuple(tuple(groups) for groups in kinds.values())

    @functools.cached_property
    def every_kind(self) -> tuple[tuple[int, ...], ...]:
        """As ``kinds``, and the groups that keep every token if there are some."""
        whole = tuple(group for group, limits in enumerate(self.limits) if limits is None)
        return (*self.kinds, whole) if whole else self.kinds

    @functools.cached_property
    def limits_without_sinks(self) -> tuple[Limits | None, ...]:
        """The limits of tokens that are generated after a context."""
        return without_sinks(self.limits)


def without_sinks(limits: Iterable[Limits | None]) -> tuple[Limits | None, ...]:
    """Limits that protect no first tokens."""
    return tuple(own and replace(own, sinks=0) for own in limits)
