"""Key-difference eviction: keep the keys least similar to the mean key direction.

Park et al.: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
Inference in Resource-Constrained Environments" (arXiv 2504.15364).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_kvcompress.methods.base import Method, ScoreContext


@dataclass(frozen=True)
class KeyDiff(Method):
    """Keep the tokens whose keys point furthest away from the mean key direction."""

    def score(self, keys: torch.Tensor, context: ScoreContext) -> torch.Tensor:
        """Negative cosine to the mean of the unit keys, ``[kv_heads, tokens]``."""
        # Products instead of a copy of all keys at unit length.
        inverse = torch.linalg.vecdot(keys, keys).sqrt().clamp_min(1e-12).reciprocal()
        mean = F.normalize(inverse.unsqueeze(-2) @ keys, dim=-1)
        cosine = (mean @ keys.transpose(-2, -1)).squeeze(-2) * inverse
        # Coarser than rounding noise, which is absolute here, so that position decides ties.
        return torch.round(cosine * -4096) / 4096
