"""English text for haystacks and for language modelling, from Debian packages or named files.

Nothing of it is in this repository. The packages are fetched by name with ``apt-get download``
when a task first needs them, and unpacked (not installed) into a cache directory. Elsewhere,
name text files of your own: ``KVCOMPRESS_QUALITY_TEXTS=a.txt:b.txt``, or ``--texts``.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from vllm_kvcompress.bundled import cache_directory

VARIABLE = "KVCOMPRESS_QUALITY_TEXTS"

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
SHORTEST, LONGEST = 20, 600
"""Characters of what counts as a sentence in a haystack."""


class TextsError(RuntimeError):
    """No text is to be had; the message says what to do."""


def _reference(root: Path) -> str:
    with gzip.open(root / "usr/share/debian-reference/debian-reference.en.txt.gz", "rt") as file:
        return file.read()


def _jargon(root: Path) -> str:
    # dictzip is gzip with a table of its own in a header field that gzip skips.
    with gzip.open(root / "usr/share/dictd/jargon.dict.dz", "rt", errors="replace") as file:
        return file.read()


def _bible(root: Path) -> str:
    """Chapters of the text, which only the package's own program can unpack."""
    run = subprocess.run(
        [root / "usr/bin/bible", "-f", "-l100000", "-p", root / "usr/lib", "gen1:1-rev22:21"],
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    )
    verses = [re.sub(r"^\s*\S+:?\d+\s+", "", line) for line in run.stdout.splitlines()]
    return "\n".join(verses)


SOURCES: dict[str, tuple[tuple[str, ...], Callable[[Path], str]]] = {
    "debian-reference": (("debian-reference-en",), _reference),
    "jargon": (("dict-jargon",), _jargon),
    "bible": (("bible-kjv-text", "bible-kjv"), _bible),
}
"""Packages of each text, and what reads it once they are unpacked."""


@lru_cache
def prose(source: str) -> str:
    """Running text of a source: paragraphs of full sentences, one space between words.

    Parameters
    ----------
    source : str
        A name of `source_names`.

    Returns
    -------
    str
        Paragraphs with a line end between them; tables, drawings and listings are left out.
    """
    if source in SOURCES:
        packages, read = SOURCES[source]
        text = read(_unpacked(packages))
    else:
        text = Path(source).read_text(encoding="utf-8", errors="replace")
    paragraphs = []
    blocks = text.splitlines() if source == "bible" else re.split(r"\n\s*\n", text)
    for block in blocks:
        paragraph = " ".join(block.split())
        letters = sum(char.isalpha() or char.isspace() for char in paragraph)
        if len(paragraph) >= 40 and letters > 0.9 * len(paragraph) and paragraph[-1] in ".!?:;,":
            paragraphs.append(paragraph)
    if not paragraphs:
        raise TextsError(f"The text {source} has no paragraphs of sentences.")
    return "\n".join(paragraphs)


@lru_cache
def sentences(source: str) -> tuple[str, ...]:
    """Sentences of a source in order, without very short and very long ones."""
    parts = SENTENCE_END.split(prose(source).replace("\n", " "))
    return tuple(part for part in parts if SHORTEST <= len(part) <= LONGEST)


def source_names() -> tuple[str, ...]:
    """The texts in use: the files that the user named, or those of the packages."""
    named = tuple(part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part)
    for path in named:
        if not Path(path).is_file():
            raise TextsError(f"{VARIABLE} names {path}, which is not a file.")
    return named or tuple(SOURCES)


def _unpacked(packages: tuple[str, ...]) -> Path:
    """Directory with the packages' files, fetched once."""
    target = cache_directory() / "texts" / packages[0]
    if target.is_dir():
        return target
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise TextsError(
            f"The text of the Debian package {packages[0]} is fetched with apt-get, which is not "
            f"here; name text files of your own instead: {VARIABLE}=a.txt:b.txt"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():  # another process finished while this one waited
            return target
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        run = subprocess.run(
            ["apt-get", "download", "-q", *packages], cwd=partial, capture_output=True, text=True
        )
        if run.returncode:
            raise TextsError(
                f"apt-get download {' '.join(packages)} failed ({run.stderr.strip()[-300:]}); try "
                f"'apt-get update', or name text files of your own: {VARIABLE}=a.txt:b.txt"
            )
        for package in sorted(partial.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, partial], check=True)
            package.unlink()
        partial.rename(target)
    return target
