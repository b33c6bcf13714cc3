"""Passkey retrieval and the classic needle in a haystack, each on a grid of depths and lengths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bench.quality.tasks.case import (
    Case,
    DrawnTask,
    Tokenizer,
    case_key,
    case_random,
    largest,
)
from bench.quality.tasks.haystack import DEPTHS, NOISE, essay, first_words, planted


@dataclass(frozen=True)
class Passkey(DrawnTask):
    """A number of five digits in a repeated filler (Mohtashami and Jaggi, arXiv 2305.16300)."""

    name: str = "passkey"
    max_tokens: int = 10

    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case:
        key = case_key(self.name, tokens, seed, index)
        secret = str(case_random(key).randint(10000, 99999))
        depth = DEPTHS[index % len(DEPTHS)]
        before = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize it. I will quiz you about the important information there.\n"
        )
        needle = f"The pass key is {secret}. Remember it. {secret} is the pass key."

        def make(size: int) -> str:
            return before + planted([NOISE] * size, [needle], [depth], " ")

        size = largest(lambda size: len(tokenizer.encode(make(size))) <= tokens, tokens // 24)
        question, start = "\nWhat is the pass key?", " The pass key is"
        details: dict[str, Any] = {"tokens": tokens, "seed": seed, "index": index, "depth": depth}
        details["answer_start"] = start
        return Case(
            self.name, key, make(size), question + start, (secret,), self.max_tokens, details
        )


CITIES = (
    *("Barcelona", "London", "Paris", "Berlin", "Tokyo", "Chicago", "Boston", "Dublin"),
    *("Madrid", "Vienna", "Oslo", "Rome", "Lisbon", "Athens", "Prague", "Seattle"),
    *("Denver", "Toronto", "Sydney", "Cairo"),
)
ACTIONS = (
    "eat a sandwich",
    "drink a lemonade",
    "read a newspaper",
    "play the guitar",
    "paint a picture",
    "fly a kite",
    "feed the ducks",
    "ride a bicycle",
    "taste the cheese",
    "write a letter",
)
PLACES = (
    "sit in the old park on a sunny day",
    "watch the boats in the harbor",
    "climb the tower before noon",
    "walk along the river at night",
    "rest under the big oak tree",
    "listen to the church bells",
    "visit the small market",
    "swim in the cold lake",
    "look at the stars from the bridge",
    "stroll through the rose garden",
)
FUNCTION_WORDS = frozenset(
    (
        *("a", "along", "and", "at", "before", "by", "from", "in", "of", "on", "the", "through"),
        *("to", "under"),
    )
)
"""Words of the answers that any sentence may have; they do not count."""


@dataclass(frozen=True)
class Needle(DrawnTask):
    """Kamradt's needle in real text, with a city and a pastime of its own in every case.

    The score is the share of the answer's content words in the first sentence of the
    prediction, so that no model has to judge.
    """

    name: str = "needle"
    max_tokens: int = 32

    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case:
        key = case_key(self.name, tokens, seed, index)
        random = case_random(key)
        city = random.choice(CITIES)
        answer = f"{random.choice(ACTIONS)} and {random.choice(PLACES)}"
        depth = DEPTHS[index % len(DEPTHS)]
        before = "Read the following text. I will ask a question about it afterwards.\n"
        needle = f"The best thing to do in {city} is {answer}."
        text = essay(random, tokens, tokenizer)

        def make(size: int) -> str:
            return before + planted(first_words(text, size), [needle], [depth], " ")

        size = largest(lambda size: len(tokenizer.encode(make(size))) <= tokens, tokens // 2)
        question = f"\nQuestion: What is the best thing to do in {city}?"
        start = f"\nAnswer: The best thing to do in {city} is"
        details: dict[str, Any] = {"tokens": tokens, "seed": seed, "index": index, "depth": depth}
        details["answer_start"] = start
        return Case(
            self.name, key, make(size), question + start, (answer,), self.max_tokens, details
        )

    def score(self, prediction: str, case: Case) -> float:
        """Share of the answer's different content words that the first sentence has."""
        first = re.split(r"[.\n]", prediction.strip(), maxsplit=1)[0]
        said = set(re.findall(r"\w+", first.lower()))
        wanted = set(re.findall(r"\w+", case.answers[0].lower())) - FUNCTION_WORDS
        return len(wanted & said) / len(wanted)
