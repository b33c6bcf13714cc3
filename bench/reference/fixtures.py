"""What kvpress keeps, for tests: runs inside the environment of ``make reference``.

    .venv-reference/bin/python -m bench.reference.fixtures --model DIR tests/fixtures/reference

Writes ``random.npz`` (small random keys, and the sets and scores of kvpress on them) and
``model.npz`` (the sets kept of a text by every layer and head of a model, as bits). Then
``answers.json``: passkey prompts and the answers of kvpress's own pipeline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kvpress import KVPressTextGenerationPipeline, ScorerPress
from transformers import PreTrainedModel

from bench.reference.model import load
from bench.reference.prefill import Prefill
from bench.reference.presses import make_press
from bench.reference.shares import kept_tokens

PRESSES = ("KnormPress", "KeyDiffPress")
SHARES = (0.25, 0.5, 0.75, 0.9)
HEADS, TOKENS, HEAD_DIM = 3, 200, 16
NAMES = ("Ada", "Bela", "Carl", "Dora", "Emil", "Fritz", "Gerda", "Hugo", "Ida", "Jana", "Lena")
THINGS = ("a lamp", "two chairs", "an old map", "some bread", "a blue door", "a kettle")


def story(random: Random, sentences: int) -> str:
    """Sentences of our own, with names that come again, as in a text."""
    return " ".join(
        f"{random.choice(NAMES)} gave {random.choice(THINGS)} to {random.choice(NAMES)} "
        f"on day {random.randint(1, 99)}."
        for _ in range(sentences)
    )


def kept(press: ScorerPress, layer: Sequence[Any]) -> torch.Tensor:
    """The tokens that a press keeps of a layer, ``[kv_heads, kept]``, ascending.

    Values that say their own position tell which they were.
    """
    module, hidden_states, keys, _, attentions, kwargs = layer
    positions = torch.arange(keys.shape[2], dtype=torch.float32)[:, None].expand_as(keys)
    _, left = press.compress(module, hidden_states, keys, positions, attentions, kwargs)
    return left[0, :, :, 0].long().sort(-1).values


def as_bits(kept_sets: torch.Tensor, tokens: int) -> np.ndarray:
    """``[..., tokens]`` marks of the kept ones, eight to a byte."""
    marks = torch.zeros(*kept_sets.shape[:-1], tokens, dtype=torch.bool)
    return np.packbits(marks.scatter(-1, kept_sets, True).numpy(), axis=-1)


def of_random_keys() -> dict[str, np.ndarray]:
    """Keys of a common direction and different lengths, and what is kept of them."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, HEADS, TOKENS, HEAD_DIM, generator=generator) + 0.5
    keys *= torch.rand(1, HEADS, TOKENS, 1, generator=generator) + 0.5
    layer: tuple[Any, ...] = (SimpleNamespace(head_dim=HEAD_DIM), None, keys, None, None, {})
    found = {"keys": keys[0].numpy()}
    for name in PRESSES:
        press = make_press(name, TOKENS, 1)
        found[f"{name}-scores"] = press.score(layer[0], None, keys, keys, None, {})[0].numpy()
        for share in SHARES:
            press = make_press(name, TOKENS, kept_tokens(TOKENS, share, 1))
            found[f"{name}-{share}"] = as_bits(kept(press, layer), TOKENS)
    return found


def of_model(model: PreTrainedModel, tokenizer: Any) -> dict[str, np.ndarray]:
    """Sets kept of a text, ``[layers, kv_heads, tokens / 8]``."""
    ids = tokenizer.encode(story(Random(1), 20), add_special_tokens=False)
    prefill = Prefill.of(model, ids)
    found = {"token_ids": np.array(ids, dtype=np.int32)}
    for name in PRESSES:
        for share in SHARES:
            press = make_press(name, len(ids), kept_tokens(len(ids), share, 1))
            sets = torch.stack([kept(press, layer) for layer in prefill.layers])
            found[f"{name}-{share}"] = as_bits(sets, len(ids))
    return found


def of_answers(model: PreTrainedModel, tokenizer: Any) -> list[dict[str, Any]]:
    """Passkey cases, each with the answers of kvpress's pipeline by press and share."""
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    found = []
    for case in range(3):
        random = Random(case)
        secret = random.randint(10000, 99999)
        before, after = story(random, 6 * case), story(random, 12 - 6 * case)
        needle = f"The pass key is {secret}. Remember it. {secret} is the pass key."
        texts = f"{before}\n{needle}\n{after}", "\nWhat is the pass key? The pass key is"
        context, question = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        answers = {}
        for name in PRESSES:
            for share in SHARES:
                tensors = {
                    "context_ids": torch.tensor([context]),
                    "questions_ids": [torch.tensor([question])],
                }
                press = make_press(name, len(context), kept_tokens(len(context), share, 1))
                with torch.no_grad():
                    (text,) = pipe._forward(tensors, max_new_tokens=8, press=press)
                answers[f"{name}-{share}"] = text
        ids = {"context_ids": context, "question_ids": question}
        found.append({**ids, "secret": str(secret), "answers": answers})
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reference.fixtures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.directory / "random.npz", allow_pickle=False, **of_random_keys())
    model, tokenizer = load(args.model)
    np.savez_compressed(
        args.directory / "model.npz", allow_pickle=False, **of_model(model, tokenizer)
    )
    answers = json.dumps(of_answers(model, tokenizer), separators=(",", ":"))
    (args.directory / "answers.json").write_text(answers + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
