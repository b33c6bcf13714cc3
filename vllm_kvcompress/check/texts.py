"""Contexts to check a model with: English that Python ships, with facts planted in it.

Python's own documentation (``pydoc_data.topics``) comes with every installation, so nothing
is fetched and nothing is in this repository. Files that the user names take its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

NAMES = (
    *("apple", "bridge", "candle", "dragon", "engine", "feather", "garden", "harbor"),
    *("island", "jungle", "kitchen", "lemon", "mirror", "needle", "orange", "pencil"),
    *("rabbit", "saddle", "tunnel", "umbrella", "valley", "window", "yellow", "zebra"),
)
FACT = "The special number for {name} is: {number}."
QUESTION = "\nWhat is the special number for {name}? The special number for {name} is:"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Recall:
    """A question about a fact of the context, both as token ids."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A context and what may follow it.

    Attributes
    ----------
    context : tuple of int
        Token ids.
    continuation : tuple of int
        How the text goes on.
    recalls : tuple of Recall
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    recalls: tuple[Recall, ...]


def built_in_text() -> str:
    """Running text of Python's own documentation, paragraph by paragraph."""
    from pydoc_data import topics

    return _prose("\n\n".join(topics.topics[name] for name in sorted(topics.topics)))


def text_of(files: Sequence[Path]) -> str:
    """Running text of files.

    Raises
    ------
    ValueError
        No paragraph of running text in them.
    """
    text = _prose("\n\n".join(file.read_text("utf-8", errors="replace") for file in files))
    if not text:
        raise ValueError("the named files have no paragraphs of running text.")
    return text


def _prose(text: str) -> str:
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(
        part
        for part in paragraphs
        if len(part) > 80
        and part[-1] in ".!?:"
        and sum(char.isalpha() or char == " " for char in part) > 0.85 * len(part)
    )


def samples(
    text: str,
    encode: Encode,
    count: int,
    tokens: int,
    continuation: int,
    facts: int = 4,
    seed: int = 0,
) -> list[Sample]:
    """Cut contexts out of a text and plant facts in them.

    Parameters
    ----------
    text : str
    encode : callable
        From text to token ids, without special tokens.
    count, tokens, continuation : int
        How many contexts, their length and that of their continuation, about, in tokens.
    facts : int
        Per context; each is asked for.
    seed : int

    Returns
    -------
    list of Sample

    Raises
    ------
    ValueError
        The text is shorter than one context.
    """
    sentences = re.split(r"(?<=[.!?])\s+", text)
    lengths = [len(encode(" " + sentence)) for sentence in sentences]
    if sum(lengths) < tokens + continuation:
        raise ValueError(
            f"the text has {sum(lengths)} tokens; a context of {tokens} and its continuation of "
            f"{continuation} need more. Name more files or ask for shorter contexts."
        )
    return [
        _sample(sentences, lengths, encode, tokens, continuation, facts, Random(f"{seed}-{number}"))
        for number in range(count)
    ]


def _sample(
    sentences: list[str],
    lengths: list[int],
    encode: Encode,
    tokens: int,
    continuation: int,
    facts: int,
    random: Random,
) -> Sample:
    names = random.sample(NAMES, facts)
    numbers = [str(random.randrange(100_000, 1_000_000)) for _ in names]
    planted = [FACT.format(name=n, number=v) for n, v in zip(names, numbers, strict=True)]
    first = random.randrange(len(sentences))
    order = [(first + number) % len(sentences) for number in range(len(sentences))]
    wanted = tokens - sum(len(encode(" " + fact)) for fact in planted)
    before, order = _up_to(order, lengths, wanted)
    after, _ = _up_to(order, lengths, continuation)
    taken = [sentences[number] for number in before]
    places = sorted(random.sample(range(len(taken) + 1), min(facts, len(taken) + 1)), reverse=True)
    for fact, place in zip(planted, places, strict=False):
        taken.insert(place, fact)
    following = " ".join(sentences[number] for number in after)
    recalls = [
        Recall(tuple(encode(QUESTION.format(name=n))), tuple(encode(" " + v)))
        for n, v in zip(names, numbers, strict=True)
    ]
    return Sample(tuple(encode(" ".join(taken))), tuple(encode(" " + following)), tuple(recalls))


def _up_to(order: list[int], lengths: list[int], tokens: int) -> tuple[list[int], list[int]]:
    """Sentences that have so many tokens together, at least one, and the others."""
    total = 0
    for count, number in enumerate(order, 1):
        total += lengths[number]
        if total >= tokens:
            return order[:count], order[count:]
    return order, []
