"""Key-norm eviction: keep the keys with the lowest L2 norm.

Devoto, Zhao, Scardapane, Minervini: "A Simple and Effective L2 Norm-Based Strategy for
KV Cache Compression", EMNLP 2024 (arXiv 2406.11430).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvcompress.methods.base import NormMethod, settle_near_ties


@dataclass(frozen=True)
class KNorm(NormMethod):
    """Keep the tokens whose keys have the lowest L2 norm, which draw the attention."""

    def score_norms(self, squared_norms: torch.Tensor) -> torch.Tensor:
        """Negative squared norms, which have the order of negative norms."""
        return settle_near_ties(-squared_norms)
