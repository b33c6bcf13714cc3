"""Asks a server the cases of a plan and writes rows; what a file already has is not asked again.

Task after task: first the full cache of all its cases, and if that does not fail, the others.
All requests of a case follow one another: the first leaves the context in the server's prefix
cache, and the others find it there up to the compaction.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.quality.endpoint import Endpoint, EndpointError, ServerInfo, TokenScores
from bench.quality.jobs import Job, RowFile, worth_asking
from bench.quality.plan import LANGUAGE, Plan, Variant
from bench.quality.rows import DURING, FULL, OURS, STRICT, Row
from vllm_kvcompress.shares import ALIKE

Progress = Callable[[int, int, str], None]
"""Told the cases done, those to do, and what was just done."""


@dataclass
class Runner:
    """Asks jobs of one server.

    Attributes
    ----------
    plan : Plan
    endpoint : Endpoint
    info : ServerInfo
    done : RowFile
        Gets the rows.
    concurrency : int
        Requests under way at a time. With 1 nothing of the arithmetic depends on what else the
        server computes at that moment.
    """

    plan: Plan
    endpoint: Endpoint
    info: ServerInfo
    done: RowFile
    concurrency: int
    _slots: asyncio.Semaphore = field(init=False)
    _progress: Progress = field(init=False)
    _finished: int = field(init=False, default=0)
    _of: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)

    async def run(self, jobs: Sequence[Job], progress: Progress) -> None:
        """Ask them all, task after task: the full cache of its cases first, then the others.

        Parameters
        ----------
        jobs : sequence of Job
        progress : callable
        """
        self._finished, self._progress, self._of = 0, progress, len(jobs)
        for task in dict.fromkeys(job.task.name for job in jobs):
            own = [job for job in jobs if job.task.name == task]
            if task != LANGUAGE:
                await self._each(own, self._ask_full)
            worth = worth_asking(own, self.plan, self.info, self.done)
            await self._each(worth, self._ask_others)

    async def _each(self, jobs: Sequence[Job], ask: Callable[[Job], Awaitable[None]]) -> None:
        waiting = list(reversed(jobs))

        async def work() -> None:
            while waiting:
                await ask(waiting.pop())

        # Two cases at a time: one computes its context while the other's variants decode.
        async with asyncio.TaskGroup() as group:
            for _ in range(min(2, self.concurrency)):
                group.create_task(work())

    async def _ask_full(self, job: Job) -> None:
        full = [variant for variant in job.variants if variant.method == FULL]
        if full:
            await self._ask(job, full)

    async def _ask_others(self, job: Job) -> None:
        language = job.task.name == LANGUAGE
        others = [one for one in job.variants if language or one.method != FULL]
        if others and not language:
            # Alone: it leaves the context in the prefix cache, if that is not there already.
            await self._ask(job, [others.pop(0)])
        async with asyncio.TaskGroup() as group:
            for variant in others:
                group.create_task(self._ask(job, [variant]))
        self._finished += 1
        self._progress(self._finished, self._of, job.case.key)

    async def _ask(self, job: Job, variants: Sequence[Variant]) -> None:
        """One request, whose answer holds for all of these variants."""
        context = len(job.prompt.context)
        xargs = variants[0].xargs(context, self.plan.prune_after, self.info.shares)
        if not self.info.methods:  # a server without our plugin, asked for the full cache
            xargs = {}
        ids = [*job.prompt.context, *job.prompt.question]
        async with self._slots:
            if job.task.name == LANGUAGE:
                scores = await self.endpoint.token_scores(ids, xargs)
                found = self._likelihood(job, variants[0], scores)
            else:
                answer = await self.endpoint.generate(ids, job.case.max_tokens, xargs)
                found = {
                    "score": job.task.score(answer.text, job.case),
                    "prediction": answer.text,
                    "removed_tokens": answer.removed_tokens,
                }
        for variant in variants:
            self.done.add(self._row(job, variant, **found))

    def _likelihood(self, job: Job, variant: Variant, scores: TokenScores) -> dict[str, Any]:
        """Accuracy and likelihood of the text's own tokens."""
        # Entry i is of token i + 1. The first token after the context is predicted by the
        # context's last one, whose own attention saw the whole context: it is left out.
        during = variant.protocol == DURING
        first = self.plan.prune_after if during else len(job.prompt.context)
        logprobs, ranks = scores.logprobs[first:], scores.ranks[first:]
        if not logprobs or not all(map(math.isfinite, logprobs)):
            raise EndpointError(f"{job.case.key}: no usable log-probabilities after token {first}.")
        return {
            "score": sum(rank == 1 for rank in ranks) / len(ranks),
            "nll": -math.fsum(logprobs) / len(logprobs),
            "scored_tokens": len(logprobs),
            "removed_tokens": scores.removed_tokens,
        }

    def _row(
        self,
        job: Job,
        variant: Variant,
        score: float,
        removed_tokens: float | None,
        prediction: str = "",
        nll: float | None = None,
        scored_tokens: int | None = None,
    ) -> Row:
        whole = len(job.prompt.context)
        if variant.protocol != STRICT:
            whole += len(job.prompt.question)
        shares = ALIKE if variant.method == FULL else self.info.shares
        return Row(
            task=job.task.name,
            key=job.case.key,
            model=self.info.label,
            implementation=OURS,
            method=variant.method,
            removed=variant.removed,
            protocol=variant.protocol,
            score=score,
            prediction=prediction,
            prompt=job.digest,
            tokens=int(job.case.details["tokens"]),
            depth=job.case.details.get("depth"),
            nll=nll,
            scored_tokens=scored_tokens,
            kept=None if removed_tokens is None else 1 - removed_tokens / whole,
            variant=self.plan.variant,
            whole=shares.whole or None,
            boosted=shares.boosted or None,
            boost=shares.boost if shares.boosted else None,
        )
