"""Result rows: one JSON object a line, one line per case, method and share removed.

Any implementation can write them; :mod:`bench.quality.report` reads any number of files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

OURS = "vllm-kvcompress"
FULL = "full"
"""Method of the rows without compression; their ``removed`` is 0."""

STRICT, AFTER_PROMPT, DURING = "strict", "after_prompt", "during_prefill"
PROTOCOLS = (STRICT, AFTER_PROMPT, DURING)


class RowsError(ValueError):
    """Rows that cannot be read or compared; the message says which and why."""


class RowKey(NamedTuple):
    """What identifies a row: a run that is resumed skips the rows it already has."""

    model: str
    implementation: str
    variant: str
    method: str
    removed: float
    protocol: str
    key: str


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes
    ----------
    task : str
        Name of the task.
    key : str
        The case's.
    model : str
        Name of the model, without directories.
    implementation : str
        ``vllm-kvcompress`` or ``kvpress``.
    method : str
        Its method's name there; ``full`` is the whole cache.
    removed : float
        Share of the tokens removed, from 0 to 1: of the context (strict) or of the prompt.
    protocol : str
        ``strict``: the context is compressed before the question is computed. ``after_prompt``:
        the question is part of what is computed exactly and then compressed, which flatters.
        ``during_prefill``: compressed again and again while it is computed (``lm`` only).
    score : float
        From 0 to 1; for ``lm`` the share of tokens that the model would have predicted.
    prediction : str
        What was generated.
    prompt : str
        `prompt_digest` of the token ids, so that rows can be seen to answer the same prompt.
    tokens : int
        Wished length of the context.
    depth : float or None
        Of a single needle, from 0 to 1.
    nll : float or None
        For ``lm``: mean negative log-likelihood of a token, in nats.
    scored_tokens : int or None
        For ``lm``: tokens that `score` and `nll` are means of.
    kept : float or None
        Share of what `removed` is of that really stayed, mean over the layers: whole blocks
        are freed, and some tokens are never removed.
    variant : str
        Name for settings of the server that are not its defaults, such as ``no-sinks``.
    whole : float or None
        Share of the layers that kept every token; None if all were compressed.
    boosted : float or None
        Share of the layers that hold heads with a larger budget; None without.
    boost : float or None
        How many times as many tokens these keep.
    """

    task: str
    key: str
    model: str
    implementation: str
    method: str
    removed: float
    protocol: str
    score: float
    prediction: str
    prompt: str
    tokens: int
    depth: float | None = None
    nll: float | None = None
    scored_tokens: int | None = None
    kept: float | None = None
    variant: str = ""
    whole: float | None = None
    boosted: float | None = None
    boost: float | None = None

    @property
    def row_key(self) -> RowKey:
        """What identifies it."""
        return RowKey(
            self.model,
            self.implementation,
            self.variant,
            self.method,
            self.removed,
            self.protocol,
            self.key,
        )

    def line(self) -> str:
        """As one line of JSON, without what is not set."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        return json.dumps({**values, "prediction": self.prediction})


def prompt_digest(token_ids: Sequence[int]) -> str:
    """Sixteen hexadecimal digits that stand for a prompt."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]


def read_rows(files: Iterable[Path]) -> Iterator[Row]:
    """Rows of files in order.

    Parameters
    ----------
    files : iterable of Path

    Yields
    ------
    Row
        A last line that was cut off (the run was killed) is left out.

    Raises
    ------
    RowsError
        A line that is no row, with its file and number.
    """
    known = {item.name for item in fields(Row)}
    for file in files:
        # Not splitlines(): JSON may have other line separators inside its strings.
        *whole, last = file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate([*whole, last], 1):
            if not line.strip():
                continue
            try:
                values: dict[str, Any] = json.loads(line)
                row = Row(**{name: value for name, value in values.items() if name in known})
            except (TypeError, ValueError, AttributeError) as error:
                if number > len(whole):
                    continue
                raise RowsError(f"{file}, line {number} is no result row: {error}") from error
            if row.protocol not in PROTOCOLS:
                raise RowsError(
                    f"{file}, line {number}: protocol={row.protocol} is not known; known are "
                    f"{', '.join(PROTOCOLS)}."
                )
            yield row
