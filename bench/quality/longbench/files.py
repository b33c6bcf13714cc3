"""LongBench's JSONL files as tasks.

A directory has one file per set (``qasper.jsonl``), each line with ``input``, ``context``,
``answers``, ``all_classes`` and ``_id``, as LongBench hands them out. Its prompts and answer
lengths are read from ``dataset2prompt.json`` and ``dataset2maxlen.json`` beside them, which
LongBench has in ``config/``; without these files `PLAIN_PROMPT` is used, and the numbers are
not LongBench's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.longbench.metrics import CHINESE, METRICS, score
from bench.quality.tasks.case import Case, TaskError, Tokenizer, case_random

PREFIX = "longbench/"
PLAIN_PROMPT = "Read the following text.\n\n{context}\n\n{input}\nAnswer:"
PLAIN_MAX_TOKENS = 64


class LongBenchError(TaskError):
    """A directory or a file that cannot be used; the message says why."""


@dataclass(frozen=True)
class LongBenchTask:
    """One set of LongBench.

    Attributes
    ----------
    file : Path
    prompt : str
        With ``{context}`` once and ``{input}`` at most once, after it.
    max_tokens : int
        Tokens to generate.
    """

    file: Path
    prompt: str = PLAIN_PROMPT
    max_tokens: int = PLAIN_MAX_TOKENS

    @property
    def dataset(self) -> str:
        """Name of the set."""
        return self.file.stem

    @property
    def name(self) -> str:
        """Of the registry."""
        return PREFIX + self.dataset

    def cases(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> list[Case]:
        """Make cases of a random choice of the lines; too long contexts lose their middle.

        Parameters
        ----------
        count : int
            Cases wanted; fewer if the file has fewer lines.
        tokens : int
            Most tokens of a context.
        tokenizer : Tokenizer
        seed : int

        Returns
        -------
        list of Case
        """
        lines = self._lines()
        chosen = case_random(f"{self.name}-{seed}").sample(range(len(lines)), len(lines))
        return [
            self._case(lines[index], index, tokens, tokenizer, seed) for index in chosen[:count]
        ]

    def score(self, prediction: str, case: Case) -> float:
        """The set's metric, against the best answer."""
        return score(self.dataset, prediction, case.answers, case.details["classes"])

    def _lines(self) -> list[dict[str, Any]]:
        found = []
        with self.file.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                    missing = {"input", "context", "answers"} - values.keys()
                except (ValueError, AttributeError) as error:
                    raise LongBenchError(f"{self.file}, line {number}: {error}") from error
                if missing:
                    raise LongBenchError(
                        f"{self.file}, line {number} lacks {', '.join(sorted(missing))}."
                    )
                found.append(values)
        return found

    def _case(
        self, line: dict[str, Any], index: int, tokens: int, tokenizer: Tokenizer, seed: int
    ) -> Case:
        before, _, after = self.prompt.partition("{context}")
        name = line.get("_id") or index
        return Case(
            task=self.name,
            key=f"{self.name}-{tokens}-{seed}-{name}",
            context=_without_middle(before + line["context"], tokens, tokenizer),
            question=after.replace("{input}", line["input"]),
            answers=tuple(line["answers"]),
            max_tokens=self.max_tokens,
            details={
                "tokens": tokens,
                "seed": seed,
                "index": index,
                "classes": tuple(line.get("all_classes") or ()),
            },
        )


def _without_middle(text: str, tokens: int, tokenizer: Tokenizer) -> str:
    """A text that has at most so many tokens, its middle left out if needed."""
    size = len(tokenizer.encode(text))
    while size > tokens:
        # Characters in proportion, a little less each time; cutting tokens could split letters.
        half = int(len(text) * tokens / size * 0.99) // 2
        text = text[:half] + text[len(text) - half :]
        size = len(tokenizer.encode(text))
    return text


def longbench_tasks(directory: Path, datasets: Sequence[str] = ()) -> dict[str, LongBenchTask]:
    """The sets in a directory.

    Parameters
    ----------
    directory : Path
    datasets : sequence of str
        Names wanted; by default all English ones that are there.

    Returns
    -------
    dict
        Tasks by name.

    Raises
    ------
    LongBenchError
        No set is there, or one that is wanted is not there or is Chinese.
    """
    prompts, lengths = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (directory / "dataset2prompt.json", directory / "dataset2maxlen.json")
    )
    there = {file.stem: file for file in sorted(directory.glob("*.jsonl"))}
    for name in datasets:
        if name.removesuffix("_e") in CHINESE:
            raise LongBenchError(f"{name} is Chinese; only LongBench's English sets are scored.")
        if name not in there or name.removesuffix("_e") not in METRICS:
            raise LongBenchError(
                f"{name} is not in {directory}; there are {', '.join(there) or 'no files'}."
            )
    wanted = datasets or [name for name in there if name.removesuffix("_e") in METRICS]
    if not wanted:
        raise LongBenchError(f"{directory} has no JSONL file named after one of LongBench's sets.")
    found = {}
    for name in wanted:
        base = name.removesuffix("_e")
        task = LongBenchTask(
            there[name], prompts.get(base, PLAIN_PROMPT), lengths.get(base, PLAIN_MAX_TOKENS)
        )
        found[task.name] = task
    return found
