"""What of a plan is still to be asked: its cases, less the rows that a file already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from bench.quality.endpoint import ServerInfo
from bench.quality.plan import LANGUAGE, LEAST_BASELINE, Plan, Variant
from bench.quality.rows import FULL, OURS, Row, RowKey, RowsError, prompt_digest, read_rows
from bench.quality.tasks import Case, Task, prompt_ids
from bench.quality.tasks.case import Prompt, TaskError, Tokenizer
from vllm_kvcompress.shares import Shares


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
        jobs += [job for job in worth_asking(own, plan, info, done) if job.variants]
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
    for variant in plan.variants(task.name, methods, info.shares):
        row = done.rows.get(row_key(plan, info, case, variant))
        if row is None:
            left.append(variant)
        elif row.method != FULL and row_shares(row) != info.shares:
            raise RowsError(
                f"{done.path} has {case.key} of a server that keeps {_told(row_shares(row))}, "
                f"this one keeps {_told(info.shares)}; name another --variant."
            )
        elif row.prompt != digest:
            raise RowsError(
                f"{done.path} has {case.key} with another prompt (other texts or "
                "another tokenizer); name another --output."
            )
    return Job(task, case, prompt, digest, tuple(left))


def worth_asking(jobs: Sequence[Job], plan: Plan, info: ServerInfo, done: RowFile) -> list[Job]:
    """Jobs of one task, only their full cache if that is known to fail.

    Parameters
    ----------
    jobs : sequence of Job
        Of one task.
    plan : Plan
    info : ServerInfo
    done : RowFile

    Returns
    -------
    list of Job
        Those given, with fewer variants if the task fails. As long as some case has not been
        asked with the full cache, it counts as one that does not.
    """
    if not jobs or plan.ask_failing or jobs[0].task.name == LANGUAGE:
        return list(jobs)
    protocol = plan.tasks[jobs[0].task.name][0]
    keys = [row_key(plan, info, job.case, Variant(FULL, 0.0, protocol)) for job in jobs]
    rows = [done.rows[key] for key in keys if key in done.rows]
    fails = sum(row.score for row in rows) < LEAST_BASELINE * len(rows)
    if len(rows) < len(keys) or not fails:
        return list(jobs)
    return [
        replace(job, variants=tuple(one for one in job.variants if one.method == FULL))
        for job in jobs
    ]


def row_key(plan: Plan, info: ServerInfo, case: Case, variant: Variant) -> RowKey:
    """Key of the row that a variant of a case makes."""
    return RowKey(
        info.label,
        OURS,
        plan.variant,
        variant.method,
        variant.removed,
        variant.protocol,
        case.key,
    )


def row_shares(row: Row) -> Shares:
    """Shares of layers that kept more than the others on the server of a row."""
    return Shares(row.whole or 0.0, row.boosted or 0.0, row.boost or 1.0)


def _told(shares: Shares) -> str:
    told = f"{shares.whole:.3g} of its layers whole"
    if shares.boosted:
        told += f" and {shares.boost:g} times as much in {shares.boosted:.3g} of them"
    return told
