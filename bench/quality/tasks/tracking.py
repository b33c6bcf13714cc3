"""RULER's variable tracking: which names end up with a value."""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from bench.quality.tasks.case import (
    Case,
    DrawnTask,
    Tokenizer,
    case_key,
    case_random,
    largest,
)
from bench.quality.tasks.haystack import NOISE, planted

INTRODUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)


def _question(value: str) -> str:
    return f"\nQuestion: Find all variables that are assigned the value {value} in the text above."


def _start(value: str, names: int) -> str:
    return (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{names} variables are assigned the value {value}, they are: "
    )


@dataclass(frozen=True)
class VariableTracking(DrawnTask):
    """One chain of assignments in noise, after a solved example, as RULER has it.

    Attributes
    ----------
    name : str
    hops : int
        Assignments of one name to another; RULER's ``vt`` has four. The solved example has as
        many.
    """

    name: str = "vt"
    hops: int = 4
    max_tokens: int = 30

    def _chain(self, random: Random, letters: int) -> tuple[list[str], str, list[str]]:
        """Names, their value, and the assignments in order."""
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(random.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(random.randrange(10000, 99999))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
        return names, value, lines

    def _text(self, random: Random, lines: list[str], size: int) -> str:
        places = sorted(random.sample([place / 39 for place in range(40)], len(lines)))
        return planted([NOISE] * size, lines, places, "\n").replace(". \n", ".\n")

    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case:
        key = case_key(self.name, tokens, seed, index)
        random = case_random(key)
        names, value, lines = self._chain(random, 3)
        example = INTRODUCTION + self._text(random, lines, 5) + _question(value)
        example += _start(value, len(names)) + " ".join(names) + "\n\n"
        names, value, lines = self._chain(random, 5)
        places = random.getrandbits(64)

        def make(size: int) -> str:
            return example + INTRODUCTION + self._text(Random(places), lines, size)

        size = largest(lambda size: len(tokenizer.encode(make(size))) <= tokens, tokens // 24)
        start = _start(value, len(names))
        question = _question(value) + start
        details = {"tokens": tokens, "seed": seed, "index": index, "answer_start": start}
        return Case(self.name, key, make(size), question, tuple(names), self.max_tokens, details)
