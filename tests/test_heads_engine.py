"""KV heads that keep every token or more than others, in an engine: as without, and as alone.

What they compute is compared with the dense oracle in ``test_oracle.py`` and
``test_gpu_path.py``.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import engines
import pytest
from crowds import check_together
from test_engine import BLOCK, PHASES, VOCABULARY, make_prompts
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.heads import Part, places
from vllm_kvcompress.settings import parse_settings

ONE_HOST = "0:1,1:3,2:0,3:2"
"""A head of every layer: layer 0 holds all four, and its own others lie in three layers."""

TWO_HOSTS = "0:1,1:3,2:0,2:2,3:0,3:1,3:2,3:3"
"""Layer 3 is whole; layer 2 holds 0:1 and 1:3, which its other heads make room for."""

BOOSTED = "0:3,1:0,1:1,3:0"
"""Beside ONE_HOST: layer 1 holds these, so layers have heads in up to four layers' pages."""

PLANNED = {
    ONE_HOST: {(0,): [1], (1,): [1, 3], (2,): [1, 3], (3,): [1, 3]},
    TWO_HOSTS: {(0, 1): [1, 3], (2, 3): [1, 2]},
    BOOSTED: {(0,): [1], (1,): [1, 2], (2,): [1, 3], (3,): [1, 2]},
}
"""By the layers of a group: how many neighbours the CPU backend has to plan its work for."""

SETTINGS: dict[str, dict[str, Any]] = {
    "after_prefill": {
        **PHASES["after_prefill"],
        "method": "kvdiff",
        "recent_ratio": 0.5,
        "skip_heads": ONE_HOST,
    },
    "during_prefill": {**PHASES["during_prefill"], "skip_heads": TWO_HOSTS},
    "boost": {
        **PHASES["after_prefill"],
        "method": "kvdiff",
        "recent_ratio": 0.5,
        "skip_heads": ONE_HOST,
        "boost_heads": BOOSTED,
        "boost": 2.0,
    },
    "boost, during_prefill": {
        "budget": 128,
        "recent_tokens": 16,
        "interval": 48,
        "phase": "during_prefill",
        "boost_heads": TWO_HOSTS,
        "boost": 1.5,
    },
    "merge": {
        "method": "merge",
        "pooling": "mean",
        "budget": 288,
        "recent_tokens": 16,
        "interval": 48,
        "skip_heads": ONE_HOST,
    },
    "knorm+merge": {
        "method": "knorm+merge",
        "budget": 288,
        "recent_tokens": 16,
        "interval": 48,
        "skip_heads": ONE_HOST,
    },
}


def test_where_heads_lie() -> None:
    """The two choices above are what their descriptions say."""
    one, two = (
        places(parse_settings({"skip_heads": heads}), 4, 4) for heads in (ONE_HOST, TWO_HOSTS)
    )
    assert one == {
        0: (Part(0, 0, (1,)), Part(1, 3, (0,)), Part(2, 3, (2,)), Part(3, 3, (3,))),
        1: (Part(0, 1, (3,)), Part(1, 0, (0, 1, 2))),
        2: (Part(0, 2, (0,)), Part(2, 0, (1, 2, 3))),
        3: (Part(0, 3, (2,)), Part(3, 0, (0, 1, 3))),
    }
    assert two == {
        0: (Part(0, 0, (0, 2, 3)), Part(2, 2, (1,))),
        1: (Part(1, 0, (0, 1, 2)), Part(2, 3, (3,))),
        2: (Part(0, 3, (1,)), Part(1, 3, (3,)), Part(2, 0, (0, 2))),
    }


def test_identity_below_the_threshold(tiny_llama: Path) -> None:
    """Nothing is compressed: stock vLLM's numbers, with prompts in chunks and together."""
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(5 + 23 * i)] for i in range(10)]
    options = {"max_model_len": 512, "max_num_batched_tokens": 96, "max_num_seqs": 16}
    with engines.engine(tiny_llama, **options) as engine:
        wanted = engine.generate(prompts, 16)
    for heads, boosted in ((ONE_HOST, ()), (TWO_HOSTS, ()), (ONE_HOST, BOOSTED)):
        settings = {"budget": 512, "skip_heads": heads, "boost_heads": boosted}
        with engines.engine(tiny_llama, settings, **options) as engine:
            found = engine.generate(prompts, 16)
            assert not engine.plans
            assert planned_heads(engine) == PLANNED[boosted or heads]
        assert [g.tokens for g in found] == [g.tokens for g in wanted]
        for generation, stock in zip(found, wanted, strict=True):
            assert generation.logprobs == pytest.approx(stock.logprobs, abs=1e-5)


def planned_heads(engine: engines.Engine) -> dict[tuple[int, ...], list[int]]:
    groups = [group for groups in engine.runner.attn_groups for group in groups]
    return {
        tuple(sorted(map(extract_layer_index, group.layer_names))): sorted(group.by_heads)
        for group in groups
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_independence(name: str, tiny_llama: Path) -> None:
    """16 requests together, preempted and replayed, in chunks of any size, as each alone."""
    longest, decoded, blocks = (600, 60, 180) if "merge" in name else (500, 40, 160)
    prompts = make_prompts(16, longest=longest)
    check_together(tiny_llama, SETTINGS[name], prompts, decoded, [(160, blocks)])


def test_prefix_hits_stay_exact(tiny_llama: Path) -> None:
    """A repeated prompt hits the uncompressed prefix in every group; an answer does not."""
    prompts = make_prompts(4, seed=7, shortest=200, longest=300)
    with engines.engine(tiny_llama, SETTINGS["after_prefill"], max_model_len=1024) as engine:
        wanted = engine.generate(prompts, 24)
        found = engine.generate(prompts + prompts, 24)
        for output, other in zip(found, wanted + wanted, strict=True):
            engines.assert_same(output, other)
        assert all(output.cached_tokens >= BLOCK for output in found)
        longer = prompts[0] + found[0].tokens + [5, 6, 7]
        (continued,) = engine.generate([longer], 8)
        assert 0 < continued.cached_tokens <= len(prompts[0]) // BLOCK * BLOCK
        engine.llm.reset_prefix_cache()
        (fresh,) = engine.generate([longer], 8)
        assert not fresh.cached_tokens
        engines.assert_same(continued, fresh)


def test_parallel_sampling(tiny_llama: Path) -> None:
    """Samples share the prompt's blocks and compact on their own, each as a request alone."""
    (prompt,) = make_prompts(1, seed=9, shortest=300, longest=301)
    with engines.engine(tiny_llama, SETTINGS["after_prefill"], max_model_len=1024) as engine:
        params = engine.params(40)
        params.temperature, params.seed, params.n = 1.0, 1, 3
        (three,) = engine.llm.generate([TokensPrompt(prompt_token_ids=prompt)], params)
        assert len({plan.request_id for plan in engine.plans}) == 3
        assert len({tuple(output.token_ids) for output in three.outputs}) == 3
        for index, output in enumerate(three.outputs):
            # vLLM counts the samples' seeds up from that of the request.
            params = engine.params(40, seed=1 + index)
            params.temperature = 1.0
            (alone,) = engine.llm.generate([TokensPrompt(prompt_token_ids=prompt)], params)
            assert list(output.token_ids) == list(alone.outputs[0].token_ids)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_cache_types(options: dict[str, str], tiny_llama: Path) -> None:
    """Pages of other types: stock's numbers until the prompt's end, then as each alone."""
    prompts = make_prompts(4, seed=10, shortest=200, longest=300)
    with engines.engine(tiny_llama, max_model_len=512, **options) as engine:
        stock = engine.generate(prompts, 1)
    with engines.engine(
        tiny_llama, SETTINGS["after_prefill"], max_model_len=512, **options
    ) as engine:
        alone = [engine.generate([prompt], 40)[0] for prompt in prompts]
        once = len(engine.plans)
        together = engine.generate(prompts, 40)
        assert once >= 8
        for first, other in zip(alone, stock, strict=True):
            assert first.logprobs[:1] == pytest.approx(other.logprobs, abs=0.1)
        # A product of another batch size may round another way, up to a flipped token.
        compared = [engines.assert_same(*pair, 0.1) for pair in zip(together, alone, strict=True)]
        assert sum(compared) >= 80, "too little was compared"
