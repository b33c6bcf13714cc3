"""RULER's needles in haystacks: single and several keys, values and queries.

Prompts, needles and variants are those of RULER (Hsieh et al., arXiv 2404.06654). What
differs: the essays (see :func:`~bench.quality.tasks.haystack.essay`), the words of the keys,
and that a single needle's depth is taken in turn from ten, for the heat map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any
from uuid import UUID

from bench.quality.tasks.case import (
    Case,
    DrawnTask,
    Tokenizer,
    case_key,
    case_random,
    largest,
)
from bench.quality.tasks.haystack import DEPTHS, NOISE, essay, first_words, planted
from bench.quality.tasks.words import key_word

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
MAX_TOKENS = 128
"""RULER's, for several answers."""
ONE_ANSWER = {"numbers": 24, "words": 24, "uuids": 56}
"""Enough for one answer, which stands at the beginning if at all; by kind."""


def _draw(random: Random, kind: str) -> str:
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(UUID(int=random.getrandbits(128), version=4))
    return key_word(random)


@dataclass(frozen=True)
class Needles(DrawnTask):
    """One variant of RULER's ``niah``.

    Attributes
    ----------
    name : str
    hay : str
        ``noise``, ``essay`` or ``needle`` (other needles).
    key_kind, value_kind : str
        ``words``, ``numbers`` or ``uuids``.
    keys, values, queries : int
        Keys in the haystack, values of each key, keys asked for.
    """

    name: str
    hay: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def max_tokens(self) -> int:
        """Tokens to generate; fewer than RULER's 128 where one answer is asked for."""
        return ONE_ANSWER[self.value_kind] if self.queries * self.values == 1 else MAX_TOKENS

    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case:
        key = case_key(self.name, tokens, seed, index)
        random = case_random(key)
        keys: list[str] = []
        while len(keys) < self.keys:
            drawn = _draw(random, self.key_kind)
            keys += [drawn] if drawn not in keys else []
        values = [[_draw(random, self.value_kind) for _ in range(self.values)] for _ in keys]
        pairs = [(name, value) for name, own in zip(keys, values, strict=True) for value in own]
        random.shuffle(pairs)
        needles = [self._needle(name, value) for name, value in pairs]
        if len(needles) == 1:
            depths = [DEPTHS[index % len(DEPTHS)]]
        else:  # RULER draws from 40 places without repetition
            depths = sorted(random.sample([place / 39 for place in range(40)], len(needles)))
        asked = random.sample(range(self.keys), self.queries)
        answers = tuple(value for number in asked for value in values[number])
        before, after, start = self._frame([keys[number] for number in asked])
        make = self._haystack(random, tokens, tokenizer, needles, depths)

        def fits(size: int) -> bool:
            return len(tokenizer.encode(before + make(size))) <= tokens

        context = before + make(largest(fits, tokens // 32))
        details: dict[str, Any] = {"tokens": tokens, "seed": seed, "index": index}
        if len(needles) == 1:
            details["depth"] = depths[0]
        details["answer_start"] = start
        return Case(self.name, key, context, after + start, answers, self.max_tokens, details)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _frame(self, asked: list[str]) -> tuple[str, str, str]:
        """What stands before the haystack, the question, and the start of the answer."""
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        if len(asked) * self.values == 1:
            kind, some, verb, hidden = self.value_kind.removesuffix("s"), "A", "is", "is"
            what = "What is the"
        else:
            kind, some, verb, hidden = self.value_kind, "Some", "are", "are"
            what = "What are all the"
        before = (
            f"{some} special magic {kind} {hidden} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n"
        )
        after = f"\n{what} special magic {kind} for {query} mentioned in the provided text?"
        start = f" The special magic {kind} for {query} mentioned in the provided text {verb}"
        return before, after, start

    def _haystack(
        self,
        random: Random,
        tokens: int,
        tokenizer: Tokenizer,
        needles: list[str],
        depths: list[float],
    ) -> Callable[[int], str]:
        """What makes a haystack of a size: words of an essay, or lines."""
        if self.hay == "essay":
            text = essay(random, tokens, tokenizer)
            return lambda size: planted(first_words(text, size), needles, depths, " ")
        if self.hay == "noise":
            return lambda size: planted([NOISE] * size, needles, depths, "\n")
        others = [
            self._needle(_draw(random, self.key_kind), _draw(random, self.value_kind))
            for _ in range(tokens // 8)
        ]
        return lambda size: planted(others[:size], needles, depths, "\n")
