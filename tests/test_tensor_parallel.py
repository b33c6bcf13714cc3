"""Two ranks on two cores: each keeps its own heads' choice, as one rank would."""

from __future__ import annotations

import os
from pathlib import Path

import engines
import pytest
from test_engine import make_prompts


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank")
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("method", [pytest.param("knorm", marks=pytest.mark.slow), "random"])
def test_two_ranks(method: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"method": method, "budget": 128, "recent_tokens": 16, "interval": 16}
    prompts = make_prompts(4, seed=20, shortest=200, longest=400)
    with engines.engine(tiny_llama, settings) as engine:
        wanted = engine.generate(prompts, 40)
        (totals,) = engine.llm.collective_rpc("kvcompress_totals")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engines.engine(tiny_llama, settings, tensor_parallel_size=2) as engine:
        found = engine.generate(prompts, 40)
        ranks = engine.llm.collective_rpc("kvcompress_totals")
    for output, other in zip(found, wanted, strict=True):
        engines.assert_same(output, other)
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["compactions"] == totals["compactions"] >= 8
