"""Eviction methods against each other on one model: dense, in plain transformers, no server.

    python -m bench.methods --rows rows.jsonl      # resumes where it stopped
    python -m bench.methods --rows rows.jsonl --contenders knorm keydiff:recent=0,beta=2
    python -m bench.methods --table rows.jsonl     # Markdown of what is there

The strict protocol: the context of a case of :mod:`bench.quality` is computed exactly and
compressed, then the question is computed against what is left. Cheap enough to compare many
contenders, because answers are not generated but fed:

* ``score``: share of a case's answers of which every token would have been the greedy choice,
  given the answers so far, from the space or comma that leads over to it: in that step a model
  decides whether to answer at all. Where the full cache answers in another order or in other
  words, it counts as wrong there too.
* ``logprob``: mean log-probability of the answers' tokens, in nats. For ``lm``, which has no
  question, of how the text goes on; ``score`` is the share of its tokens that are greedy.

A contender is a method, or one with settings, as ``keydiff:sinks=0,recent=32,ratio=0.5,skip=0+1``.
All contenders keep equally many tokens in the mean over layers, also with a pyramid (``beta``)
or layers that keep everything (``skip``): the others then keep fewer.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.quality.tasks import TASKS, Case, prompt_ids
from bench.rows import read_rows, rows_parser
from vllm_kvcompress.bundled import model_directory
from vllm_kvcompress.check.__main__ import load
from vllm_kvcompress.check.attention import own_attention
from vllm_kvcompress.check.dense import Context, Shape, compress, compute, follow
from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.settings import parse_settings

FULL = "full"
SHARES = (0.25, 0.5, 0.75, 0.9)
LM_TOKENS = 128
LEFT_OUT = ("vt", "cwe", "niah_multikey_2", "niah_multikey_3")
"""Tasks at which the bundled model fails with the full cache."""


@dataclass(frozen=True)
class Contender:
    """A method with its settings, under the name that the results have."""

    name: str
    method: str
    shape: Shape
    beta: float = 1.0
    skip: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str) -> Contender:
        """Read ``method:key=value,...``.

        Raises
        ------
        ValueError
            An unknown method or key.
        """
        method, _, rest = name.partition(":")
        given = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
        unknown = set(given) - {"sinks", "recent", "ratio", "beta", "skip"}
        if method not in METHODS or unknown or (rest and not given):
            raise ValueError(
                f"{name} is no contender; methods are {', '.join(METHODS)}, keys are sinks, "
                "recent, ratio, beta and skip, as in keydiff:recent=0,skip=0+1."
            )
        defaults = parse_settings({})
        shape = Shape(
            int(given.get("sinks", defaults.sink_tokens)),
            int(given.get("recent", defaults.recent_tokens)),
            float(given.get("ratio", defaults.recent_ratio)),
        )
        if not 0 <= shape.recent_ratio <= 1:
            raise ValueError(f"{name} is no contender: ratio is a share of the tokens kept")
        skip = tuple(int(layer) for layer in given.get("skip", "").split("+") if layer)
        return cls(name, method, shape, float(given.get("beta", 1)), skip)

    def keep(self, removed: float, tokens: int, layers: int) -> tuple[int, ...]:
        """Tokens that each layer keeps, with the wished mean as far as the shape allows."""
        weights = [1 + k / layers * (1 / self.beta - 1) for k in range(layers)]
        others = [k for k in range(layers) if k not in self.skip]
        wanted = (1 - removed) * tokens * layers - tokens * len(self.skip)
        least = self.shape.sinks + self.shape.recent
        scale = wanted / sum(weights[k] for k in others)
        return tuple(
            tokens if k in self.skip else min(tokens, max(round(scale * weights[k]), least))
            for k in range(layers)
        )


@dataclass(frozen=True)
class Told:
    """Tokens fed after a context, and which of them are an answer.

    Attributes
    ----------
    tokens : list of int
    answers : list of tuple of int
        First and last index (excluded) of each answer in ``tokens``, with what leads over to it.
    """

    tokens: list[int]
    answers: list[tuple[int, int]]


def told(case: Case, question: list[int], tokenizer: Any) -> Told:
    """The question and its answers as the model would put them."""
    if not case.answers:
        tokens = question[: LM_TOKENS + 1]
        return Told(tokens, [(place, place + 1) for place in range(1, len(tokens))])
    first = ": " if "uuid" in case.question else " "
    between = ", "
    if case.question.endswith(" "):  # vt
        first, between = "", " "
    tokens, spans = list(question), []
    for number, answer in enumerate(case.answers):
        lead = first if number == 0 else between
        start = len(tokens)
        tokens += tokenizer.encode(lead + answer, add_special_tokens=False)
        spans.append((start, len(tokens)))
    return Told(tokens, spans)


def evaluate(
    model: Any, contexts: Sequence[Context], position: int, fed: Told
) -> Iterator[tuple[float, float]]:
    """Score and log-probability of each context."""
    logprobs, greedy = follow(model, contexts, position, fed.tokens)
    for own, best in zip(logprobs, greedy, strict=True):
        spans = [slice(first - 1, last - 1) for first, last in fed.answers]
        yield (
            fmean(float(best[span].all()) for span in spans),
            fmean(float(own[span].mean()) for span in spans),
        )


def run(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    shares: Sequence[float],
    known: set[tuple[str, str, float]],
) -> Iterator[dict[str, Any]]:
    """Rows of all cases that are not known yet."""
    for case in cases:
        jobs = [
            (share, contender)
            for share in shares
            for contender in contenders
            if (case.key, contender.name, share) not in known
        ]
        fresh = (case.key, FULL, 0.0) not in known
        if not jobs and not fresh:
            continue
        started = time.monotonic()
        prompt = prompt_ids(case, tokenizer)
        fed = told(case, prompt.question, tokenizer)
        context = compute(model, prompt.context)
        tokens, layers = context.tokens, len(context.keys)

        def row(name: str, removed: float, found: tuple[float, float], of: Case = case) -> dict:
            return {
                "task": of.task,
                "key": of.key,
                "method": name,
                "removed": removed,
                "score": found[0],
                "logprob": round(found[1], 5),
            }

        if fresh:
            yield row(FULL, 0.0, next(evaluate(model, [context], tokens, fed)))
        sized = [(c.keep(share, tokens, layers), share, c) for share, c in jobs]
        sized.sort(key=lambda job: job[:2])
        for keep, group in groupby(sized, key=lambda job: job[0]):
            alike = list(group)
            small = [compress(context, METHODS[c.method](), keep, c.shape) for _, _, c in alike]
            results = evaluate(model, small, tokens, fed)
            for (_, share, contender), found in zip(alike, results, strict=True):
                yield row(contender.name, share, found)
        print(f"{case.key}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Points in 100 by method, share and task, and what is lost in log-probability."""
    tasks = sorted({row["task"] for row in rows})
    score: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    lost: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    full = {row["key"]: row["logprob"] for row in rows if row["method"] == FULL}
    for row in rows:
        score[row["method"], row["removed"], row["task"]].append(row["score"])
        loss = full[row["key"]] - row["logprob"]
        lost[row["method"], row["removed"]][row["task"]].append(loss)
    cases = {task: len(score[FULL, 0.0, task]) for task in tasks}
    lines = [
        "| Removed | Method | Mean | Lost, nats | "
        + " | ".join(f"`{task}` ({cases[task]})" for task in tasks)
        + " |",
        "|---" * (4 + len(tasks)) + "|",
    ]

    def mean(method: str, removed: float) -> float:
        return fmean(fmean(score[method, removed, task]) for task in tasks)

    def whole(method: str, removed: float) -> bool:
        return all(score[method, removed, task] for task in tasks)

    pairs = sorted(
        (pair for pair in lost if whole(*pair)), key=lambda pair: (pair[1], -mean(*pair))
    )
    for method, removed in pairs:
        nats = fmean(fmean(lost[method, removed][task]) for task in tasks)
        cells = [f"{100 * fmean(score[method, removed, task]):.0f}" for task in tasks]
        lines.append(
            f"| {removed:.0%} | `{method}` | {100 * mean(method, removed):.1f} | {nats:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, or print a table."""
    parser = rows_parser("python -m bench.methods", __doc__ or "")
    usual = [task for task in TASKS if task not in LEFT_OUT]
    parser.add_argument("--table", type=Path, nargs="+", help="print a table of files instead")
    parser.add_argument("--contenders", nargs="+", default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=usual)
    parser.add_argument("--count", type=int, default=4, help="cases of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.table:
        print(table([row for file in args.table for row in read_rows(file)]))
        return 0
    if not args.rows:
        parser.error("--rows or --table is needed")
    try:
        contenders = [Contender.of(name) for name in args.contenders]
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer = load(str(args.model or model_directory()), "float32", "cpu")
    made = [TASKS[task].cases(args.count, args.tokens, tokenizer, args.seed) for task in args.tasks]
    # Tasks in turn, so that an unfinished run has some of each.
    cases = [case for turn in zip(*made, strict=True) for case in turn]
    known = {(row["key"], row["method"], row["removed"]) for row in read_rows(args.rows)}
    with args.rows.open("a") as file, own_attention(model):
        for row in run(model, tokenizer, cases, contenders, args.shares, known):
            print(json.dumps(row), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
