"""Random eviction: a seeded baseline that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_kvcompress.methods.base import Method, ScoreContext

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
"""2**32 over the golden ratio: multiples of it are far apart."""


@dataclass(frozen=True)
class Random(Method):
    """Keep tokens drawn at random, the same ones for the same seed, layer and position.

    A token's number is a hash of where it is (the finalizer of MurmurHash3), so that every
    device draws the same one and none has to draw those of other heads.
    """

    needs_keys: ClassVar[bool] = False
    same_for_all_layers: ClassVar[bool] = False

    def score(
        self, keys: torch.Tensor, context: ScoreContext, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Uniform numbers, ``[kv_heads, tokens]``."""
        heads, tokens, _ = keys.shape
        own = torch.tensor(self.keys_of_heads(context, heads)).to(keys.device, non_blocking=True)
        tokens_apart = torch.arange(tokens, device=keys.device) * GOLDEN & WORD
        return (_mixed(tokens_apart ^ own[:, None]) >> 8).float() / (1 << 24)

    def keys_of_heads(self, context: ScoreContext, heads: int) -> list[int]:
        """What the numbers of each head are drawn with, below 2**32."""
        if context.first_head + heads > context.total_heads:
            raise ValueError(
                f"heads {context.first_head} to {context.first_head + heads - 1} of a model "
                f"with {context.total_heads}"
            )
        key = 0
        for word in (self.seed, self.seed >> 32, context.layer, context.position):
            key = _mixed(key + GOLDEN + word)
        return [_mixed(key + GOLDEN + context.first_head + head) for head in range(heads)]


def _mixed(word: Any) -> Any:
    """A hash of 32 bits, of an integer or of each of a tensor."""
    word = word & WORD
    word = (word ^ word >> 16) * 0x85EBCA6B & WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & WORD
    return word ^ word >> 16
