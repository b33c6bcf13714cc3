"""Engines that take their steps in turn, so that what drifts on a machine meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from bench.harness.engines import greedy

_names = count()


@dataclass
class Course:
    """How one engine got through a batch.

    Attributes
    ----------
    decoding : list of float
        Seconds of the steps in which every request of the batch decodes.
    seconds : float
        Of all steps.
    before_decoding : float
        Of the steps before every request decoded.
    """

    decoding: list[float] = field(default_factory=list)
    seconds: float = 0.0
    before_decoding: float = 0.0

    @property
    def step(self) -> float:
        """Median decoding step: other work on the machine hardly moves it."""
        return statistics.median(self.decoding)

    @property
    def mean_step(self) -> float:
        """Mean decoding step: what a token took, compactions included."""
        return statistics.fmean(self.decoding)


class _Batch:
    """A batch under way in one engine."""

    def __init__(self, engine: Any, prompts: list[Any], output_tokens: int) -> None:
        self.engine, self.output_tokens = engine.llm_engine, output_tokens
        self.course = Course()
        self.counts: dict[str, int] = {}
        for prompt in prompts:
            name = f"{next(_names)}"
            self.counts[name] = 0
            self.engine.add_request(name, prompt, greedy(output_tokens))

    @property
    def unfinished(self) -> bool:
        return self.engine.has_unfinished_requests()

    def step(self) -> None:
        # A request's first token comes with its prompt, and it compacts before its second.
        counts = self.counts.values()
        begun, last = min(counts) >= 1, max(counts) >= self.output_tokens
        started = time.perf_counter()
        outputs = self.engine.step()
        took = time.perf_counter() - started
        for output in outputs:
            self.counts[output.request_id] = len(output.outputs[0].token_ids)
        self.course.seconds += took
        if not begun:
            self.course.before_decoding += took
        elif not last:
            self.course.decoding.append(took)


def in_turn(
    engines: Mapping[str, Any], prompts: list[Any], output_tokens: int
) -> dict[str, Course]:
    """Run the same batch in all engines, one step of each after the other.

    Parameters
    ----------
    engines : mapping of str to LLM
        In one process. The order of their steps turns round after every step of all.
    prompts : list
    output_tokens : int
        Of every request.

    Returns
    -------
    dict of str to Course
    """
    batches = {name: _Batch(engine, prompts, output_tokens) for name, engine in engines.items()}
    order = list(batches)
    while any(batch.unfinished for batch in batches.values()):
        for name in order:
            if batches[name].unfinished:
                batches[name].step()
        order.reverse()
    return {name: batch.course for name, batch in batches.items()}
