"""Compression in a running engine: batches, memory, prefix cache, preemption, aborts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import engines
import pytest
from crowds import check_together
from vllm.inputs import TokensPrompt

BLOCK = 32
VOCABULARY = 512

PHASES: dict[str, dict[str, Any]] = {
    "after_prefill": {"budget": 128, "recent_tokens": 16, "interval": 16},
    "during_prefill": {
        "budget": 128,
        "recent_tokens": 16,
        "recent_ratio": 0.5,
        "interval": 48,
        "phase": "during_prefill",
        "bands": 2,
        "pyramid_beta": 1.5,
        "sink_tokens": 2,
    },
    "decode": {"budget": 64, "recent_tokens": 1, "interval": 16, "phase": "decode"},
}


def make_prompts(count: int, seed: int = 0, shortest: int = 60, longest: int = 500) -> list:
    """Random prompts, every fourth of which starts with the same 96 tokens."""
    draw = random.Random(seed)
    prefix = [draw.randrange(VOCABULARY) for _ in range(96)]
    return [
        (prefix if index % 4 == 0 else [])
        + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(shortest, longest))]
        for index in range(count)
    ]


@pytest.mark.parametrize("phase", PHASES)
def test_batch_independence(phase: str, tiny_llama: Path) -> None:
    """40 requests together, preempted and replayed, in chunks of any size, as each alone."""
    settings = PHASES[phase]
    decoded = 100 if phase == "decode" else 40
    pools = ((160, 48 * settings.get("bands", 1)), (1024, None))
    check_together(tiny_llama, settings, make_prompts(40), decoded, pools)


def test_identity_below_the_threshold(smollm: Path) -> None:
    """Requests that never reach their trigger get stock vLLM's tokens."""
    draw = random.Random(3)
    prompts = [[draw.randrange(1000, 40000) for _ in range(5 + 3 * i)] for i in range(20)]
    with engines.engine(smollm) as engine:
        wanted = engine.generate(prompts, 24)
    for settings in ({"budget": 256}, {"budget": 256, "bands": 6, "phase": "during_prefill"}):
        with engines.engine(smollm, settings) as engine:
            found = engine.generate(prompts, 24)
            assert not engine.plans
        assert [g.tokens for g in found] == [g.tokens for g in wanted]
        for generation, stock in zip(found, wanted, strict=True):
            assert generation.logprobs == pytest.approx(stock.logprobs, abs=1e-5)


def test_method_none_is_stock(tiny_llama: Path) -> None:
    options = {"additional_config": {"kvcompress": {"method": "none"}}}
    with engines.engine(tiny_llama, **options) as engine:
        assert type(engine.scheduler).__module__.startswith("vllm.")
        assert not hasattr(engine.runner, "kvcompress")


class Stepper:
    """Runs an engine step by step, to look at the pool in between."""

    def __init__(self, engine: engines.Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.engine.llm.llm_engine.add_request(
            name, TokensPrompt(prompt_token_ids=prompt), self.engine.params(max_tokens)
        )

    def step(self) -> None:
        for output in self.engine.llm.llm_engine.step():
            self.outputs[output.request_id] = list(output.outputs[0].token_ids)

    def finish(self) -> None:
        while self.engine.llm.llm_engine.has_unfinished_requests():
            self.step()


def test_pages_return_and_are_used(tiny_llama: Path) -> None:
    """Free blocks rise by what the formula says, and another request takes them."""
    settings = {"budget": 128, "recent_tokens": 16, "interval": 64}
    with engines.engine(
        tiny_llama, settings, max_model_len=640, num_gpu_blocks_override=1 + 20 + 8
    ) as engine:
        run = Stepper(engine)
        first, second = make_prompts(2, seed=5, shortest=600, longest=601)
        first, second = first[:600], second[:600]
        run.add("first", first, 30)
        run.step()
        free = engine.pool.get_num_free_blocks()
        assert free == 28 - 19
        run.step()
        # e = (600 - 16) // 32 = 18 blocks, 24 tokens untouched, k = (128 - 24) // 32 = 3.
        assert engine.pool.get_num_free_blocks() == free + 18 - 3
        assert len(engine.plans) == 1
        run.add("second", second, 30)
        run.finish()
        assert not engine.preemptions
        assert engine.pool.get_num_free_blocks() == 28
        assert len(run.outputs["second"]) == 30


def test_shared_prefix_returns_with_its_last_user(tiny_llama: Path) -> None:
    settings = {"budget": 128, "recent_tokens": 16, "interval": 64}
    (prompt,) = make_prompts(1, seed=6, shortest=512, longest=513)
    prompt = prompt[:520]
    with engines.engine(tiny_llama, settings, max_model_len=1024) as engine:
        run = Stepper(engine)
        run.add("a", prompt, 40)
        run.step()  # a: prefill
        before = engine.pool.get_num_free_blocks()
        run.add("b", [*prompt, 1, 2, 3], 40)
        run.step()  # a compacts; b hits a's blocks, which a no longer holds
        run.step()  # b compacts
        assert len(engine.plans) == 2
        # 520 = 16 blocks + 8: e = 15, u = 40, k = 2, so 4 blocks stay; 523: u = 43, also 4.
        # Block 15 is still shared: it lies in the recent part of both.
        assert before == engine.pool.num_gpu_blocks - 1 - 17
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1 - (4 + 4 - 1)
        run.finish()
        again = engine.generate([prompt], 40)[0]
        assert again.cached_tokens == 512, "the uncompressed prompt is still in the cache"
        assert again.tokens == run.outputs["a"]


def test_prefix_hits_stay_exact(tiny_llama: Path) -> None:
    """A repeated prompt hits the uncompressed prefix and gets what it would get alone."""
    settings = {"budget": 128, "recent_tokens": 16, "interval": 16}
    prompts = make_prompts(6, seed=7, shortest=300, longest=400)
    with engines.engine(tiny_llama, settings, enable_prefix_caching=False) as engine:
        wanted = [engine.generate([prompt], 40)[0] for prompt in prompts]
    with engines.engine(tiny_llama, settings) as engine:
        for _ in range(2):
            found = engine.generate(prompts + prompts, 40)
            for output, other in zip(found, wanted + wanted, strict=True):
                engines.assert_same(output, other)
        assert all(output.cached_tokens > 0 for output in found)
        # A continued conversation: prompt, answer and a new question. Blocks of the answer
        # were computed with a compressed past and must not be found.
        longer = prompts[0] + found[0].tokens + [5, 6, 7]
        (continued,) = engine.generate([longer], 8)
        assert continued.cached_tokens <= len(prompts[0]) // BLOCK * BLOCK
    with engines.engine(tiny_llama, settings, enable_prefix_caching=False) as engine:
        (fresh,) = engine.generate([longer], 8)
    engines.assert_same(continued, fresh)


def test_abort_leaves_the_others_alone(tiny_llama: Path) -> None:
    settings = PHASES["after_prefill"]
    prompts = make_prompts(6, seed=8, shortest=200, longest=400)
    with engines.engine(tiny_llama, settings) as engine:
        wanted = engine.generate(prompts, 30)
        engine.llm.reset_prefix_cache()
        run = Stepper(engine)
        for index, prompt in enumerate(prompts):
            run.add(str(index), prompt, 30)
        for step in range(4):
            run.step()
            if step in (0, 2):
                engine.llm.llm_engine.abort_request([str(step)])
        run.finish()
        for index in (1, 3, 4, 5):
            assert run.outputs[str(index)] == wanted[index].tokens
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_parallel_sampling(tiny_llama: Path) -> None:
    """With n > 1 the samples share the prompt, then compact on their own."""
    (prompt,) = make_prompts(1, seed=9, shortest=300, longest=301)
    with engines.engine(tiny_llama, PHASES["after_prefill"]) as engine:
        params = engine.params(40)
        params.temperature, params.seed, params.n = 1.0, 1, 3
        (three,) = engine.llm.generate([TokensPrompt(prompt_token_ids=prompt)], params)
        assert len({tuple(output.token_ids) for output in three.outputs}) == 3
        assert len({plan.request_id for plan in engine.plans}) == 3


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_cache_types(options: dict[str, str], tiny_llama: Path) -> None:
    """Pages of other types: together as alone, through several compactions."""
    prompts = make_prompts(4, seed=10, shortest=200, longest=300)
    with engines.engine(tiny_llama, PHASES["after_prefill"], **options) as engine:
        alone = [engine.generate([prompt], 40)[0] for prompt in prompts]
        once = len(engine.plans)
        together = engine.generate(prompts, 40)
        assert once >= 8
        # A product of another batch size may round another way, up to a flipped token.
        compared = [engines.assert_same(*pair, 0.1) for pair in zip(together, alone, strict=True)]
        assert sum(compared) >= 80, "too little was compared"


def test_prompt_longer_than_the_pool(tiny_llama: Path) -> None:
    """during_prefill bounds the peak: the pool holds 20 blocks, the prompt needs 62."""
    settings = {"budget": 128, "recent_tokens": 16, "interval": 128, "phase": "during_prefill"}
    prompts = make_prompts(2, seed=11, shortest=1900, longest=1901)
    with engines.engine(
        tiny_llama, settings, max_model_len=2048, num_gpu_blocks_override=21
    ) as engine:
        small = engine.generate(prompts, 20)
    with engines.engine(tiny_llama, settings, max_model_len=2048) as engine:
        large = engine.generate(prompts, 20)
    for found, wanted in zip(small, large, strict=True):
        engines.assert_same(found, wanted)


def test_totals_are_counted(tiny_llama: Path) -> None:
    (prompt,) = make_prompts(1, seed=12, shortest=300, longest=301)
    with engines.engine(tiny_llama, PHASES["after_prefill"]) as engine:
        engine.generate([prompt], 40)
        (worker,) = engine.llm.collective_rpc("kvcompress_totals")
        scheduler = engine.scheduler.kvcompress.totals
        assert worker["compactions"] == scheduler.compactions == len(engine.plans) >= 2
        assert worker["blocks_freed"] == scheduler.blocks_freed
        assert worker["tokens_removed"] == scheduler.tokens_removed == 32 * worker["blocks_freed"]
        assert worker["seconds"] > 0
