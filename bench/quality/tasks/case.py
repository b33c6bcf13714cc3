"""One question about one long context, and what every task needs to make and score them.

Pure Python: nothing here needs vLLM, so that other implementations can be asked the same.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, Protocol


class TaskError(ValueError):
    """Cases that cannot be made; the message says why."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the special tokens that begin a prompt."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation as the model was trained to read it."""


@dataclass(frozen=True)
class Case:
    """A prompt in two parts, and the answers.

    Attributes
    ----------
    task : str
        Name of the task that made it.
    key : str
        Stable name of the case: the same task, length, seed and index give the same key and,
        with the same tokenizer and texts, the same case.
    context : str
        What the strict protocol compresses before the question is computed.
    question : str
        The whole rest of the prompt, with the start of the answer where the task has one.
    answers : tuple of str
    max_tokens : int
        Tokens to generate.
    details : dict
        Of the task: ``tokens`` wished, ``depth`` of the needle from 0 to 1, and more. The end of
        the question that already begins the answer, if there is such, is ``answer_start``.
    """

    task: str
    key: str
    context: str
    question: str
    answers: tuple[str, ...]
    max_tokens: int
    details: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Makes cases and scores predictions."""

    @property
    def name(self) -> str:
        """Of the registry, in results and tables."""

    def cases(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> list[Case]:
        """Make cases whose contexts have at most ``tokens`` tokens, and as many as fit."""

    def score(self, prediction: str, case: Case) -> float:
        """Score from 0 to 1."""


class Prompt(NamedTuple):
    """Token ids of a case; their concatenation is the prompt."""

    context: list[int]
    question: list[int]


PLACE = "<<the user's words>>"
"""Where a chat template is split."""


def prompt_ids(case: Case, tokenizer: Tokenizer, chat: bool = False) -> Prompt:
    """Tokenise a case, its two parts apart so that the border between them is exact.

    Parameters
    ----------
    case : Case
    tokenizer : Tokenizer
    chat : bool
        Whether context and question are what a user says in the model's chat template, and the
        start of the answer is the assistant's.

    Returns
    -------
    Prompt
        The context begins with the tokenizer's special tokens, if it has any, or with what the
        template has before a user's words.
    """
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PLACE}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = text.partition(PLACE)
        start = case.details.get("answer_start", "")
        question = case.question.removesuffix(start) + after + start.strip()
        return Prompt(
            tokenizer.encode(before + case.context, add_special_tokens=False),
            tokenizer.encode(question, add_special_tokens=False),
        )
    return Prompt(
        tokenizer.encode(case.context),
        tokenizer.encode(case.question, add_special_tokens=False),
    )


def case_key(task: str, tokens: int, seed: int, index: int) -> str:
    """Stable name of a case."""
    return f"{task}-{tokens}-{seed}-{index}"


def case_random(key: str) -> Random:
    """Random numbers of one case, the same in every process (strings seed by their bytes)."""
    return Random(key)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest size from 0 that fits, if all smaller ones do.

    Parameters
    ----------
    fits : callable
    guess : int
        Where to begin.

    Returns
    -------
    int

    Raises
    ------
    TaskError
        Not even size 0 fits.
    """
    if not fits(0):
        raise TaskError("the wished context is too short for a task's own text.")
    low, step = 0, max(guess, 1)
    while fits(low + step):
        low += step
        step *= 2
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's ``string_match_all``: share of the answers that occur, ignoring case."""
    prediction = _printable(prediction).lower()
    return sum(answer.lower() in prediction for answer in answers) / len(answers)


class DrawnTask(ABC):
    """Base of tasks whose cases are drawn one by one; scored as most of RULER's are."""

    def cases(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> list[Case]:
        """See :class:`Task`."""
        return [self._case(index, tokens, tokenizer, seed) for index in range(count)]

    @abstractmethod
    def _case(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Case: ...

    def score(self, prediction: str, case: Case) -> float:
        """RULER's ``string_match_all``."""
        return match_all(prediction, case.answers)


def match_part(prediction: str, answers: Sequence[str]) -> float:
    """RULER's ``string_match_part``: 1 if any of the answers occurs, ignoring case."""
    prediction = _printable(prediction).lower()
    return float(any(answer.lower() in prediction for answer in answers))


def _printable(prediction: str) -> str:
    """As RULER prepares what it scores: control characters become line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()
