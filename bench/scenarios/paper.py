"""Memory and concurrency of large models by arithmetic, without looking at any scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GPU_BYTES = 80e9
UTILIZATION = 0.9
"""Setting ``gpu_memory_utilization``; vLLM 0.32 defaults to 0.92."""

OVERHEAD_BYTES = 3e9
"""Assumed per GPU for activations, CUDA graphs and buffers; vLLM measures it at start-up."""

BLOCK_SIZE = 16
TOKENS_PER_STEP = 8192
MAX_REQUESTS = 2048
"""High enough not to be the limit."""

INTERVAL = 128


@dataclass(frozen=True)
class Large:
    """A model, with the sizes that decide its memory.

    Attributes
    ----------
    parameters : float
        All in bfloat16.
    layers, kv_heads, head_size : int
    """

    parameters: float
    layers: int
    kv_heads: int
    head_size: int = 128

    def kv_bytes(self, tensor_parallel: int) -> int:
        """KV memory of one GPU."""
        weights = 2 * self.parameters / tensor_parallel
        return int(UTILIZATION * GPU_BYTES - weights - OVERHEAD_BYTES)

    def token_bytes(self, tensor_parallel: int) -> int:
        """Bytes of one token in all layers, on one GPU."""
        heads = max(1, self.kv_heads // tensor_parallel)
        return 2 * 2 * self.layers * heads * self.head_size


def draw(prompt: int, output: int, requests: int) -> Iterator[tuple[int, int]]:
    """Prompt and output lengths, the same in every run."""
    import numpy as np

    random = np.random.default_rng(0)
    for _ in range(requests):
        yield (
            int(random.integers(prompt // 2, prompt + prompt // 2, endpoint=True)),
            int(random.integers(output // 2, output + output // 2, endpoint=True)),
        )


def on_paper(
    lengths: Sequence[tuple[int, int]], pool: int, budget: int | None
) -> dict[str, float | str]:
    """Requests that run at once, without looking at any scheduler.

    Parameters
    ----------
    lengths : sequence of (int, int)
        Prompt and output tokens of the requests.
    pool : int
        Tokens that the cache has room for.
    budget : int or None
        ``None`` for stock vLLM.
    """
    outputs = sum(output for _, output in lengths)
    held = sum(output * mean_held(prompt, output, budget) for prompt, output in lengths) / outputs
    # A step feeds every request with a token, and with prompts as many as end with it.
    prompts = sum(prompt for prompt, _ in lengths)
    limits = {
        "memory": pool / held,
        "tokens per step": TOKENS_PER_STEP / (1 + prompts / outputs),
        "max_num_seqs": float(MAX_REQUESTS),
    }
    limit = min(limits, key=lambda name: limits[name])
    return {"tokens_held": held, "concurrency": limits[limit], "limit": limit}


def mean_held(prompt: int, output: int, budget: int | None) -> float:
    """Tokens' worth of blocks that a request holds on average while it decodes."""
    rounding = BLOCK_SIZE / 2
    if budget is None or prompt + output <= budget:
        return prompt + output / 2 + rounding
    # The first grid position past the budget; from there between budget and budget + interval.
    first = max(0, -(-(budget + 1 - prompt) // INTERVAL)) * INTERVAL
    whole = min(first, output)
    later = output - whole
    mean = whole * (prompt + whole / 2 + rounding) + later * (budget + INTERVAL / 2)
    return mean / output
