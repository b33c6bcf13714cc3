"""Requests with settings of their own in a running engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engines
import pytest
from engine_stub import EngineOptions, build_scheduler, make_request
from engines import prefixed
from test_engine import BLOCK, Stepper, make_prompts
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.limits import Limits

SERVER: dict[str, dict[str, Any]] = {
    "knorm": {"budget": 128, "recent_tokens": 16, "interval": 16},
    "during_prefill": {
        "budget": 128,
        "max_budget": 256,
        "recent_tokens": 16,
        "interval": 48,
        "phase": "during_prefill",
        "bands": 2,
        "pyramid_beta": 1.5,
    },
    "merge": {"method": "merge", "budget": 288, "recent_tokens": 16, "interval": 32},
    "knorm+merge-none": {
        "method": "knorm+merge",
        "merge_weighting": "none",
        "budget": 288,
        "recent_tokens": 16,
        "interval": 32,
    },
}

WISHES: list[dict[str, Any]] = [
    {},
    {"enabled": 0},
    {"method": "keydiff"},
    {"method": "streaming", "budget": 192},
    {"method": "random", "keep_ratio": 0.5},
    {"prune_after": 350},
    {"context_tokens": 310},
    {"context_tokens": 300, "method": "knorm", "budget": 128},
    {"context_tokens": 290, "keep_ratio": 0.4, "report": 1},
    {"method": "knorm", "budget": 256},
]


def preempt_all_at(engine: engines.Engine, steps: Sequence[int]) -> None:
    """Preempt every running request at the beginning of some steps."""
    schedule, count = engine.scheduler.schedule, itertools.count()

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        if next(count) in steps:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    engine.scheduler.schedule = disturbed


@pytest.mark.parametrize("name", SERVER)
def test_each_gets_what_it_gets_alone(name: str, tiny_llama: Path) -> None:
    """In one batch, preempted and replayed, in chunks of another size."""
    server = SERVER[name]
    wishes = [*WISHES, {}, {}, {}, {}]
    prompts = make_prompts(len(wishes), seed=3, shortest=330, longest=420)
    with engines.engine(tiny_llama, server, max_model_len=1024) as engine:
        alone = []
        for prompt, own in zip(prompts, wishes, strict=True):
            engine.plans.clear()
            alone += engine.generate([prompt], 50, [own])
            positions = {plan.position for plan in engine.plans}
            method = own.get("method", server.get("method", "kvdiff"))
            used = {plan.method for plan in engine.plans}
            assert used == (set() if own.get("enabled") == 0 else {method})
            if context := own.get("context_tokens"):
                # In chunks, the last one before the context's end may have left little enough.
                assert (
                    context in positions
                    or 0
                    < context - max(position for position in positions if position <= len(prompt))
                    < server["interval"]
                )
                assert not any(context < position <= len(prompt) for position in positions)
        assert not engine.preemptions
    with engines.engine(
        tiny_llama,
        server,
        max_model_len=1024,
        max_num_batched_tokens=160,
        max_num_seqs=20,
        num_gpu_blocks_override=36 * server.get("bands", 1),
    ) as engine:
        preempt_all_at(engine, steps=(9, 30))
        together = engine.generate(prompts, 50, wishes)
        assert {plan.request_id for plan in engine.plans} & set(engine.preemptions)
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
    compared = [engines.assert_same(*pair) for pair in zip(together, alone, strict=True)]
    assert sum(steps == 50 for steps in compared) >= len(compared) - 2, "too many near-ties"


def test_settings_of_requests_reach_the_pages(tiny_llama: Path) -> None:
    """Blocks held are those of each request's own settings."""
    (prompt,) = make_prompts(1, seed=5, shortest=600, longest=601)
    prompt = prompt[:600]
    with engines.engine(tiny_llama, SERVER["knorm"], max_model_len=1024) as engine:
        for own, held in [
            # 24 tokens beside 18 blocks: (128 - 24) // 32 and (256 - 24) // 32 stay of these.
            ({}, 3 + 1),
            ({"budget": 256}, 7 + 1),
            ({"enabled": 0}, 19),
            ({"prune_after": 601}, 19),
            # 150 of 600 tokens: 4 blocks and 24 beside them.
            ({"keep_ratio": 0.25}, 4 + 1),
            # 400 tokens have 12 full blocks and 16 beside: 3 stay. Then 200 more tokens.
            ({"context_tokens": 400}, 19 - (12 - 3)),
        ]:
            run = Stepper(engine)
            run.engine.llm.reset_prefix_cache()
            params = engine.params(8, extra_args=prefixed(own))
            engine.llm.llm_engine.add_request("one", {"prompt_token_ids": prompt}, params)
            for _ in range(4):
                run.step()
            blocks = engine.pool.num_gpu_blocks - 1 - engine.pool.get_num_free_blocks()
            assert blocks == held, own
            run.finish()


def test_hits_never_reach_past_the_context(tiny_llama: Path) -> None:
    """Also where the context is short enough to stay as it is."""
    (prompt,) = make_prompts(1, seed=6, shortest=500, longest=501)
    wishes = [{"context_tokens": n} for n in (100, 128, 300, 320, 321, len(prompt))]
    with engines.engine(
        tiny_llama, SERVER["knorm"], max_model_len=1024, enable_prefix_caching=False
    ) as engine:
        cold = [engine.generate([prompt], 20, [own])[0] for own in wishes]
    with engines.engine(tiny_llama, SERVER["knorm"], max_model_len=1024) as engine:
        engine.generate([prompt], 20, [{"enabled": 0}])
        for own, wanted in zip(wishes, cold, strict=True):
            for _ in range(2):
                (found,) = engine.generate([prompt], 20, [own])
                context = own["context_tokens"]
                # A context that stays may be a hit as a whole.
                most = context if context <= 128 else context - 1
                assert found.cached_tokens == min(most, len(prompt) - 1) // BLOCK * BLOCK
                engines.assert_same(found, wanted)


def test_what_cannot_be_is_refused_before_the_engine(tiny_llama: Path) -> None:
    prompt = make_prompts(1, seed=7)[0]
    with engines.engine(tiny_llama, SERVER["merge"], max_model_len=1024) as engine:
        for own, said in [
            ({"budget": 10}, "kvcompress_budget=10"),
            ({"context_tokens": len(prompt) + 1}, f"the prompt has {len(prompt)} tokens"),
            (
                {"method": "knorm+merge"},
                "allowed are knorm, keydiff, kvdiff, streaming, random, merge;",
            ),
        ]:
            with pytest.raises(VLLMValidationError, match=said) as raised:
                engine.generate([prompt], 4, [own])
            assert raised.value.parameter == prefixed(own).popitem()[0]
        assert not engine.scheduler.requests
        # max_tokens=None is the rest of the model's length.
        params = engine.params(None, extra_args=prefixed({"budget": 512}))
        params.stop_token_ids = list(range(512))
        assert engine.llm.generate([{"prompt_token_ids": prompt}], params)
        assert len(engine.generate([prompt], 4)[0].tokens) == 4


def test_what_never_fits_the_pool_is_refused(tiny_llama: Path) -> None:
    """The pool holds 20 blocks, and a prompt needs 63."""
    server = {"budget": 128, "recent_tokens": 16, "interval": 128, "phase": "during_prefill"}
    prompt = make_prompts(1, seed=11, shortest=1900, longest=1901)[0]
    with engines.engine(
        tiny_llama, server, max_model_len=2048, num_gpu_blocks_override=21
    ) as engine:
        for own in ({"enabled": 0}, {"keep_ratio": 0.5}, {"prune_after": 1000}):
            with pytest.raises(VLLMValidationError, match="and the pool has 20; allowed is"):
                engine.generate([prompt], 20, [own])
        with pytest.raises(VLLMValidationError, match="max_budget allows up to 128"):
            engine.generate([prompt], 20, [{"budget": 160}])
        with pytest.raises(VLLMValidationError, match="would hold 63 blocks at once"):
            engine.generate([prompt], 20, [{"context_tokens": 20}])
        # Of 63 blocks the context gives up 49.
        wishes = [{"context_tokens": 1700}, {"keep_ratio": 0.1}, {"method": "streaming"}, {}]
        found = engine.generate([prompt] * 4, 20, wishes)
    with engines.engine(tiny_llama, server, max_model_len=2048) as engine:
        wanted = [engine.generate([prompt], 20, [own])[0] for own in wishes]
    for pair in zip(found, wanted, strict=True):
        engines.assert_same(*pair)


def test_start_up_makes_room_for_the_largest_budget(tiny_llama: Path) -> None:
    """12 blocks for budget and interval are enough, unless requests may ask for more."""
    server = {"budget": 256, "interval": 128, "phase": "during_prefill"}
    size = {"max_model_len": 2048, "num_gpu_blocks_override": 14}
    with (
        pytest.raises(ValueError, match="larger than the available KV cache memory"),
        engines.engine(tiny_llama, {**server, "max_budget": 512}, **size),
    ):
        pass
    with engines.engine(tiny_llama, server, **size) as engine:
        assert len(engine.generate(make_prompts(1), 4)[0].tokens) == 4


def test_a_server_that_does_not_compress_says_so(tiny_llama: Path) -> None:
    off = {"additional_config": {"kvcompress": {"method": "none"}}}
    for options in ({}, off):
        with engines.engine(tiny_llama, **options) as engine:
            with pytest.raises(VLLMValidationError, match="this server does not compress"):
                engine.generate([[1, 2, 3]], 4, [{"budget": 512}])
            params = engine.params(4, extra_args={"other": 1})
            assert engine.llm.generate([{"prompt_token_ids": [1, 2, 3]}], params)


# -- who comes past the check -------------------------------------------------------------


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {},
        {"session_id": "a"},
        {"kvcompress_budget": "many"},
        {"kvcompress_budgte": 100},
        {"kvcompress_context_tokens": 41},
        {"kvcompress_method": "merge"},
        {"kvcompress_\ud800": [None]},
    ],
    ids=str,
)
def test_engine_core_takes_the_servers_settings_instead(extra_args: Any) -> None:
    scheduler = build_scheduler(EngineOptions((Limits(16, None, 0, 0, 4),), block_size=4))
    request = make_request(EngineOptions(()), "0", [1] * 40, 8)
    request.sampling_params.extra_args = extra_args
    trajectory = scheduler.kvcompress.state(request).trajectory
    assert trajectory.schedule is scheduler.kvcompress.schedule
    assert trajectory.context_tokens is None


def test_engine_core_reads_what_a_request_asks_for() -> None:
    options = EngineOptions((Limits(1024, None, 4, 64, 4), None), block_size=4, num_blocks=100)
    planner = build_scheduler(options).kvcompress
    request = make_request(options, "0", [1] * 100, 8)
    request.sampling_params.extra_args = prefixed({"budget": 100, "context_tokens": 30})
    trajectory = planner.state(request).trajectory
    assert trajectory.schedule.limits == (Limits(100, None, 4, 64, 4), None)
    assert trajectory.context_tokens == 30
    assert planner.stop(request, 0) == 30, "the chunk ends there, though all of it stays"
    assert planner.hit_limit(request) == 30
    assert planner.state(request).trajectory is trajectory


def test_engine_core_never_waits_for_what_cannot_fit() -> None:
    options = EngineOptions(
        (Limits(1024, None, 4, 64, 4),), block_size=4, num_blocks=20, phase="during_prefill"
    )
    planner = build_scheduler(options).kvcompress
    request = make_request(options, "0", [1] * 100, 8)
    request.sampling_params.extra_args = prefixed({"enabled": 0})
    assert planner.state(request).trajectory.schedule is planner.schedule
