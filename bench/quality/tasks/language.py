"""Language modelling: how a text goes on, given its beginning.

The runner asks for the log-probabilities of the question's own tokens, so nothing is generated
and :meth:`LanguageModelling.score` is not used. ``answers`` is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.quality.tasks.case import Case, DrawnTask, Tokenizer, case_key, case_random, largest
from bench.quality.tasks.texts import prose, source_names

SCORED_TOKENS = 256
"""Tokens of the text after the context that are predicted, about."""


@dataclass(frozen=True)
class LanguageModelling(DrawnTask):
    """Windows of running text: ``context``, and as ``question`` what comes next in the text;
    sources are taken in turn.
    """

    name: str = "lm"
    scored_tokens: int = SCORED_TOKENS

    def score(self, prediction: str, case: Case) -> float:
        """Not from a prediction: accuracy is read from log-probabilities."""
        raise NotImplementedError("lm is scored from the log-probabilities of the text.")

    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case:
        key = case_key(self.name, tokens, seed, index)
        random = case_random(key)
        sources = source_names()
        source = sources[index % len(sources)]
        text = prose(source)
        wanted = 12 * (tokens + self.scored_tokens)  # more than enough characters
        start = random.randrange(max(len(text) - wanted, 1))
        words = text[start : start + wanted].replace("\n", " \n").split(" ")[1:]

        def context(size: int) -> str:
            return " ".join(words[:size])

        def question(size: int, end: int) -> str:
            return " " + " ".join(words[size:end])

        size = largest(
            lambda size: size <= len(words) and len(tokenizer.encode(context(size))) <= tokens,
            tokens // 2,
        )
        more = largest(
            lambda more: (
                size + more <= len(words)
                and len(tokenizer.encode(question(size, size + more), add_special_tokens=False))
                <= self.scored_tokens
            ),
            self.scored_tokens // 2,
        )
        details = {"tokens": tokens, "seed": seed, "index": index, "source": source.split("/")[-1]}
        return Case(self.name, key, context(size), question(size, size + more), (), 1, details)
