"""Checks the shortcuts of this package against kvpress itself. A minute or two.

One prefill for all presses, scores for all shares, and decoding in batches; inside the
environment of ``make reference``:

    .venv-reference/bin/python -m bench.reference.check --model DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

import torch
from kvpress import KVPressTextGenerationPipeline
from transformers import DynamicCache

from bench.reference.decode import greedy
from bench.reference.fixtures import story
from bench.reference.model import load, stop_tokens
from bench.reference.prefill import Prefill
from bench.reference.presses import PRESSES, make_press
from bench.reference.shares import kept_tokens

COUNT = 8


@torch.no_grad()
def main() -> int:
    """Run the command; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.reference.check", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    random = Random(7)
    texts = f"{story(random, 12)} Fritz has the pass key 68021.", " Question: who has it? Answer:"
    context, question = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    ids = {
        "context_ids": torch.tensor([context]),
        "questions_ids": [torch.tensor([question])],
    }
    prefill = Prefill.of(model, context)
    different = 0
    for share in (0.25, 0.75):
        kept = kept_tokens(len(context), share, 16)
        caches, answers = [], []
        for name in PRESSES:
            caches.append(prefill.compressed(make_press(name, len(context), kept)))
            cache = DynamicCache()
            torch.manual_seed(0)
            with make_press(name, len(context), kept)(model):
                model.model(input_ids=ids["context_ids"], past_key_values=cache)
            same = all(
                torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
                for (keys, values), layer in zip(caches[-1], cache.layers, strict=True)
            )
            same &= all(layer.keys.shape[2] == kept for layer in cache.layers)
            torch.manual_seed(0)
            press = make_press(name, len(context), kept)
            answers += pipe._forward(ids, max_new_tokens=COUNT, press=press)
            print(f"{name} {share}: cache {'same' if same else 'DIFFERENT'}")
            different += not same
        batch = greedy(model, caches, question, len(context), COUNT, stop_tokens(model))
        for name, tokens, answer in zip(PRESSES, batch, answers, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            print(f"{name} {share}: {text!r} {'same' if text == answer else answer}")
            different += text != answer
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
