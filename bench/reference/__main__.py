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
from typing import Any

from transformers import AutoTokenizer

from bench.quality.plan import SHORT
from bench.reference.cases import case_lines, scored
from bench.reference.files import read_lines, write_lines
from vllm_kvcompress.bundled import BundledModelError, model_directory

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
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of bench.reference.run: --presses, --shares, --minutes ...",
    )
    add = parser.add_argument
    add("--model", type=Path, help="directory (default: the bundled model)")
    add("--tasks", default=",".join(SHORT.tasks), help="default: those of make quality")
    add("--lengths", help="context lengths in tokens (default: those of make quality)")
    add("--count", type=int, default=SHORT.count, help="cases of each task and length")
    add("--seed", type=int, default=0, help="of the cases")
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

    plan = replace(SHORT, count=args.count, seed=args.seed)
    if args.lengths:
        plan = replace(plan, lengths={"": tuple(map(int, args.lengths.split(",")))})
    output = args.output or RESULTS / f"reference-{model.name}.jsonl"
    cases, answers = output.with_suffix(".cases.jsonl"), output.with_suffix(".answers.jsonl")
    lines = list(case_lines(plan, tasks, AutoTokenizer.from_pretrained(model)))
    write_lines(cases, lines)
    files = ["--model", str(model), "--cases", str(cases), "--output", str(answers)]
    python = ENVIRONMENT / "bin" / "python"
    run = subprocess.run([python, "-m", "bench.reference.run", *files, *others], cwd=ROOT)
    if run.returncode:
        return run.returncode
    answers.with_suffix(".about.json").replace(output.with_suffix(".about.json"))
    return write_scores(lines, answers, output)


def write_scores(lines: list[dict[str, Any]], answers: Path, output: Path) -> int:
    """Score the answers to these cases."""
    by_key = {line["key"]: line for line in lines}
    raw = [row for row in read_lines(answers) if row["key"] in by_key]
    text = "".join(scored(row, by_key[row["key"]]).line() + "\n" for row in raw)
    output.write_text(text, encoding="utf-8")
    print(f"{len(raw)} rows in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
