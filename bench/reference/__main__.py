"""What kvpress's presses lose on the cases of our evaluation: ``make reference``.

Makes the cases here, has them answered in the other environment and scores the answers here.
A run that was stopped goes on where it was. See docs/reference.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoTokenizer

from bench.quality.plan import LANGUAGE, LEAST_BASELINE, SHORT
from bench.quality.rows import FULL, Row
from bench.reference.cases import case_lines, scored, unscored
from bench.reference.files import read_lines, write_lines
from vllm_kvcompress.bundled import MODEL_NAME, BundledModelError, model_directory

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-reference"
RESULTS = ROOT / "bench" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str or None
        Arguments without the program's name; unknown ones go to ``bench.reference.run``.

    Returns
    -------
    int
        Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.reference",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of bench.reference.run: --presses, --shares, --minutes ...",
    )
    add = parser.add_argument
    add("--model", type=Path, help="directory (default: the bundled model)")
    add("--tasks", default=",".join(SHORT.tasks), help="default: those of make quality")
    add("--lengths", help="context lengths in tokens (default: those of make quality)")
    add("--count", type=int, help="cases of each task and length (default: as make quality)")
    add("--seed", type=int, default=0, help="of the cases")
    add("--chat", action="store_true", help="ask in the model's chat template")
    add("--ask-failing", action="store_true", help="also tasks that fail with the full cache")
    add("--output", type=Path, help="default: bench/results/reference-MODEL.jsonl")
    args, others = parser.parse_known_args(argv)
    tasks = [task for task in args.tasks.split(",") if task]
    if unknown := [task for task in tasks if task not in SHORT.tasks]:
        parser.error(f"unknown tasks {', '.join(unknown)}; known are {', '.join(SHORT.tasks)}")
    if not (ENVIRONMENT / ".setup-done").is_file():
        print("The other environment is missing; make it with: make reference", file=sys.stderr)
        return 2
    try:
        model = args.model or model_directory()
    except BundledModelError as error:
        print(error, file=sys.stderr)
        return 2

    plan = replace(SHORT, seed=args.seed, chat=args.chat)
    if args.count:
        plan = replace(plan, count=args.count, language_count=args.count)
    if args.lengths:
        plan = replace(plan, lengths={"": tuple(map(int, args.lengths.split(",")))})
    name = model.name if args.model else MODEL_NAME
    output = args.output or RESULTS / f"reference-{name}.jsonl"
    lines = list(case_lines(plan, tasks, AutoTokenizer.from_pretrained(model)))
    options = ["--model", str(model), "--name", name, *others]
    try:
        left = lines
        if not args.ask_failing:
            ask(lines, output, [*options, "--presses", ""])
            failing = failing_tasks(write_rows(lines, output))
            left = [line for line in lines if line["task"] not in failing]
            if failing:
                print(f"They fail with the full cache: {', '.join(sorted(failing))}", flush=True)
        ask(left, output, options)
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"{len(write_rows(lines, output))} rows in {output}")
    return 0


def ask(lines: Sequence[dict[str, Any]], output: Path, options: Sequence[str]) -> None:
    """Have cases answered that are not yet; cases and answers lie beside the output.

    Parameters
    ----------
    lines : sequence of dict
        From :func:`~bench.reference.cases.case_lines`.
    output : Path
    options : sequence of str
        Of ``bench.reference.run``.
    """
    cases, answers = output.with_suffix(".cases.jsonl"), output.with_suffix(".answers.jsonl")
    write_lines(cases, lines)
    if output.is_file() and not answers.is_file():
        write_lines(answers, map(unscored, read_lines(output)))
    python = str(ENVIRONMENT / "bin" / "python")
    files = ["--cases", str(cases.resolve()), "--output", str(answers.resolve())]
    subprocess.run([python, "-m", "bench.reference.run", *options, *files], cwd=ROOT, check=True)
    answers.with_suffix(".about.json").replace(output.with_suffix(".about.json"))


def write_rows(lines: Sequence[dict[str, Any]], output: Path) -> list[Row]:
    """Write the rows of these cases, with their scores, and return them."""
    by_key = {line["key"]: line for line in lines}
    raw = read_lines(output.with_suffix(".answers.jsonl"))
    rows = [scored(row, by_key[row["key"]]) for row in raw if row["key"] in by_key]
    output.write_text("".join(row.line() + "\n" for row in rows), encoding="utf-8")
    return rows


def failing_tasks(rows: Sequence[Row]) -> set[str]:
    """Tasks whose mean score with the full cache says nothing about compression."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.method == FULL and row.task != LANGUAGE:
            scores.setdefault(row.task, []).append(row.score)
    return {task for task, found in scores.items() if fmean(found) < LEAST_BASELINE}


if __name__ == "__main__":
    sys.exit(main())
