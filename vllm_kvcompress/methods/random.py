"""Random eviction: a seeded baseline that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.methods.base import Method, ScoreContext


@dataclass(frozen=True)
class Random(Method):
    """Keep tokens drawn at random, the same ones for the same seed, layer and position."""

    needs_keys: ClassVar[bool] = False
    same_for_all_layers: ClassVar[bool] = False

    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Uniform numbers, ``[kv_heads, tokens]``, drawn for all heads of the model."""
        heads, tokens, _ = keys.shape
        if context.first_head + heads > context.total_heads:
            raise ValueError(
                f"heads {context.first_head} to {context.first_head + heads - 1} of a model "
                f"with {context.total_heads}"
            )
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + context.layer) * 1_000_003 + context.position
        )
        drawn = torch.rand(context.total_heads, tokens, generator=generator)
        first = context.first_head
        return drawn[first : first + heads].to(keys.device, non_blocking=True)
