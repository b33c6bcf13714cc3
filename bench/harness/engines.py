"""Engines in this process, what they are given to do, and how long they take.

Whoever imports this runs engines without processes of their own, unless told otherwise.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

BLOCK_SIZE = 32
MODEL_BYTES = {"auto": 2, "fp8": 1}
"""Bytes of a cached number, by vLLM's name of the cache's type; models run in bfloat16."""


def model_or_bundled(model: str = "") -> str:
    """Directory or name of a model: the bundled one unless another is named."""
    if model:
        return model
    from vllm_kvcompress.bundled import model_directory

    return str(model_directory())


@dataclass(frozen=True)
class Geometry:
    """What the size of a model's KV cache follows from."""

    layers: int
    kv_heads: int
    head_dim: int
    max_tokens: int

    @classmethod
    def of(cls, model: str = "") -> Geometry:
        """Geometry of a model, from its configuration."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(Path(model_or_bundled(model)))
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_tokens=config.max_position_embeddings,
        )

    def block_bytes(self, cache: str = "auto") -> int:
        """Bytes of a block of tokens in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * BLOCK_SIZE * MODEL_BYTES[cache]

    def pool_bytes(self, requests: int, tokens: int, cache: str = "auto") -> int:
        """Bytes of a pool that holds just so many whole requests, and vLLM's null block."""
        return (requests * -(-tokens // BLOCK_SIZE) + 1) * self.block_bytes(cache)


def make_engine(settings: dict[str, Any] | None, kv_bytes: int, **more: Any) -> Any:
    """Start an engine in bfloat16.

    Parameters
    ----------
    settings : dict or None
        Compression; ``None`` for stock vLLM.
    kv_bytes : int
        Size of the pool.
    **more
        Further arguments of vLLM's ``LLM``, or others for those given here; ``model`` is the
        bundled one unless named.
    """
    from vllm import LLM

    arguments: dict[str, Any] = {
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": kv_bytes,
        "max_model_len": 4096,
        "max_num_seqs": 64,
        # Compiled bfloat16 gives wrong text in stock vLLM 0.32 on CPU, at the same speed.
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
        "additional_config": {"kvcompress": settings} if settings else {},
    }
    return LLM(**(arguments | more | {"model": model_or_bundled(more.get("model", ""))}))


def scheduler_of(engine: Any) -> Any:
    """Scheduler of an engine in this process."""
    return engine.llm_engine.engine_core.engine_core.scheduler


def make_prompts(requests: int, tokens: int, seed: int = 0) -> list[Any]:
    """Random token ids, the same for every contender."""
    from vllm.inputs import TokensPrompt

    draw = random.Random(seed)
    return [
        TokensPrompt(prompt_token_ids=[draw.randrange(1000, 40000) for _ in range(tokens)])
        for _ in range(requests)
    ]


def greedy(output_tokens: int) -> Any:
    """Sampling that always gives so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
    )


def run(engine: Any, prompts: list[Any], output_tokens: int) -> float:
    """Seconds for all prompts together."""
    started = time.perf_counter()
    engine.generate(prompts, greedy(output_tokens), use_tqdm=False)
    return time.perf_counter() - started


def timed_steps(engine: Any) -> list[float]:
    """Seconds of an engine's steps from now on; the list grows as they are made."""
    core = engine.llm_engine.engine_core.engine_core
    step = core.step_fn
    took: list[float] = []

    def timed() -> Any:
        started = time.perf_counter()
        try:
            return step()
        finally:
            took.append(time.perf_counter() - started)

    core.step_fn = timed
    return took
