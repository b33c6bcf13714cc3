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

    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Negative cosine to the mean of the unit keys, ``[kv_heads, tokens]``."""
        return self.score_cosines(cosine_to_mean(keys))

    def score_cosines(self, cosines: torch.Tensor) -> torch.Tensor:
        """Scores by cosines to the mean of the unit keys, both ``[..., tokens]``, float32."""
        # Coarser than rounding noise, which is absolute here, so that position decides ties.
        return torch.round(cosines * -4096) / 4096


def cosine_to_mean(keys: torch.Tensor) -> torch.Tensor:
    """Cosine of keys ``[..., tokens, dim]`` to the mean of the unit keys, ``[..., tokens]``."""
    # Products instead of a copy of all keys at unit length.
    inverse = torch.linalg.vecdot(keys, keys).sqrt().clamp_min(1e-12).reciprocal()
    mean = F.normalize(inverse.unsqueeze(-2) @ keys, dim=-1)
    return (mean @ keys.transpose(-2, -1)).squeeze(-2) * inverse
