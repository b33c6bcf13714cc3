"""The KV cache spec of compressible layers: one per band, so that bands become groups."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_kvcompress.limits import Limits
from vllm_kvcompress.scheduler.schedule import Schedule
from vllm_kvcompress.scheduler.trajectory import peak_tokens
from vllm_kvcompress.settings import Phase


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention over a compressed cache.

    vLLM groups layers whose specs merge, so specs of different bands must not.

    Attributes
    ----------
    band : int
        Index of the band; -1 for layers that keep every token.
    limits : Limits or None
        ``None`` for layers that keep every token.
    phase, interval, prune_after
        As in the settings; they decide the peak of a request.
    largest : Limits or None
        Limits with the largest budget that a request may ask for, where that is not the
        server's own.
    """

    band: int
    limits: Limits | None
    phase: Phase
    interval: int
    prune_after: int
    largest: Limits | None = None

    @classmethod
    def from_full(cls, spec: FullAttentionSpec, **added: object) -> CompressedAttentionSpec:
        """Rebuild a plain spec of vLLM as one of ours."""
        kept = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**kept, **added)  # type: ignore[arg-type]

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Accept only equal specs: a band never shares a group with another."""
        assert all(spec == specs[0] for spec in specs[1:]), "bands cannot share a group"
        return copy.deepcopy(specs[0])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers are of this very band."""
        return all(spec == self for spec in kv_cache_specs.values())

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes per layer for the longest request, at the most, on its way to that length."""
        tokens = vllm_config.model_config.max_model_len
        if self.limits is not None and self.phase == "during_prefill":
            schedule = Schedule(
                method="",
                phase=self.phase,
                interval=self.interval,
                prune_after=self.prune_after,
                limits=(self.limits,),
                block_size=self.block_size,
                max_position=tokens,
            )
            largest = self.largest or self.limits
            tokens = max(peak_tokens(schedule, own, tokens) for own in (self.limits, largest))
        return cdiv(tokens, self.block_size) * self.page_size_bytes


def band_of(spec: object) -> int:
    """Band of a KV cache spec, -1 if its layers keep every token."""
    return spec.band if isinstance(spec, CompressedAttentionSpec) else -1
