"""Means and intervals over result rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.quality.plan import ALL_METHODS, GENERATING, LANGUAGE, LEAST_BASELINE
from bench.quality.rows import FULL, OURS, Row, RowsError

DRAWS = 2000
"""Bootstrap samples."""


class Contender(NamedTuple):
    """What a line of the table is about."""

    implementation: str
    variant: str
    method: str

    @property
    def label(self) -> str:
        """How it is called in tables and plots."""
        name = f"{self.method}, {self.variant}" if self.variant else self.method
        return name if self.implementation == OURS else f"{self.implementation} {name}"


@dataclass(frozen=True)
class Estimate:
    """A mean over cases, beside that of the full cache on the same cases.

    Attributes
    ----------
    mean : float
        From 0 to 1.
    loss : float
        Mean of the full cache minus `mean`.
    low, high : float
        95 % interval of `loss`, by bootstrap over the cases of each task.
    cases : int
    """

    mean: float
    loss: float
    low: float
    high: float
    cases: int


class Results:
    """Rows of one model and one protocol, by task, contender, share and case.

    Parameters
    ----------
    rows : iterable of Row
        Of one model. Later rows replace earlier ones of the same key.
    protocol : str

    Raises
    ------
    RowsError
        Rows of the same case answer different prompts.
    """

    def __init__(self, rows: Iterable[Row], protocol: str) -> None:
        self.protocol = protocol
        self._rows: dict[str, dict[Contender, dict[float, dict[str, Row]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(dict))
        )
        prompts: dict[str, Row] = {}
        for row in rows:
            if row.protocol != protocol:
                continue
            first = prompts.setdefault(row.key, row)
            if first.prompt != row.prompt:
                raise RowsError(
                    f"{row.implementation} and {first.implementation} answered different prompts "
                    f"for {row.key}; their rows cannot be compared."
                )
            contender = Contender(row.implementation, row.variant, row.method)
            self._rows[row.task][contender][row.removed][row.key] = row

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks: the known ones in their order, then the others."""
        known = [name for name in (*GENERATING, LANGUAGE) if name in self._rows]
        return known + sorted(set(self._rows) - set(known))

    @property
    def contenders(self) -> list[Contender]:
        """All but the full cache: ours before others, in the order of the methods' names."""
        found = {name for task in self._rows.values() for name in task if name.method != FULL}
        return sorted(found, key=_place)

    @property
    def shares(self) -> list[float]:
        """Shares removed, ascending."""
        return sorted(
            {
                share
                for task in self._rows.values()
                for name, by_share in task.items()
                if name.method != FULL
                for share in by_share
            }
        )

    def rows(self, task: str, contender: Contender, share: float) -> Mapping[str, Row]:
        """Rows by case."""
        return self._rows.get(task, {}).get(contender, {}).get(share, {})

    def full(self, task: str, contender: Contender | None = None) -> Mapping[str, Row]:
        """Full-cache rows by case: the contender's implementation's own, if it has any.

        Another implementation computes in another order, and may load the model in another
        type; its losses are taken from its own full cache.
        """
        found = [
            by_share[0.0]
            for name, by_share in self._rows.get(task, {}).items()
            if name.method == FULL
            and 0.0 in by_share
            and (contender is None or name.implementation == contender.implementation)
        ]
        if found or contender is None:
            return found[0] if found else {}
        return self.full(task)

    def baseline(self, task: str) -> float | None:
        """Mean score with the full cache."""
        rows = self.full(task)
        return float(np.mean([row.score for row in rows.values()])) if rows else None

    def counted_tasks(self) -> list[str]:
        """Tasks that are in the means: the full cache reaches `LEAST_BASELINE`; without lm."""
        return [
            task
            for task in self.tasks
            if task != LANGUAGE and (self.baseline(task) or 0.0) >= LEAST_BASELINE
        ]

    def estimate(self, tasks: Sequence[str], contender: Contender, share: float) -> Estimate | None:
        """Mean over tasks of the means over their cases.

        Parameters
        ----------
        tasks : sequence of str
        contender : Contender
        share : float

        Returns
        -------
        Estimate or None
            None if some task has no rows, or no full-cache rows of the same cases.
        """
        pairs = []
        for task in tasks:
            rows, full = self.rows(task, contender, share), self.full(task, contender)
            keys = [key for key in rows if key in full]
            if not keys:
                return None
            pairs.append(np.array([(rows[key].score, full[key].score) for key in keys]))
        if not pairs:
            return None
        means = np.mean([pair.mean(axis=0) for pair in pairs], axis=0)
        random = np.random.default_rng(0)
        draws = np.zeros(DRAWS)
        for pair in pairs:
            losses = pair[:, 1] - pair[:, 0]
            chosen = random.integers(len(losses), size=(DRAWS, len(losses)))
            draws += losses[chosen].mean(axis=1) / len(pairs)
        low, high = np.percentile(draws, [2.5, 97.5])
        return Estimate(
            mean=float(means[0]),
            loss=float(means[1] - means[0]),
            low=float(low),
            high=float(high),
            cases=sum(map(len, pairs)),
        )

    def kept(self, contender: Contender, share: float) -> float | None:
        """Share really kept, mean over all rows that say so."""
        found = [
            row.kept
            for task in self.tasks
            for row in self.rows(task, contender, share).values()
            if row.kept is not None
        ]
        return float(np.mean(found)) if found else None


def _place(name: Contender) -> tuple[object, ...]:
    known = name.method in ALL_METHODS
    place = ALL_METHODS.index(name.method) if known else len(ALL_METHODS)
    return name.implementation != OURS, name.implementation, name.variant, place, name.method


def perplexity(rows: Iterable[Row]) -> float | None:
    """Exponential of the mean negative log-likelihood of all scored tokens."""
    pairs = [(row.nll, row.scored_tokens) for row in rows if row.nll and row.scored_tokens]
    if not pairs:
        return None
    nll, tokens = np.array(pairs).T
    return float(np.exp(np.average(nll, weights=tokens)))
