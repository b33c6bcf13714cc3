"""Compression without ``serve.py``: vLLM's own commands with ``--additional-config`` alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server import ROOT, environment

CONFIG = json.dumps({"kvcompress": {"method": "knorm", "budget": 128, "interval": 16}})


def run(*arguments: str) -> str:
    """What a vLLM command says, with compression on."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_kvcompress.cli", *arguments, "--additional-config", CONFIG],
        cwd=ROOT,
        env={**environment(), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "layers are compressed, 0 keep every token" in said
    return said


def compactions(said: str) -> int:
    """The last count that the engine logged."""
    found = re.findall(r"kvcompress: knorm compacted .* in (\d+) steps per group", said)
    assert found, said[-4000:]
    return int(found[-1])


def test_bench_latency(smollm: Path) -> None:
    said = run(
        *("bench", "latency", "--model", str(smollm), "--skip-tokenizer-init"),
        *("--disable-detokenize", "--enforce-eager", "--max-model-len", "512"),
        *("--input-len", "300", "--output-len", "40", "--batch-size", "2"),
        *("--num-iters", "1", "--num-iters-warmup", "0", "--shutdown-timeout", "20"),
    )
    assert "Avg latency" in said
    assert compactions(said) > 0


@pytest.mark.slow
def test_bench_throughput(smollm: Path) -> None:
    said = run(
        *("bench", "throughput", "--model", str(smollm), "--enforce-eager"),
        *("--dataset-name", "random", "--random-input-len", "300", "--random-output-len", "40"),
        *("--num-prompts", "4", "--max-model-len", "512", "--shutdown-timeout", "20"),
    )
    assert "Throughput:" in said
    assert compactions(said) > 0
