"""Merging in a running engine: batches, memory, prefix cache, cache types, two ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import engines
import pytest
from crowds import check_together
from test_engine import BLOCK, Stepper, make_prompts

SETTINGS: dict[str, dict[str, Any]] = {
    "merge": {"method": "merge", "budget": 288, "recent_tokens": 16, "interval": 16},
    "merge-none": {
        "method": "merge",
        "pooling": "best",
        "merge_weighting": "none",
        "phase": "during_prefill",
        "budget": 288,
        "recent_tokens": 16,
        "interval": 64,
        "bands": 2,
    },
    "knorm+merge": {"method": "knorm+merge", "budget": 288, "recent_tokens": 16, "interval": 16},
    "knorm+merge-none": {
        "method": "knorm+merge",
        "pooling": "best",
        "merge_weighting": "none",
        "phase": "during_prefill",
        "budget": 288,
        "recent_tokens": 16,
        "interval": 64,
    },
}

every_setting = pytest.mark.parametrize("name", SETTINGS)


@every_setting
def test_batch_independence(name: str, tiny_llama: Path) -> None:
    """24 requests together, preempted and replayed, as each alone."""
    settings = {**SETTINGS[name], "interval": 48}
    pools = [(160, 45 * settings.get("bands", 1))]
    check_together(tiny_llama, settings, make_prompts(24, longest=800), 60, pools)


@pytest.mark.parametrize("name", ["merge", "knorm+merge"])
def test_pages_return(name: str, tiny_llama: Path) -> None:
    """Free blocks rise by what the formula says, though rows keep their length."""
    prompt = make_prompts(1, seed=5, shortest=600, longest=601)[0][:600]
    with engines.engine(tiny_llama, SETTINGS[name], max_model_len=1024) as engine:
        run = Stepper(engine)
        run.add("a", prompt, 80)
        run.step()
        free = engine.pool.get_num_free_blocks()
        run.step()
        # e = (600 - 16) // 32 = 18 blocks, 24 tokens untouched, k = (288 - 24) // 32 = 8.
        assert engine.pool.get_num_free_blocks() == free + 18 - 8
        manager = engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        (row,) = manager.req_to_blocks.values()
        assert len(row) == 19
        assert not any(block.is_null for block in row)
        assert len({block.block_id for block in row}) == 19 - 10
        assert all(block.ref_cnt == row.count(block) for block in row)
        run.finish()
        assert len(engine.plans) > 2
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
        assert all(block.ref_cnt == 0 for block in engine.pool.blocks[1:])


@pytest.mark.parametrize("name", ["merge", "knorm+merge"])
def test_prefix_hits_stay_exact(name: str, tiny_llama: Path) -> None:
    prompts = make_prompts(4, seed=7, shortest=400, longest=600)
    with engines.engine(
        tiny_llama, SETTINGS[name], max_model_len=1024, enable_prefix_caching=False
    ) as engine:
        wanted = [engine.generate([prompt], 40)[0] for prompt in prompts]
    with engines.engine(tiny_llama, SETTINGS[name], max_model_len=1024) as engine:
        for _ in range(2):
            found = engine.generate(prompts + prompts, 40)
            for output, other in zip(found, wanted + wanted, strict=True):
                engines.assert_same(output, other)
        assert all(output.cached_tokens > 0 for output in found)
        longer = prompts[0] + found[0].tokens + [5, 6, 7]
        (continued,) = engine.generate([longer], 8)
        assert continued.cached_tokens <= len(prompts[0]) // BLOCK * BLOCK


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_cache_types(options: dict[str, str], tiny_llama: Path) -> None:
    prompts = make_prompts(4, seed=10, shortest=400, longest=500)
    with engines.engine(tiny_llama, SETTINGS["merge"], max_model_len=1024, **options) as engine:
        alone = [engine.generate([prompt], 40)[0] for prompt in prompts]
        once = len(engine.plans)
        together = engine.generate(prompts, 40)
        assert once >= 8
        compared = [engines.assert_same(*pair, 0.1) for pair in zip(together, alone, strict=True)]
        assert sum(compared) >= 80, "too little was compared"
        assert all(abs(value) < 100 for generation in alone for value in generation.logprobs)


def test_prompt_longer_than_the_pool(tiny_llama: Path) -> None:
    settings = {**SETTINGS["merge-none"], "merge_weighting": "count", "bands": 1, "budget": 384}
    prompts = make_prompts(2, seed=11, shortest=1900, longest=1901)
    with engines.engine(
        tiny_llama, settings, max_model_len=2048, num_gpu_blocks_override=24
    ) as engine:
        small = engine.generate(prompts, 20)
    with engines.engine(tiny_llama, settings, max_model_len=2048) as engine:
        large = engine.generate(prompts, 20)
    for found, wanted in zip(small, large, strict=True):
        engines.assert_same(found, wanted)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank")
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("name", [pytest.param("merge", marks=pytest.mark.slow), "knorm+merge"])
def test_two_ranks(name: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(3, seed=20, shortest=400, longest=500)
    with engines.engine(tiny_llama, SETTINGS[name], max_model_len=1024) as engine:
        wanted = engine.generate(prompts, 40)
        (totals,) = engine.llm.collective_rpc("kvcompress_totals")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engines.engine(
        tiny_llama, SETTINGS[name], max_model_len=1024, tensor_parallel_size=2
    ) as engine:
        found = engine.generate(prompts, 40)
        ranks = engine.llm.collective_rpc("kvcompress_totals")
    for output, other in zip(found, wanted, strict=True):
        engines.assert_same(output, other)
    assert [rank["compactions"] for rank in ranks] == [totals["compactions"]] * 2
