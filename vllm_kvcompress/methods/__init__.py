"""Eviction methods: pure torch, no vLLM. A new method is one file and one line here."""

from __future__ import annotations

from vllm_kvcompress.methods.base import Method, ScoreContext
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.select import select_tokens
from vllm_kvcompress.methods.streaming import Streaming

METHODS: dict[str, type[Method]] = {
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "streaming": Streaming,
    "random": Random,
}

__all__ = ["METHODS", "Method", "ScoreContext", "select_tokens"]
