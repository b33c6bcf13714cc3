"""Cases of our evaluation as JSON lines with token ids, and scores for what was answered.

Token ids, not texts: so the other environment computes the same prompts, split at the same
place, whatever its tokenizers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from bench.quality.plan import LANGUAGE, Plan
from bench.quality.rows import AFTER_PROMPT, STRICT, Row, prompt_digest
from bench.quality.tasks import TASKS, Case, prompt_ids
from bench.quality.tasks.case import Tokenizer


def case_lines(plan: Plan, tasks: Sequence[str], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Lines of a plan's cases: the first one of each task, then the second ones, and so on.

    Parameters
    ----------
    plan : Plan
    tasks : sequence of str
    tokenizer : Tokenizer

    Yields
    ------
    dict
        The case's fields and ``context_ids``, ``question_ids``, ``prompt`` (its digest),
        ``protocols``, ``tokens`` and ``depth``.
    """
    made = [
        TASKS[task].cases(plan.count_of(task), tokens, tokenizer, plan.seed)
        for task in tasks
        for tokens in plan.lengths_of(task)
    ]
    for cases in zip_longest(*made):
        for case in filter(None, cases):
            prompt = prompt_ids(case, tokenizer, plan.chat and case.task != LANGUAGE)
            yield {
                **asdict(case),
                "context_ids": prompt.context,
                "question_ids": prompt.question,
                "prompt": prompt_digest([*prompt.context, *prompt.question]),
                "protocols": [
                    name for name in plan.tasks[case.task] if name in (STRICT, AFTER_PROMPT)
                ],
                "tokens": int(case.details["tokens"]),
                "depth": case.details.get("depth"),
            }


def scored(raw: Mapping[str, Any], line: Mapping[str, Any]) -> Row:
    """A row with its score.

    Parameters
    ----------
    raw : mapping
        What ``bench.reference.run`` wrote; for ``lm`` it has a score.
    line : mapping
        The line of the case.

    Returns
    -------
    Row

    Raises
    ------
    ValueError
        The row answers another prompt.
    """
    if raw["prompt"] != line["prompt"]:
        raise ValueError(f"{raw['key']} was answered for another prompt; remove the predictions.")
    if raw["task"] == LANGUAGE:
        return Row(**raw)
    case = Case(**{name: line[name] for name in Case.__dataclass_fields__})
    return Row(**raw, score=TASKS[case.task].score(raw["prediction"], case))


def unscored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as ``bench.reference.run`` wrote it, to go on from a file of scored rows."""
    kept = dict(row)
    if row["task"] != LANGUAGE:
        del kept["score"]
    return kept
