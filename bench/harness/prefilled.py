"""Engines that do not compute prompts, for measuring what comes after them."""

from __future__ import annotations

from typing import Any

import torch

RANDOM_BYTES = 0x70
"""Bytes below this are finite numbers in both 8-bit types."""


def runner_of(engine: Any) -> Any:
    """Model runner of an engine whose worker is in this process."""
    return (
        engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    )


def prefilled(engine: Any, batch: int) -> None:
    """Fill all pages with random numbers, and skip steps that compute prompts from now on.

    Such a step schedules, allocates, compacts and samples as always, only the model's own
    computation is left out: it gives zeros and writes no pages. Steps of single tokens are
    computed. Attention takes as long on random keys as on others.

    Parameters
    ----------
    engine : LLM
    batch : int
        Most requests at once: a step of more tokens than this has a prompt in it.
    """
    runner = runner_of(engine)
    generator = torch.Generator().manual_seed(0)
    for cache in runner.kv_caches:
        if cache.dtype in (torch.float32, torch.bfloat16, torch.float16):
            cache.normal_(generator=generator)
        else:
            cache.view(torch.uint8).random_(0, RANDOM_BYTES, generator=generator)
    model, config = runner.model, runner.model_config
    forward, hidden = model.forward, config.get_hidden_size()

    def decode_only(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(input_ids) > batch:
            return torch.zeros(len(input_ids), hidden, dtype=config.dtype)
        return forward(input_ids, *args, **kwargs)

    model.forward = decode_only
