"""Haystacks and where needles go into them."""

from __future__ import annotations

from random import Random

from bench.quality.tasks.case import Tokenizer
from bench.quality.tasks.texts import sentences, source_names

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The filler of RULER and of the passkey task."""

DEPTHS = tuple((2 * (3 * index % 10) + 1) / 20 for index in range(10))
"""Where a single needle lies: ten depths from 0.05 to 0.95, in an order in which already the
first few spread; ten cases in a row make one column of a depth x length grid."""


def essay(random: Random, tokens: int, tokenizer: Tokenizer) -> list[str]:
    """Consecutive sentences of a text, from a random one of the texts and a random place.

    RULER takes the beginning of Paul Graham's essays in every case, which may not be handed on.

    Parameters
    ----------
    random : Random
    tokens : int
        How many are wanted at least.
    tokenizer : Tokenizer

    Returns
    -------
    list of str
        Whole sentences; the text goes on at its beginning where it ends.
    """
    text = sentences(random.choice(source_names()))
    start = random.randrange(len(text))
    found: list[str] = []
    while len(tokenizer.encode(" ".join(found), add_special_tokens=False)) < tokens:
        missing = max(8, tokens // 40)
        found += [text[(start + len(found) + index) % len(text)] for index in range(missing)]
    return found


def first_words(text: list[str], count: int) -> list[str]:
    """The first ``count`` words of a text, still in sentences (the last one may be cut off)."""
    found = []
    for sentence in text:
        words = sentence.split(" ")[:count]
        if words:
            found.append(" ".join(words))
        count -= len(words)
    return found


def planted(hay: list[str], needles: list[str], depths: list[float], joiner: str) -> str:
    """Needles put between pieces of hay.

    Parameters
    ----------
    hay : list of str
    needles : list of str
        In the order in which they are to stand.
    depths : list of float
        Ascending, from 0 (before all) to 1 (after all), one per needle.
    joiner : str
        Between all pieces.

    Returns
    -------
    str
    """
    pieces = list(hay)
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        pieces.insert(round(depth * len(hay)), needle)
    return joiner.join(pieces)
