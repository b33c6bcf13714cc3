"""Whether compression suits a model: ``python -m vllm_kvcompress.check MODEL``. No vLLM."""

from __future__ import annotations

from vllm_kvcompress.check.findings import Findings, Loss
from vllm_kvcompress.check.recommend import Advice, advise

__all__ = ["Advice", "Findings", "Loss", "advise"]
