"""Rows of dense cases in a file, and what the commands that add to one have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.quality.tasks import TASKS
from vllm_kvcompress.bundled import MODEL_NAME
from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.settings import parse_settings

SETTINGS = ("method", "keep", "recent_ratio", "tasks", "count", "tokens", "seed")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run, none if there is no such file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """Parser of a command that adds rows of dense cases to a file."""
    summary, _, more = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=None, help="directory or name (default: bundled)")
    parser.add_argument("--rows", type=Path, help="file to which rows are added")
    parser.add_argument("--tokens", type=int, default=1500, help="of a context")
    return parser


def search_parser(
    prog: str, doc: str, tasks: Sequence[str], count: int, seed: int
) -> argparse.ArgumentParser:
    """Parser of a command that searches, by one method, what of a model to leave whole."""
    parser = rows_parser(prog, doc)
    parser.add_argument("--table", type=Path, help="print a table of a file instead")
    defaults = parse_settings({})
    parser.add_argument("--method", choices=list(METHODS), default=defaults.method)
    parser.add_argument("--keep", type=float, default=0.1, help="share kept where compressed")
    parser.add_argument(
        "--recent-ratio",
        type=float,
        default=defaults.recent_ratio,
        help="share of that which is recent, as in the settings",
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(tasks))
    parser.add_argument("--count", type=int, default=count, help="cases of each task")
    parser.add_argument("--seed", type=int, default=seed, help="1000 or more: 0 is held out")
    return parser


def chosen(args: argparse.Namespace, names: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """What rows of one search have in common."""
    model = Path(args.model).name if args.model else MODEL_NAME
    return {"model": model, **{name: getattr(args, name) for name in names}}


def known_rows(
    parser: argparse.ArgumentParser, args: argparse.Namespace, of: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows that a search can go on with; an error of the command if there is no file for them,
    none can be written, or it has rows of other settings.
    """
    if not args.rows:
        parser.error("--rows or --table is needed")
    try:
        args.rows.open("a").close()
    except OSError as error:
        parser.error(f"rows cannot be added to {args.rows}: {error.strerror}")
    known = read_rows(args.rows)
    if any(row["of"] != of for row in known):
        parser.error(f"{args.rows} has rows of other settings: {known[0]['of']}")
    return known


def add_rows(file: Path, rows: Iterable[dict[str, Any]], of: dict[str, Any], told: str) -> None:
    """Add rows to a file as they come, with what they have in common; ``told`` is the line to
    print of each, with the names of its fields.
    """
    with file.open("a") as out:
        for row in rows:
            print(json.dumps(row | {"of": of}), file=out, flush=True)
            print(told.format(**row), file=sys.stderr, flush=True)
