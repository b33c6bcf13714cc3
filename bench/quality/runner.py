"""Asks a server the cases of a plan and writes rows; what a file already has is not asked again.

Task after task: first the full cache of all its cases, and if that does not fail, the others.
All requests of a case follow one another: the first leaves the context in the server's prefix
cache, and the others find it there up to the compaction.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from bench.quality.endpoint import Endpoint, EndpointError, ServerInfo, TokenScores
from bench.quality.plan import LANGUAGE, LEAST_BASELINE, Plan, Variant
from bench.quality.rows import (
    DURING,
    FULL,
    OURS,
    STRICT,
    Row,
    RowKey,
    RowsError,
    prompt_digest,
    read_rows,
)
from bench.quality.tasks import Case, Task, prompt_ids
from bench.quality.tasks.case import Prompt, TaskError, Tokenizer

Progress = Callable[[int, int, str], None]
"""Told the cases done, those to do, and what was just done."""


@dataclass(frozen=True)
class Job:
    """One case and what of it is still to be asked."""

    task: Task
    case: Case
    prompt: Prompt
    digest: str
    variants: tuple[Variant, ...]


class RowFile:
    """Rows on disk: those of earlier runs, to which new ones are added line by line.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[RowKey, Row] = {}
        if path.is_file():
            text = path.read_bytes()
            if text and not text.endswith(b"\n"):  # the end of a run that was killed
                path.write_bytes(text[: text.rfind(b"\n") + 1])
            self.rows = {row.row_key: row for row in read_rows([path])}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Write a row at once, so that a killed run loses at most the one under way."""
        self.rows[row.row_key] = row
        self._file.write(row.line() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def make_jobs(
    plan: Plan,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    info: ServerInfo,
    methods: Sequence[str],
    done: RowFile,
) -> list[Job]:
    """Make the cases of a plan and find out what of them is still to be asked.

    Parameters
    ----------
    plan : Plan
    tasks : sequence of Task
    tokenizer : Tokenizer
    info : ServerInfo
    methods : sequence of str
        What this server is to be asked for, besides the full cache.
    done : RowFile

    Returns
    -------
    list of Job
        Cases of which nothing is left to ask are not in it.

    Raises
    ------
    RowsError
        The file has rows of the same case with another prompt (other texts or tokenizer).
    """
    jobs = []
    for task in tasks:
        own = [
            _job(plan, task, case, tokenizer, info, methods, done)
            for tokens in plan.lengths_of(task.name)
            for case in task.cases(plan.count_of(task.name), tokens, tokenizer, plan.seed)
        ]
        jobs += [job for job in _worth(own, plan, info, done) if job.variants]
    return jobs


def _job(
    plan: Plan,
    task: Task,
    case: Case,
    tokenizer: Tokenizer,
    info: ServerInfo,
    methods: Sequence[str],
    done: RowFile,
) -> Job:
    chat = plan.chat and task.name != LANGUAGE
    if chat:
        case = replace(case, key=f"{case.key}-chat")
    prompt = prompt_ids(case, tokenizer, chat)
    digest = prompt_digest([*prompt.context, *prompt.question])
    size = len(prompt.context) + len(prompt.question) + case.max_tokens
    if info.max_tokens is not None and size > info.max_tokens:
        raise TaskError(
            f"{case.key} takes {size} tokens with its answer, and {info.model} is "
            f"served with at most {info.max_tokens}; choose shorter --lengths."
        )
    left = []
    for variant in plan.variants(task.name, methods):
        row = done.rows.get(_row_key(plan, info, case, variant))
        if row is None:
            left.append(variant)
        elif row.prompt != digest:
            raise RowsError(
                f"{done.path} has {case.key} with another prompt (other texts or "
                "another tokenizer); name another --output."
            )
    return Job(task, case, prompt, digest, tuple(left))


def _worth(jobs: Sequence[Job], plan: Plan, info: ServerInfo, done: RowFile) -> list[Job]:
    """Jobs of one task, only their full cache if that is known to fail.

    One that is not known yet may still turn out to fail.
    """
    if not jobs or plan.ask_failing or jobs[0].task.name == LANGUAGE:
        return list(jobs)
    protocol = plan.tasks[jobs[0].task.name][0]
    keys = [_row_key(plan, info, job.case, Variant(FULL, 0.0, protocol)) for job in jobs]
    rows = [done.rows[key] for key in keys if key in done.rows]
    fails = sum(row.score for row in rows) < LEAST_BASELINE * len(rows)
    if len(rows) < len(keys) or not fails:
        return list(jobs)
    return [
        replace(job, variants=tuple(one for one in job.variants if one.method == FULL))
        for job in jobs
    ]


def _row_key(plan: Plan, info: ServerInfo, case: Case, variant: Variant) -> RowKey:
    return RowKey(
        info.label,
        OURS,
        plan.variant,
        variant.method,
        variant.removed,
        variant.protocol,
        case.key,
    )


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
            worth = _worth(own, self.plan, self.info, self.done)
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
        xargs = variants[0].xargs(len(job.prompt.context), self.plan.prune_after)
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
        )
