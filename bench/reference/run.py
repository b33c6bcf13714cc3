"""Asks kvpress the cases of a file: runs inside the environment of ``make reference``.

    .venv-reference/bin/python -m bench.reference.run --model DIR --cases FILE --output FILE

A run that was stopped goes on where it was. Cases come in the order of the file; what is
written are rows without scores, which ``python -m bench.reference`` adds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from bench.reference.about import about
from bench.reference.decode import greedy, likelihood
from bench.reference.files import open_at_end, read_lines
from bench.reference.model import load, stop_tokens
from bench.reference.prefill import KeysValues, Prefill
from bench.reference.presses import PRESSES, make_press
from bench.reference.shares import kept_tokens

FULL = "full"
STRICT, AFTER_PROMPT = "strict", "after_prompt"
LANGUAGE = "lm"

Ask = tuple[str, float]
"""A press's name and the share it removes; ``("full", 0.0)`` for the whole cache."""


class Target(NamedTuple):
    """What identifies a row of a model."""

    method: str
    removed: float
    protocol: str
    key: str


@dataclass
class Question:
    """A case under one protocol, with what is computed of it once for all presses.

    Attributes
    ----------
    model : PreTrainedModel
    case : dict
        A line of the file of cases.
    protocol : str
    block_size : int
    seed : int
        Of presses that draw random numbers.
    """

    model: PreTrainedModel
    case: dict[str, Any]
    protocol: str
    block_size: int
    seed: int

    @cached_property
    def compressed_ids(self) -> list[int]:
        """The tokens that are computed exactly and then compressed."""
        if self.protocol == STRICT:
            return self.case["context_ids"]
        return [*self.case["context_ids"], *self.case["question_ids"]]

    @cached_property
    def prefill(self) -> Prefill:
        """These tokens, computed."""
        return Prefill.of(self.model, self.compressed_ids)

    def kept(self, removed: float) -> int:
        """Tokens that stay in each layer."""
        return kept_tokens(len(self.compressed_ids), removed, self.block_size)

    def cache(self, ask: Ask) -> list[KeysValues]:
        """Keys and values that a press leaves."""
        method, removed = ask
        if method == FULL:
            return self.prefill.whole()
        press = make_press(method, self.prefill.tokens, self.kept(removed))
        return self.prefill.compressed(press, self.seed)

    def answers(self, asks: Sequence[Ask], stop: frozenset[int]) -> list[list[int]]:
        """Token ids of the answers to asks that remove the same share."""
        start, count = self.case["question_ids"], self.case["max_tokens"]
        position = len(self.compressed_ids)
        if self.protocol == STRICT:
            caches = [self.cache(ask) for ask in asks]
            return greedy(self.model, caches, start, position, count, stop)
        # The first token comes from the exact prefill, whatever is removed after it.
        first = int(self.model.lm_head(self.prefill.hidden)[0, -1].argmax())
        if first in stop:
            return [[] for _ in asks]
        caches = [self.cache(ask) for ask in asks]
        later = greedy(self.model, caches, [first], position, count - 1, stop)
        return [[first, *tokens] for tokens in later]


def rows(question: Question, asks: Sequence[Ask], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Rows of a question, without what says who was asked what.

    Parameters
    ----------
    question : Question
    asks : sequence of Ask
    tokenizer : PreTrainedTokenizerBase

    Yields
    ------
    dict
    """
    case, stop = question.case, stop_tokens(question.model)
    for share in sorted({removed for _, removed in asks}):
        group = [ask for ask in asks if ask[1] == share]
        kept = question.kept(share) / len(question.compressed_ids)
        if case["task"] == LANGUAGE:
            for ask in group:
                text = case["question_ids"]
                position = len(question.compressed_ids)
                found = likelihood(question.model, question.cache(ask), text, position)
                scores = {"score": found[0], "nll": found[1], "scored_tokens": len(text) - 1}
                yield {"method": ask[0], "removed": share, "kept": kept, "prediction": "", **scores}
            continue
        for ask, answer in zip(group, question.answers(group, stop), strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            yield {"method": ask[0], "removed": share, "kept": kept, "prediction": text}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.reference.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of the model")
    add("--name", help="of the model in the rows (default: its directory's)")
    add("--cases", type=Path, required=True)
    add("--output", type=Path, required=True)
    add("--presses", default=",".join(PRESSES), help="default: %(default)s")
    add("--shares", default="0.25,0.5,0.75,0.9", help="removed (default: %(default)s)")
    add("--protocols", default=f"{STRICT},{AFTER_PROMPT}", help="default: %(default)s")
    add("--block-size", type=int, default=32, help="of our server (default: %(default)s)")
    add("--dtype", default="bfloat16", help="as our evaluation (default: %(default)s)")
    add("--seed", type=int, default=0, help="of presses that draw random numbers")
    add("--minutes", type=float, default=float("inf"), help="stop before a case after so long")
    args = parser.parse_args(argv)
    presses = [name for name in args.presses.split(",") if name]
    if unknown := [name for name in presses if name not in PRESSES]:
        parser.error(f"unknown presses {', '.join(unknown)}; known are {', '.join(PRESSES)}")
    protocols = args.protocols.split(",")
    asks: list[Ask] = [(FULL, 0.0)]
    asks += [(name, float(share)) for share in args.shares.split(",") for name in presses]

    cases = read_lines(args.cases)
    done = {Target(*(row[name] for name in Target._fields)): row for row in read_lines(args.output)}
    settings = {"dtype": args.dtype, "block_size": args.block_size, "seed": args.seed}
    note = args.output.with_suffix(".about.json")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(about() | settings, indent=1) + "\n", encoding="utf-8")
    model, tokenizer = load(args.model, args.dtype)
    end = time.monotonic() + 60 * args.minutes
    with open_at_end(args.output) as file:
        for number, case in enumerate(cases, 1):
            started = time.monotonic()
            if started > end:
                print(f"stopped before {case['key']}, {number} of {len(cases)}", file=sys.stderr)
                break
            for protocol in [name for name in case["protocols"] if name in protocols]:
                targets = {ask: Target(*ask, protocol, case["key"]) for ask in asks}
                found = [done[target] for target in targets.values() if target in done]
                if any(row["prompt"] != case["prompt"] for row in found):
                    parser.error(f"{args.output} has {case['key']} with another prompt")
                left = [ask for ask, target in targets.items() if target not in done]
                if not left:
                    continue
                question = Question(model, case, protocol, args.block_size, args.seed)
                same = {name: case[name] for name in ("task", "key", "prompt", "tokens", "depth")}
                same |= {"model": args.name or args.model.name, "implementation": "kvpress"}
                for row in rows(question, left, tokenizer):
                    file.write(json.dumps({**same, "protocol": protocol, **row}) + "\n")
                file.flush()
                os.fsync(file.fileno())
                took = f"{time.monotonic() - started:.0f} s"
                print(f"{number}/{len(cases)} {case['key']} {protocol}: {took}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
