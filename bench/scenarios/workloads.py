"""What the throughput scenario compares, by effort, and the ratios it is to reach."""

from __future__ import annotations

from typing import NamedTuple

DECODE_HEAVY = (1000, 1000)
SWEPT = (
    *("stock", "stock-capped", "fp8", "knorm/8", "knorm/4", "knorm/2", "pyramid/8", "pyramid/4"),
    *("kvdiff-skip/4", "during/8", "merge/4", "knorm+fp8/8", "knorm+fp8/4"),
)


class Batch(NamedTuple):
    """What is compared with what.

    Attributes
    ----------
    shape : tuple of int
        Prompt and output tokens of a request.
    pools, methods
        As in :class:`bench.harness.suite.Options`.
    requests : int
        All at once.
    """

    shape: tuple[int, int]
    pools: tuple[int, ...]
    methods: tuple[str, ...]
    requests: int


BATCHES = {
    "quick": (Batch((320, 40), (2,), ("stock", "knorm/2", "knorm+fp8/2"), 4),),
    "short": (
        Batch(DECODE_HEAVY, (2,), ("stock", "knorm/8", "knorm/2"), 8),
        # Shorter: with twice the blocks stock vLLM has four at once, and compressed there is
        # room for four times as many.
        Batch((400, 400), (2,), ("fp8", "knorm+fp8/4"), 16),
    ),
    "full": tuple(
        Batch(shape, (2, 4, 8), SWEPT, 24) for shape in ((2000, 200), DECODE_HEAVY, (6000, 128))
    ),
}
REPEATS = {"quick": 1, "short": 1, "full": 3}

TARGETS = (
    ("8x against stock", "at least 3", 3.0, DECODE_HEAVY, "knorm/8", "stock"),
    ("2x against stock", "at least 1.6", 1.6, DECODE_HEAVY, "knorm/2", "stock"),
    ("fp8 and 4x against fp8", "at least 1.6", 1.6, None, "knorm+fp8/4", "fp8"),
)
"""What, wanted, least ratio, shape (any if None), contender and what it is compared with; all in
a pool of two."""
