"""Key-norm eviction: keep the keys with the lowest L2 norm.

Devoto, Zhao, Scardapane, Minervini: "A Simple and Effective L2 Norm-Based Strategy for
KV Cache Compression", EMNLP 2024 (arXiv 2406.11430).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvcompress.methods.base import Method, ScoreContext, settle_near_ties


@dataclass(frozen=True)
class KNorm(Method):
    """Keep the tokens whose keys have the lowest L2 norm, which draw the attention."""

    def score(self, keys: torch.Tensor, context: ScoreContext) -> torch.Tensor:
        """Negative squared key norm, ``[kv_heads, tokens]`` (same order as the norm)."""
        return settle_near_ties(-torch.linalg.vecdot(keys, keys))
