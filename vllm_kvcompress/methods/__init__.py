"""Methods: pure torch, no vLLM. A new eviction method is one file and one line here."""

from __future__ import annotations

from vllm_kvcompress.methods.base import Method, NormMethod, ScoreContext
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.kvdiff import KVDiff
from vllm_kvcompress.methods.pooling import POOLINGS
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.select import select_tokens, take_tokens
from vllm_kvcompress.methods.streaming import Streaming

METHODS: dict[str, type[Method]] = {
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "kvdiff": KVDiff,
    "streaming": Streaming,
    "random": Random,
}

MERGING: dict[str, str | None] = {"merge": None, "knorm+merge": "knorm"}
"""Methods that pool old tokens instead of dropping them, with the eviction method that
chooses the tokens they leave unpooled; ``None`` where all old tokens are pooled."""

__all__ = [
    "MERGING",
    "METHODS",
    "POOLINGS",
    "Method",
    "NormMethod",
    "ScoreContext",
    "select_tokens",
    "take_tokens",
]
