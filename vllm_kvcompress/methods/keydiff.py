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
        unit = F.normalize(keys, dim=-1)
        anchor = F.normalize(unit.mean(dim=-2, keepdim=True), dim=-1)
        # Coarser than rounding noise, which is absolute here, so that position decides ties.
        return torch.round(torch.linalg.vecdot(unit, anchor) * -4096) / 4096
