"""What the usual heads keep where others keep more, so that the mean is what was wished for.

Pure arithmetic, for those who compare settings: the check, the benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcompress.heads import hosts
from vllm_kvcompress.settings import Settings


@dataclass(frozen=True)
class Shares:
    """Which shares of the cache's layers hold heads that keep more than the others.

    Attributes
    ----------
    whole, boosted : float
        Share whose pages keep every token, and share whose pages hold boosted heads; together
        less than 1.
    boost : float
        How many times as many tokens these keep.
    """

    whole: float = 0.0
    boosted: float = 0.0
    boost: float = 1.0

    @classmethod
    def of(cls, settings: Settings, num_layers: int, kv_heads: int) -> Shares:
        """Shares of a model's layers; parameters and errors as for :func:`heads.hosts`."""
        apart = hosts(settings, num_layers, kv_heads)
        whole, boosted = len(apart.whole) / num_layers, len(apart.boosted) / num_layers
        return cls(whole, boosted, settings.boost if boosted else 1.0)

    def keep_ratio(self, removed: float) -> float:
        """Share that the other heads keep for a mean over all.

        Parameters
        ----------
        removed : float
            Share removed in the mean over all layers, from 0 to 1.

        Returns
        -------
        float
            Not positive if the whole layers alone hold more than is to be kept.
        """
        others = 1 - self.whole - self.boosted
        kept = 1 - removed - self.whole
        ratio = kept / (others + self.boosted * self.boost)
        if ratio * self.boost <= 1:
            return ratio
        # Boosted heads cannot keep more than every token.
        return (kept - self.boosted) / others


ALIKE = Shares()
"""All heads have the same budget."""
