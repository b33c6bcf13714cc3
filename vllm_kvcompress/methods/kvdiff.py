"""Keys unlike the others and values that are long: both are needed for a token to matter.

Attention adds up values weighted by how well keys match. KeyDiff (arXiv 2504.15364) keeps the
keys that stand out and may be matched; a token with a short value adds next to nothing even
then, and a long value changes the output. This method adds both, each in standard deviations,
so that neither depends on the scale of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.methods.base import Method, ScoreContext
from vllm_kvcompress.methods.keydiff import cosine_to_mean


@dataclass(frozen=True)
class KVDiff(Method):
    """Keep keys that point away from the mean direction and values with a high norm."""

    needs_values: ClassVar[bool] = True

    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Standardised value norm minus standardised cosine, ``[kv_heads, tokens]``."""
        if values is None:
            raise ValueError("kvdiff scores keys and values, but got no values.")
        return self.score_parts(cosine_to_mean(keys), torch.linalg.vecdot(values, values))

    def score_parts(self, cosines: torch.Tensor, squared_norms: torch.Tensor) -> torch.Tensor:
        """Scores by cosines to the mean of the unit keys and squared L2 norms of values.

        All ``[..., tokens]``, float32.
        """
        scores = standardised(squared_norms.sqrt()) - standardised(cosines)
        # As in KeyDiff: coarser than rounding noise, so that position decides ties.
        return torch.round(scores * 4096) / 4096


def standardised(numbers: torch.Tensor) -> torch.Tensor:
    """Distance from the mean in standard deviations, along the last axis; 0 if all are equal."""
    apart = numbers - numbers.mean(-1, keepdim=True)
    deviation = apart.square().mean(-1, keepdim=True).sqrt()
    # Rounding noise alone must not be blown up to a standard deviation.
    return apart / deviation.clamp_min(1e-6) * (deviation > 1e-5)
