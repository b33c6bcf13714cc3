"""Asks a server the cases of a plan and writes rows; what a file already has is not asked again.

All requests of a case follow one another: the first, with the full cache, leaves the context
in the server's prefix cache, and the others find it there up to the compaction.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench.quality.endpoint import Endpoint, EndpointError, ServerInfo, TokenScores
from bench.quality.plan import LANGUAGE, Plan, Variant
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
        for tokens in plan.lengths_of(task.name):
            for case in task.cases(plan.count, tokens, tokenizer, plan.seed):
                prompt = prompt_ids(case, tokenizer)
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
                if left:
                    jobs.append(Job(task, case, prompt, digest, tuple(left)))
    return jobs


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

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)

    async def run(self, jobs: Sequence[Job], progress: Progress) -> None:
        """Ask them all, case after case.

        Parameters
        ----------
        jobs : sequence of Job
        progress : callable
        """
        waiting = list(reversed(jobs))
        finished = 0

        async def work() -> None:
            nonlocal finished
            while waiting:
                job = waiting.pop()
                await self._run_job(job)
                finished += 1
                progress(finished, len(jobs), f"{job.case.key}: {len(job.variants)} rows")

        # Two cases at a time: one computes its context while the other's variants decode.
        async with asyncio.TaskGroup() as group:
            for _ in range(min(2, self.concurrency)):
                group.create_task(work())

    async def _run_job(self, job: Job) -> None:
        full = [variant for variant in job.variants if variant.method == FULL]
        others = [[variant] for variant in job.variants if variant.method != FULL]
        if job.task.name == LANGUAGE:  # protocols score different tokens
            others += [[variant] for variant in full]
        elif full:
            await self._ask(job, full)
        async with asyncio.TaskGroup() as group:
            for variants in others:
                group.create_task(self._ask(job, variants))

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
