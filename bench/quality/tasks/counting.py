"""RULER's aggregation tasks: common words of a list, frequent words of a coded text."""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random

import numpy as np

from bench.quality.tasks.case import (
    Case,
    DrawnTask,
    Tokenizer,
    case_key,
    case_random,
    largest,
)
from bench.quality.tasks.words import sample_words

LONG = 4096
"""Tokens from which RULER repeats the words of ``cwe`` more often."""


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


@dataclass(frozen=True)
class CommonWords(DrawnTask):
    """``cwe``: the ten words of a numbered list that stand in it most often.

    With a solved example before it, as RULER has it: common words stand 30 times and the
    others 3 times in long contexts, 6 times and once below 4,096 tokens.
    """

    name: str = "cwe"
    common: int = 10
    max_tokens: int = 120

    def _list(
        self, random: Random, words: list[str], often: int, seldom: int
    ) -> tuple[str, list[str]]:
        common, others = words[: self.common], words[self.common :]
        entries = common * often + others * seldom
        random.shuffle(entries)
        text = (
            "Below is a numbered list of words. In these words, some appear more often than "
            f"others. Memorize the ones that appear most often.\n{_numbered(entries)}"
        )
        return text, common

    def _question(self) -> str:
        return f"\nQuestion: What are the {self.common} most common words in the above list?"

    def _start(self) -> str:
        return f" Answer: The top {self.common} words that appear most often in the list are:"

    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case:
        key = case_key(self.name, tokens, seed, index)
        random = case_random(key)
        long = tokens >= LONG
        shot = (40, 10, 3) if long else (20, 3, 1)
        text, common = self._list(random, sample_words(random, shot[0]), *shot[1:])
        example = f"{text}{self._question()}{self._start()} {_numbered(common)}\n"
        often, seldom = (30, 3) if long else (6, 1)
        order = random.getrandbits(64)
        words = sample_words(random, max(self.common, tokens // (5 * seldom)))

        def make(size: int) -> str:
            part = words[: self.common + size]
            return example + self._list(Random(order), part, often, seldom)[0]

        def fits(size: int) -> bool:
            enough = self.common + size <= len(words)
            return enough and len(tokenizer.encode(make(size))) <= tokens

        details = {"tokens": tokens, "seed": seed, "index": index, "answer_start": self._start()}
        question = self._question() + self._start()
        context = make(largest(fits, tokens // 16))
        answers = tuple(words[: self.common])
        return Case(self.name, key, context, question, answers, self.max_tokens, details)


@dataclass(frozen=True)
class FrequentWords(DrawnTask):
    """``fwe``: the three most frequent coded words, drawn from a zeta distribution.

    Attributes
    ----------
    alpha : float
        Of the distribution; RULER's 2.
    letters : int
        Of a coded word.
    """

    name: str = "fwe"
    alpha: float = 2.0
    letters: int = 6
    max_tokens: int = 50

    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case:
        key = case_key(self.name, tokens, seed, index)
        random = case_random(key)
        vocabulary = {
            "".join(random.choices(string.ascii_lowercase, k=self.letters))
            for _ in range(max(tokens // 50, 8))
        }
        words = sorted(vocabulary)
        random.shuffle(words)
        words[0] = "..."  # the most frequent is noise
        order = random.getrandbits(64)
        weights = np.arange(1, len(words) + 1) ** -self.alpha
        weights /= _zeta(self.alpha)
        before = (
            "Read the following coded text and track the frequency of each coded word. Find the "
            "three most frequently appeared coded words. "
        )

        def make(size: int) -> str:
            counts = (size * weights).astype(int)
            text = [word for word, often in zip(words, counts, strict=True) for _ in range(often)]
            Random(order).shuffle(text)
            return before + " ".join(text)

        size = largest(lambda size: len(tokenizer.encode(make(size))) <= tokens, tokens // 4)
        question = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
            "the three most frequently appeared words in the above coded text?"
        )
        start = (
            " Answer: According to the coded text above, the three most frequently appeared words "
            "are:"
        )
        details = {"tokens": tokens, "seed": seed, "index": index, "answer_start": start}
        return Case(
            self.name,
            key,
            make(size),
            question + start,
            tuple(words[1:4]),
            self.max_tokens,
            details,
        )


def _zeta(alpha: float, terms: int = 1_000_000) -> float:
    """Riemann's zeta function, by its first terms and the integral of the rest."""
    sum_ = float(np.sum(np.arange(1, terms, dtype=np.float64) ** -alpha))
    return sum_ + (terms - 0.5) ** (1 - alpha) / (alpha - 1)
