"""Streaming eviction: keep the sinks and the most recent tokens.

Xiao et al.: "Efficient Streaming Language Models with Attention Sinks", ICLR 2024
(arXiv 2309.17453). A baseline: it never looks at the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.methods.base import Method, ScoreContext


@dataclass(frozen=True)
class Streaming(Method):
    """Keep the most recent tokens."""

    needs_keys: ClassVar[bool] = False

    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Age order, ``[kv_heads, tokens]``: newer is higher."""
        heads, tokens, _ = keys.shape
        order = torch.arange(tokens, dtype=torch.float32, device=keys.device)
        return order.expand(heads, tokens)
