"""Files of JSON lines, which both environments read and write. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file, none if it is missing; a last line that was cut off is left out."""
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in whole]


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines in a file, which is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.rename(path)


def open_at_end(path: Path) -> TextIO:
    """A file to go on with, without a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])
    return path.open("a", encoding="utf-8")
