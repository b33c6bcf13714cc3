"""Compress the KV cache of a transformers model, by a call and by itself.

Runs on CPU with the bundled model: ``python examples/hf_quickstart.py [MODEL]``.
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_kvcompress.bundled import model_directory
from vllm_kvcompress.hf import CompressedCache, l2_compress, merge_compress

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
PASSKEY = "The pass key is 68305. Remember it. 68305 is the pass key. "
QUESTION = "\nWhat is the pass key? The pass key is"


def main() -> None:
    """Ask for a pass key, with the full cache and with compressed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="name or directory (default: the bundled model)")
    name = parser.parse_args().model or model_directory()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    context = tokenizer(FILLER * 8 + PASSKEY + FILLER * 12, return_tensors="pt")
    question = tokenizer(QUESTION, return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([context.input_ids, question.input_ids], dim=1)

    def answer(cache: DynamicCache | CompressedCache) -> str:
        output = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(output[0, ids.shape[1] :])

    # By a call: read the context once, compress what was cached, then ask.
    with torch.no_grad():
        full = model(**context, past_key_values=DynamicCache(config=model.config)).past_key_values
    before = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    print(f"{context.input_ids.shape[1]} tokens of context, full cache: {before / 2**20:.2f} MiB")
    caches = {
        "l2_compress, keep_ratio 0.5": l2_compress(full, keep_ratio=0.5, prune_after=0),
        # Merging keeps something of every token, but blurs old ones: digits suffer first.
        "merge_compress, window 203": merge_compress(full, 203, rope=model),
    }
    print(f"  full cache: {answer(copy.deepcopy(full))!r}")
    for label, cache in caches.items():
        print(f"  {label}: {before / 2**20:.2f} -> {cache.nbytes / 2**20:.2f} MiB", end=", ")
        print(repr(answer(cache)))

    # By itself, while generating: exact prompt, compressed at its end and as it grows.
    cache = CompressedCache({"method": "knorm", "budget": 160, "interval": 32})
    text = answer(cache)
    print(
        f"  CompressedCache, budget 160: {cache.full_nbytes / 2**20:.2f} -> "
        f"{cache.nbytes / 2**20:.2f} MiB, {text!r}"
    )


if __name__ == "__main__":
    main()
