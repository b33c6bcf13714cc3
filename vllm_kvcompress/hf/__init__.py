"""KV cache compression for transformers, with the methods of the vLLM plugin.

Works on decoder models that call attention through transformers' attention interface with
``attn_implementation="sdpa"``, the default. vLLM is not needed.
"""

from __future__ import annotations

from vllm_kvcompress.hf.attention import register
from vllm_kvcompress.hf.cache import CompressedCache
from vllm_kvcompress.hf.l2 import l2_compress
from vllm_kvcompress.hf.merge import merge_compress
from vllm_kvcompress.hf.rotary import rotation_of

register()

__all__ = ["CompressedCache", "l2_compress", "merge_compress", "rotation_of"]
