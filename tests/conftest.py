"""Models shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import pytest
import torch


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads of 64."""
    from vllm_kvcompress.bundled import model_directory

    return model_directory()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 4 layers and 4 KV heads, quick and with distinct outputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
