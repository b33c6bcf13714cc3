"""Which KV heads must keep every token: those whose gates stay open (:mod:`bench.gates`).

    python -m bench.heads --rows heads.jsonl              # goes on from the last row
    python -m bench.heads --table heads.jsonl             # Markdown of the last row
    python -m bench.heads --table heads.jsonl --choose 12 # 7:2,8:0,...: layer and KV head

The strict protocol of :mod:`bench.methods`: dense, without a server, with answers fed. Cases are
those that the model answers with its full cache; of several answers, those that it gets right.
A row every twenty steps has the KL divergence, in nats per token of the answers, and all gates; the
last one is the result. The same settings give the same rows on the same machine; a run that was
interrupted goes on with the same cases, but without the optimizer's moments, so a little otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from bench.gates import Lesson, divergence, gated_attention, make_lesson
from bench.layers import USUAL
from bench.methods import told
from bench.quality.tasks import TASKS, prompt_ids
from bench.rows import SETTINGS, add_rows, chosen, known_rows, read_rows, search_parser
from vllm_kvcompress.bundled import model_directory
from vllm_kvcompress.check.__main__ import load
from vllm_kvcompress.check.dense import Shape
from vllm_kvcompress.methods import METHODS

START = 0.5
RATE = 0.04
TASKS_A_STEP = 3
EVERY = 20
"""Steps between rows."""

TOLD = 0.05
"""Least gate that the table names."""


def make_lessons(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[Lesson]:
    """Cases that the model answers with its full cache."""
    shape, method = Shape.usual(args.recent_ratio), METHODS[args.method]()
    lessons: list[Lesson] = []
    for task in args.tasks:
        # Free text is hardly ever repeated to the letter, yet its tokens tell.
        answered = task not in ("lm", "needle")
        for case in TASKS[task].cases(args.count, args.tokens, tokenizer, args.seed):
            prompt = prompt_ids(case, tokenizer)
            fed = told(case, prompt.question, tokenizer)
            lesson = make_lesson(
                model, task, prompt.context, fed, method, args.keep, shape, answered=answered
            )
            if lesson:
                lessons.append(lesson)
        count = sum(lesson.task == task for lesson in lessons)
        print(f"{task}: {count} cases", file=sys.stderr, flush=True)
    if not lessons:
        raise ValueError("the model answers none of these cases with its full cache")
    return lessons


def learn(
    model: Any,
    lessons: Sequence[Lesson],
    penalty: float,
    steps: int,
    seed: int,
    last: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Learn gates, with a row every ``EVERY`` steps and after the last.

    Each step has a case of each of ``TASKS_A_STEP`` tasks; which ones follows from the seed and
    the step. Weights of the model are frozen, and stay so.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`gated_attention`.
    lessons : sequence of Lesson
    penalty : float
        Nats that a gate costs when it is open.
    steps : int
    seed : int
    last : dict, optional
        The row to go on from. Its gates are all that is known: Adam's moments start anew.
    """
    model.requires_grad_(False)
    by_task: dict[str, list[Lesson]] = defaultdict(list)
    for lesson in lessons:
        by_task[lesson.task].append(lesson)
    keys = lessons[0].context.keys
    start = last["gates"] if last else [[START] * len(layer) for layer in keys]
    gates = torch.tensor(start, device=keys[0].device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=RATE)
    found: list[float] = []
    for step in range(last["step"] + 1 if last else 1, steps + 1):
        dice = random.Random(f"{seed} {step}")
        tasks = dice.sample(sorted(by_task), min(TASKS_A_STEP, len(by_task)))
        optimizer.zero_grad()
        losses = []
        for task in tasks:  # one graph at a time
            loss = divergence(model, dice.choice(by_task[task]), gates)
            (loss / len(tasks)).backward()
            losses.append(loss.item())
        (penalty * gates.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
        found.append(fmean(losses))
        if step % EVERY == 0 or step == steps:
            yield {
                "step": step,
                "kl": round(fmean(found), 5),
                "mean": round(gates.mean().item(), 5),
                "gates": [[round(gate, 5) for gate in layer] for layer in gates.tolist()],
            }
            found.clear()


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, int, int]]:
    """Gate, layer and KV head of the last row, the largest gates first.

    Gates are cut at 0 and 1, so some are equal: of these, the larger one in the mean over rows
    comes first, as it opened sooner.
    """
    last = rows[-1]["gates"]
    heads = [(layer, head) for layer, gates in enumerate(last) for head in range(len(gates))]
    mean = {(k, head): fmean(row["gates"][k][head] for row in rows) for k, head in heads}
    heads.sort(key=lambda head: (-last[head[0]][head[1]], -mean[head], head))
    return [(last[layer][head], layer, head) for layer, head in heads]


def choose(rows: Sequence[Mapping[str, Any]], count: int) -> str:
    """The heads with the largest gates, as ``LAYER:HEAD,...``, ascending.

    Raises
    ------
    ValueError
        More heads than have open gates: among closed ones there is nothing to choose by.
    """
    heads = [(layer, head) for gate, layer, head in ranked(rows) if gate > 0]
    if not 0 < count <= len(heads):
        raise ValueError(f"{len(heads)} heads have gates above 0, so {count} cannot be chosen")
    return ",".join(f"{layer}:{head}" for layer, head in sorted(heads[:count]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Settings, how learning ended, and the heads whose gates are open."""
    last = rows[-1]
    lines = [
        ", ".join(f"{name}: {value}" for name, value in last["of"].items()) + ".",
        "",
        f"After {last['step']} steps: KL {last['kl']:.4f} nats per answer token, gates open "
        f"{last['mean']:.1%} in the mean.",
        "",
        "| Layer | KV head | Gate |",
        "|---|---|---|",
    ]
    lines += [
        f"| {layer} | {head} | {gate:.2f} |" for gate, layer, head in ranked(rows) if gate >= TOLD
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Learn for the steps that are missing, or print a table or heads."""
    doc = __doc__ or ""
    parser = search_parser("python -m bench.heads", doc, USUAL, count=4, seed=2000)
    parser.add_argument("--choose", type=int, help="print so many heads instead of the table")
    parser.add_argument("--penalty", type=float, default=0.003, help="nats for an open gate")
    parser.add_argument("--steps", type=int, default=160)
    args = parser.parse_args(arguments)
    if args.table:
        rows = read_rows(args.table)
        if not rows:
            parser.error(f"{args.table} has no rows")
        try:
            print(table(rows) if args.choose is None else choose(rows, args.choose))
        except ValueError as error:
            parser.error(str(error))
        return 0
    if args.choose is not None:
        parser.error("--choose is of a --table")
    of = chosen(args, (*SETTINGS, "penalty"))
    known = known_rows(parser, args, of)
    last = known[-1] if known else None
    if last and last["step"] >= args.steps:
        return 0
    model, tokenizer = load(str(args.model or model_directory()), "float32", "cpu")
    with gated_attention(model):
        lessons = make_lessons(model, tokenizer, args)
        learnt = learn(model, lessons, args.penalty, args.steps, args.seed, last)
        add_rows(args.rows, learnt, of, "step {step}: KL {kl:.4f}, gates {mean:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
