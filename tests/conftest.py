# ruff: noqa: E402 (what torch and vLLM read when they are imported comes before them)
"""Models shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

ALL_CORES = os.sched_getaffinity(0)

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # In-process engines of two workers would bind to the same core and spin there.
    cores = sorted(ALL_CORES)
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Let a test and what it starts run anywhere, not only on the core of its worker."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    yield
    os.sched_setaffinity(0, own)


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
