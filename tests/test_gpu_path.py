"""vLLM's GPU code path on this CPU: V2 runner, async scheduler, Triton attention.

Plans, kept tokens, decoded tokens and log-probabilities must be those of the CPU path (V1
runner, synchronous scheduler, CPU attention) and of the dense oracle, also under preemption,
abort and prefix-cache hits. Triton kernels run in Triton's interpreter, so models and
prompts are small. Attention groups take the branch of GPUs throughout, with their
persistent buffers.

What no CPU can test: CUDA graph replay, FlashAttention, FlashInfer and timing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_path.harness import (
    MAX_LOGPROB_DIFFERENCE,
    V1,
    V2_ASYNC,
    V2_SYNC,
    V2_TRITON,
    V2_TRITON_PAGES,
    Result,
    Route,
    compare,
    lives_of,
    plans_of,
    run_cases,
)
from merge_oracle import DenseMergeOracle
from oracle import (
    DenseOracle,
    band_budgets,
    kept_sets_agree,
    max_logprob_difference,
    untouched_base,
)
from placed_heads import by_head
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_kvcompress.settings import SettingsError, parse_settings
from vllm_kvcompress.worker.runner import CompressedRunnerV2

VOCABULARY = 256
LENGTHS = (150, 121, 133, 90)
DECODED = 40

FLAT = {"method": "knorm", "budget": 96, "recent_tokens": 16, "sink_tokens": 2, "interval": 16}
BANDS = {**FLAT, "method": "keydiff", "bands": 3, "pyramid_beta": 1.2, "phase": "during_prefill"}
DECODE = {**FLAT, "phase": "decode", "budget": 64, "recent_tokens": 0}
TWO_BANDS = {**FLAT, "bands": 2, "pyramid_beta": 1.2}
# Layers 0 and 1 hold the whole heads and layer 2 the boosted ones, of layers 2 and 3.
HEADS = {
    **FLAT,
    "method": "kvdiff",
    "recent_ratio": 0.3,
    "skip_heads": "0:1,1:0,2:1,3:1",
    "boost_heads": "2:0,3:0",
    "boost": 1.3,
}

MERGE = {"method": "merge", "budget": 224, "recent_tokens": 8, "sink_tokens": 2, "interval": 16}
KNORM_MERGE = {**MERGE, "method": "knorm+merge", "merge_weighting": "none"}

NEAR_TIE = 1e-3
"""Relative: methods round their scores to 12 bits, the oracle does not."""

Results = dict[str, Result]


def _prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def _case(
    model: Path, kvcompress: dict[str, Any], runs: list[dict[str, Any]], **engine: Any
) -> dict[str, Any]:
    return {
        "model": str(model),
        "kvcompress": kvcompress,
        "prompts": _prompts(1, LENGTHS),
        "sampling": {"max_tokens": DECODED},
        "runs": runs,
        "engine": {
            "block_size": 32,
            "max_model_len": 320,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 96,
            "kv_cache_memory_bytes": 8 << 20,
            "enable_prefix_caching": False,
            **engine,
        },
    }


def _compactions(run: dict[str, Any], index: int) -> int:
    """Positions at which a request compacted."""
    return len({plan["position"] for plan in plans_of(run, index)})


def _agrees_with_oracle(case: dict[str, Any], run: dict[str, Any], index: int) -> float:
    """Compare a request with the dense oracle; the largest log-probability difference."""
    found = run["requests"][str(index)]
    prompt, block_size = case["prompts"][index], case["engine"]["block_size"]
    settings = parse_settings(case["kvcompress"])
    live = _live_positions(
        plans_of(run, index), untouched_base(settings, block_size, len(prompt)), block_size
    )
    dense = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    num_layers = dense.config.num_hidden_layers
    live = by_head(live, settings, num_layers, dense.config.num_key_value_heads)
    layers, budgets = band_budgets(settings, num_layers, block_size, settings.bands or 1)
    oracle = DenseOracle(dense, settings, block_size, layers, budgets)
    wanted = oracle.run(prompt, len(found["tokens"]), found["tokens"], live)
    expected = [(each.position, layer) for each in wanted.compactions for layer in each.kept]
    assert sorted(expected) == sorted(live)
    for each in wanted.compactions:
        for layer in each.kept:
            assert kept_sets_agree(each, layer, live[each.position, layer], NEAR_TIE)
    difference = max_logprob_difference(wanted.token_logprobs, found["logprobs"])
    assert difference <= MAX_LOGPROB_DIFFERENCE
    likeliest = wanted.logprobs.max(dim=-1).values
    assert (likeliest - wanted.token_logprobs <= MAX_LOGPROB_DIFFERENCE).all()
    return difference


def _merges_as_oracle(case: dict[str, Any], run: dict[str, Any], index: int) -> float:
    """Compare a merged request with the dense oracle; the largest log-probability difference."""
    found = run["requests"][str(index)]
    settings, block_size = parse_settings(case["kvcompress"]), case["engine"]["block_size"]
    dense = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    layers, budgets = band_budgets(settings, dense.config.num_hidden_layers, block_size, 1)
    oracle = DenseMergeOracle(dense, settings, block_size, layers, budgets)
    wanted = oracle.run(case["prompts"][index], len(found["tokens"]), found["tokens"])
    positions = {plan["position"] for plan in plans_of(run, index)}
    assert positions == {each.position for each in wanted.compactions}
    assert len(positions) >= 2
    assert max(max(each.levels) for each in wanted.compactions) >= 1
    difference = max_logprob_difference(wanted.token_logprobs, found["logprobs"])
    assert difference <= MAX_LOGPROB_DIFFERENCE
    return difference


def _live_positions(
    plans: list[dict[str, Any]], base: int, block_size: int
) -> dict[tuple[int, int], torch.Tensor]:
    """Positions in the cache after each compaction, ``[kv_heads, live]``, by (position, layer)."""
    live: dict[tuple[int, int], torch.Tensor] = {}
    latest: dict[int, tuple[int, torch.Tensor]] = {}
    for plan in plans:
        for layer, indices in ((int(name), torch.tensor(k)) for name, k in plan["kept"].items()):
            nothing = torch.empty(len(indices), 0, dtype=torch.int64)
            since, before = latest.get(layer, (0, nothing))
            new = torch.arange(since, plan["position"]).expand(len(indices), -1)
            held = torch.cat([before, new], dim=1)
            end = base + plan["sources"] * block_size
            kept = held[:, base:end].gather(1, indices)
            held = torch.cat([held[:, :base], kept, held[:, end:]], dim=1)
            latest[layer] = plan["position"], held
            live[plan["position"], layer] = held
    return live


def _random_llama(directory: Path, layers: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Llama with 4 layers, 4 query and 2 KV heads of 32."""
    return _random_llama(tmp_path_factory.mktemp("llama4"), layers=4)


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 2 layers."""
    return _random_llama(tmp_path_factory.mktemp("llama2"), layers=2)


@pytest.fixture(scope="module")
def cases(llama: Path, small_llama: Path) -> dict[str, dict[str, Any]]:
    """Cases for the CPU attention backend, by name."""
    batch = {"requests": [0, 1, 2, 3]}
    return {
        "flat": _case(llama, FLAT, [batch, {"requests": [1]}]),
        "bands": _case(llama, BANDS, [batch, {"requests": [2]}]),
        "heads": _case(llama, HEADS, [batch, {"requests": [0]}]),
        "decode": {
            **_case(llama, DECODE, [{"requests": [3]}]),
            "sampling": {"max_tokens": 116},
        },
        # Room for three compact requests and the prompt of the last, which is preempted when
        # all have grown until the next compaction.
        "pressure": {
            **_case(
                llama,
                {**TWO_BANDS, "interval": 32},
                [batch, {"requests": [0]}, {"requests": [3]}],
                num_gpu_blocks_override=29,
                max_model_len=224,
            ),
            "prompts": _prompts(2, (150, 148, 146, 144)),
            "sampling": {"max_tokens": 60},
            "crowd": True,
        },
        **{
            name: {
                **_case(llama, settings, [batch, {"requests": [1]}], max_model_len=384),
                "prompts": _prompts(5, (300, 271, 283, 257)),
            }
            for name, settings in (("merge", MERGE), ("knorm+merge", KNORM_MERGE))
        },
        "again": _case(
            llama,
            TWO_BANDS,
            [batch, batch, {**batch, "abort": {"1": 6}}],
            enable_prefix_caching=True,
        ),
        "triton": {
            **_case(
                small_llama,
                {
                    **TWO_BANDS,
                    "method": "keydiff",
                    "phase": "during_prefill",
                    "budget": 64,
                    "recent_tokens": 1,
                },
                [{"requests": [0, 1]}],
            ),
            "prompts": _prompts(3, (100, 70)),
            "sampling": {"max_tokens": 24},
        },
        # No head lies in its own slot: layer 0 holds 0:1 and 1:0, layer 1 holds 1:1 and 0:0.
        "triton-heads": {
            **_case(
                small_llama,
                {
                    **FLAT,
                    "method": "kvdiff",
                    "recent_ratio": 0.3,
                    "budget": 64,
                    "recent_tokens": 1,
                    "skip_heads": "0:1,1:0",
                },
                [{"requests": [0, 1]}],
            ),
            "prompts": _prompts(3, (84, 70)),
            "sampling": {"max_tokens": 12},
        },
    }


@pytest.fixture(scope="module")
def on_route(cases: dict[str, dict[str, Any]]) -> Callable[[Route], Results]:
    """Results of all cases on a route, each route run once."""
    done: dict[Route, Results] = {}

    def results(route: Route) -> Results:
        if route not in done:
            done[route] = dict(zip(cases, run_cases(route, list(cases.values())), strict=True))
        return done[route]

    return results


routes = pytest.mark.parametrize(
    "route",
    [
        pytest.param(V2_ASYNC, id="async"),
        pytest.param(V2_SYNC, id="sync", marks=pytest.mark.slow),
    ],
)


@routes
@pytest.mark.parametrize("case", ["flat", "bands", "heads", "decode", "merge", "knorm+merge"])
def test_same_as_cpu_path(on_route: Callable[[Route], Results], route: Route, case: str) -> None:
    found, wanted = on_route(route)[case], on_route(V1)[case]
    for mine, other in zip(found["runs"], wanted["runs"], strict=True):
        print(case, compare(mine, other, [int(index) for index in other["requests"]]))
    first = found["runs"][0]
    assert max(_compactions(first, int(index)) for index in first["requests"]) >= 2
    assert found["totals"]["compactions"] == wanted["totals"]["compactions"] > 0


@routes
@pytest.mark.parametrize("case", ["flat", "bands", "heads", "decode"])
def test_same_as_oracle(
    cases: dict[str, dict[str, Any]], on_route: Callable[[Route], Results], route: Route, case: str
) -> None:
    for run in on_route(route)[case]["runs"]:
        for index in run["requests"]:
            print(case, index, _agrees_with_oracle(cases[case], run, int(index)))


@routes
def test_merges_as_oracle(
    cases: dict[str, dict[str, Any]], on_route: Callable[[Route], Results], route: Route
) -> None:
    batch, alone = on_route(route)["merge"]["runs"]
    for run, index in ((batch, 0), (batch, 3), (alone, 1)):
        print(index, _merges_as_oracle(cases["merge"], run, index))


@routes
@pytest.mark.parametrize("case", ["flat", "bands", "heads", "merge", "knorm+merge"])
def test_batch_does_not_matter(
    on_route: Callable[[Route], Results], route: Route, case: str
) -> None:
    batch, alone = on_route(route)[case]["runs"]
    print(case, compare(alone, batch, [int(index) for index in alone["requests"]]))


@routes
def test_preempted_request_resumes(on_route: Callable[[Route], Results], route: Route) -> None:
    batch, *alone = on_route(route)["pressure"]["runs"]
    assert batch["preemptions"] > 0
    assert all(run["preemptions"] == 0 for run in alone)
    # At least one request had compacted when it was preempted, and compacted again.
    assert len(lives_of(batch, 3)) > 1
    for index, run in zip((0, 3), alone, strict=True):
        print(index, compare(run, batch, [index]))
    print(compare(batch, on_route(V1)["pressure"]["runs"][0], list(range(4))))


@routes
def test_prefix_cache_hit(on_route: Callable[[Route], Results], route: Route) -> None:
    first, second, _ = on_route(route)["again"]["runs"]
    for index in range(4):
        assert not first["requests"][str(index)]["cached"]
        assert second["requests"][str(index)]["cached"] >= 64
    print(compare(second, first, list(range(4))))
    print(compare(first, on_route(V1)["again"]["runs"][0], list(range(4))))


@routes
def test_abort_leaves_others_alone(on_route: Callable[[Route], Results], route: Route) -> None:
    whole, _, aborted = on_route(route)["again"]["runs"]
    tokens = aborted["requests"]["1"]["tokens"]
    assert 6 <= len(tokens) < DECODED
    assert tokens == whole["requests"]["1"]["tokens"][: len(tokens)]
    assert plans_of(aborted, 1)
    print(compare(aborted, whole, [0, 2, 3]))


def test_triton_attention(
    cases: dict[str, dict[str, Any]], on_route: Callable[[Route], Results], small_llama: Path
) -> None:
    """In the GPU cache layout: against the CPU path, and with the GPU block size."""
    small_blocks = {
        **_case(
            small_llama,
            {**FLAT, "budget": 48, "recent_tokens": 8, "interval": 8},
            [{"requests": [0]}],
            block_size=16,
        ),
        "prompts": _prompts(4, (60,)),
        "sampling": {"max_tokens": 28},
    }
    merging = {
        **_case(
            small_llama,
            {**MERGE, "budget": 96, "recent_tokens": 1, "interval": 8},
            [{"requests": [0]}],
            block_size=16,
            max_model_len=192,
        ),
        "prompts": _prompts(4, (110,)),
        "sampling": {"max_tokens": 16},
    }
    found, small, heads, merged = run_cases(
        V2_TRITON, [cases["triton"], small_blocks, cases["triton-heads"], merging]
    )
    print(_merges_as_oracle(merging, merged["runs"][0], 0))
    print(compare(found["runs"][0], on_route(V1)["triton"]["runs"][0], [0, 1]))
    print(_agrees_with_oracle(cases["triton"], found["runs"][0], 0))
    assert _compactions(found["runs"][0], 0) >= 2
    print(_agrees_with_oracle(small_blocks, small["runs"][0], 0))
    assert _compactions(small["runs"][0], 0) >= 3
    print(compare(heads["runs"][0], on_route(V1)["triton-heads"]["runs"][0], [0, 1]))
    for index in (0, 1):
        print(_agrees_with_oracle(cases["triton-heads"], heads["runs"][0], index))
        assert _compactions(heads["runs"][0], index) >= 1
    # Blocks of 16 again, with pages moved by our Triton kernels instead of torch.
    (moved,) = run_cases(V2_TRITON_PAGES, [small_blocks])
    print(compare(moved["runs"][0], small["runs"][0], [0]))
    print(_agrees_with_oracle(small_blocks, moved["runs"][0], 0))
    assert _compactions(moved["runs"][0], 0) >= 3


def test_refuses_metadata_without_slots() -> None:
    """Holes lie at request slots: metadata that does not name them would be silently wrong."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class OtherModelState(DefaultModelState):
        def prepare_attn(self, *args: Any, **kwargs: Any) -> Any:
            return {}

    runner = object.__new__(CompressedRunnerV2)
    runner.model_state = object.__new__(OtherModelState)
    with pytest.raises(SettingsError, match="OtherModelState"):
        runner.initialize_kv_cache(None)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_triton_attention_under_pressure(small_llama: Path) -> None:
    """After the prompt, three requests, preemption and resume, each request alone."""
    batch = {"requests": [0, 1, 2]}
    pressure = {
        **_case(
            small_llama,
            {**TWO_BANDS, "interval": 32},
            [batch, {"requests": [2]}],
            num_gpu_blocks_override=23,
            max_model_len=224,
        ),
        "prompts": _prompts(2, (150, 148, 146)),
        "crowd": True,
        "sampling": {"max_tokens": 60},
    }
    (wanted,) = run_cases(V1, [pressure])
    (found,) = run_cases(V2_TRITON, [pressure])
    assert found["runs"][0]["preemptions"] > 0
    assert any(len(lives_of(found["runs"][0], index)) > 1 for index in range(3))
    print(compare(found["runs"][0], wanted["runs"][0], [0, 1, 2]))
    print(compare(found["runs"][1], found["runs"][0], [2]))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("route", [V2_ASYNC, V2_SYNC], ids=["async", "sync"])
def test_smollm(smollm: Path, route: Route) -> None:
    """A real model with 30 layers: one band, three bands, and preemption."""
    flat = {"method": "knorm", "budget": 128, "recent_tokens": 16, "interval": 16}
    bands = {"method": "keydiff", "budget": 160, "recent_tokens": 16, "interval": 32}
    bands |= {"phase": "during_prefill", "bands": 3, "pyramid_beta": 1.5}
    source = Path(torch.__file__).with_name("nn") / "modules" / "transformer.py"
    ids = AutoTokenizer.from_pretrained(smollm)(source.read_text()[:9000]).input_ids
    engine = {"max_num_batched_tokens": 128, "max_model_len": 310}
    common = {
        "prompts": [ids[start : start + 252 - start // 150] for start in (0, 300, 600, 900)],
        "sampling": {"max_tokens": 56},
    }
    cases = [
        _case(smollm, flat, [{"requests": [0, 1, 2]}, {"requests": [1]}], **engine) | common,
        _case(smollm, bands, [{"requests": [0, 1]}], **engine) | common,
        _case(
            smollm,
            {**flat, "interval": 48},
            [{"requests": [0, 1, 2, 3]}, {"requests": [3]}],
            **engine,
            num_gpu_blocks_override=22,
        )
        | common,
    ]
    for case in cases:
        case["engine"]["kv_cache_memory_bytes"] = 96 << 20
    wanted, found = run_cases(V1, cases), run_cases(route, cases)
    for case, mine, other in zip(cases, found, wanted, strict=True):
        for run, same in zip(mine["runs"], other["runs"], strict=True):
            print(compare(run, same, [int(index) for index in same["requests"]]))
        print(_agrees_with_oracle(case, mine["runs"][0], 1))
    print(compare(found[0]["runs"][1], found[0]["runs"][0], [1]))
    print(compare(found[2]["runs"][1], found[2]["runs"][0], [3]))
    assert found[2]["runs"][0]["preemptions"] > 0
    assert len(lives_of(found[2]["runs"][0], 3)) > 1
