"""Counts by size that only grow, in the form Prometheus wants them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

KV_BYTES = tuple(float(1 << power) for power in range(20, 38))
"""Bounds for the cache of a request: 1 MiB to 128 GiB."""

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Bounds for the compactions of one step."""


class Histogram:
    """How many values fell between fixed bounds, and their sum.

    Parameters
    ----------
    bounds : sequence of float
        Upper bounds, ascending; a value equal to a bound belongs to it. One more bucket
        holds what is larger than all of them.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def as_dict(self) -> dict[str, Any]:
        """``bounds``, ``counts`` (one more, not cumulative) and ``sum``."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}
