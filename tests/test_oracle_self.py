"""The dense oracle against Hugging Face, hand-made cases and its own written rules."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracle import (
    Compaction,
    DenseOracle,
    band_budgets,
    is_grid_position,
    kept_sets_agree,
    max_logprob_difference,
    planned_blocks,
    planned_trajectory,
    untouched_base,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vllm_kvcompress.settings import Settings

BLOCK = 4
LAYERS = 3
KV_HEADS = 2
VOCAB = 97
PROMPT_LENGTH = 50
FLAT = Fraction(1)


def tiny_model(family: str = "llama", **changes) -> torch.nn.Module:
    """A random model whose attention is sharp enough for evictions to matter."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**shape, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return torch.randint(
        VOCAB, (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(1)
    ).tolist()


def make_settings(**changes) -> Settings:
    """Small numbers, so that a short request compacts several times."""
    if "keep_ratio" not in changes:
        changes.setdefault("budget", 24)
    small = {"sink_tokens": 3, "recent_tokens": 6, "recent_ratio": 0.0, "interval": 8}
    return Settings(**{**small, **changes})


def make_oracle(
    model: torch.nn.Module, settings: Settings, bands: int = 1, block_size: int = BLOCK
) -> DenseOracle:
    layers, budgets = band_budgets(settings, model.config.num_hidden_layers, block_size, bands)
    return DenseOracle(model, settings, block_size, layers, budgets)


# Without compression: Hugging Face's own generate.


@pytest.mark.parametrize("query_chunk", [256, 7])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize("off", [{"method": "none"}, {"budget": 1000}, {"prune_after": 1000}])
def test_uncompressed_run_is_hugging_face_generate(
    family, changes, off, query_chunk, prompt, monkeypatch
):
    monkeypatch.setattr(oracle, "QUERY_CHUNK", query_chunk)
    model = tiny_model(family, **changes)
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=10,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    result = make_oracle(model, make_settings(**off)).run(prompt, 10)
    assert result.tokens == expected.sequences[0, len(prompt) :].tolist()
    assert not result.compactions
    logprobs = torch.cat(expected.logits).log_softmax(-1)
    torch.testing.assert_close(result.logprobs, logprobs, atol=1e-4, rtol=0)


def test_forced_tokens_are_hugging_face_forward(model, prompt):
    forced = [5, 80, 3, 3, 41]
    result = make_oracle(model, make_settings(budget=1000)).run(prompt, 5, forced_tokens=forced)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + forced])).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert result.tokens == forced
    torch.testing.assert_close(result.logprobs, expected, atol=1e-4, rtol=0)
    assert max_logprob_difference(result.token_logprobs, expected[torch.arange(5), forced]) < 1e-4


def test_bundled_model_is_hugging_face_forward(smollm):
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    token_ids = AutoTokenizer.from_pretrained(smollm)(oracle.__doc__).input_ids[:160]
    dense = make_oracle(model, Settings(method="none"), block_size=16)
    result = dense.run(token_ids[:150], 10, forced_tokens=token_ids[150:])
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0, 149:-1].log_softmax(-1)
    torch.testing.assert_close(result.logprobs, expected, atol=1e-4, rtol=0)


# With compression: Hugging Face's attention under one mask per layer and head.


def masked_forward(
    model: torch.nn.Module, token_ids: list[int], compactions: list[Compaction]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One plain forward over all tokens in which each query sees what was live at its time.

    Returns
    -------
    torch.Tensor
        Log-probabilities, ``[tokens, vocab]``.
    list[torch.Tensor]
        Rotated keys and values of each layer, ``[2, kv_heads, tokens, head_dim]``.
    """
    count = len(token_ids)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    visible = [
        torch.ones(count, count).tril().bool().repeat(model.config.num_key_value_heads, 1, 1)
        for _ in model.model.layers
    ]
    for compaction in compactions:
        for layer, kept in compaction.kept.items():
            for head in range(len(kept)):
                gone = sorted(set(range(compaction.position)) - set(kept[head].tolist()))
                visible[layer][head, compaction.position :, gone] = False

    def give_mask(layer):
        mask = torch.zeros(visible[layer].shape).masked_fill_(~visible[layer], -1e30)
        mask = mask.repeat_interleave(groups, 0)[None]

        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(give_mask(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            logits = model(torch.tensor([token_ids]), past_key_values=cache).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    slots = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return logits.log_softmax(-1), slots


def brute_force_scores(
    settings: Settings, slots: np.ndarray, layer: int, head: int, position: int, kv_heads: int
) -> list[float]:
    """Scores of one head's candidates, token by token in float64.

    ``slots`` are their keys and values, ``[2, candidates, head_dim]``.
    """
    keys, values = slots
    if settings.method == "knorm":
        return [-math.sqrt(sum(x * x for x in key)) for key in keys]
    if settings.method == "keydiff":
        units = [key / math.sqrt(sum(key * key)) for key in keys]
        mean = sum(units) / len(units)
        return [-float(unit @ mean) / math.sqrt(sum(mean * mean)) for unit in units]
    if settings.method == "kvdiff":
        units = [key / math.sqrt(sum(key * key)) for key in keys]
        mean = sum(units) / len(units)
        cosines = [float(unit @ mean) / math.sqrt(sum(mean * mean)) for unit in units]
        lengths = [math.sqrt(sum(value * value)) for value in values]
        return [
            (length - statistics.fmean(lengths)) / statistics.pstdev(lengths)
            - (cosine - statistics.fmean(cosines)) / statistics.pstdev(cosines)
            for length, cosine in zip(lengths, cosines, strict=True)
        ]
    if settings.method == "streaming":
        return list(range(len(keys)))
    key = 0
    for word in (settings.seed, settings.seed >> 32, layer, position, head):
        key = murmur_finalizer(key + 0x9E3779B9 + word)
    return [float(murmur_finalizer(i * 0x9E3779B9 ^ key) >> 8) for i in range(len(keys))]


def murmur_finalizer(word: int) -> int:
    """MurmurHash3's last step."""
    word %= 2**32
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


RATIO = {"keep_ratio": 0.6, "pyramid_beta": 2.0, "skip_layers": (1,)}
CASES = [
    (method, phase, changes)
    for method in ("knorm", "keydiff", "kvdiff", "streaming", "random")
    for phase in ("after_prefill", "during_prefill", "decode")
    for changes in ({}, {"pyramid_beta": 3.0, "seed": 7}, RATIO)
    if not (phase == "decode" and changes is RATIO)
]


@pytest.mark.parametrize(("method", "phase", "changes"), CASES)
def test_compressed_run_is_masked_hugging_face(method, phase, changes, model, prompt):
    if phase == "decode" and not changes:
        changes = {"budget": 12}
    settings = make_settings(method=method, phase=phase, **changes)
    bands = 2 if settings.pyramid_beta != 1 else 1
    result = make_oracle(model, settings, bands).run(prompt, 34)
    assert len(result.compactions) >= 2

    token_ids = prompt + result.tokens
    logprobs, slots = masked_forward(model, token_ids, result.compactions)
    expected = logprobs[PROMPT_LENGTH - 1 : -1]
    torch.testing.assert_close(result.logprobs, expected, atol=1e-4, rtol=0)

    base = 52 if phase == "decode" else 0
    sinks = 0 if phase == "decode" else settings.sink_tokens
    live = [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    seen = [0] * LAYERS
    for compaction in result.compactions:
        for layer, kept in compaction.kept.items():
            fresh = list(range(seen[layer], compaction.position))
            seen[layer] = compaction.position
            for head in range(KV_HEADS):
                tokens = live[layer][head] + fresh
                count = compaction.candidate_blocks * BLOCK
                candidates = tokens[base : base + count]
                scores = brute_force_scores(
                    settings,
                    slots[layer][:, head, candidates].double().numpy(),
                    layer,
                    head,
                    compaction.position,
                    KV_HEADS,
                )
                order = sorted(range(sinks, count), key=lambda i: (-scores[i], i))
                stay = [*range(sinks), *order[: compaction.kept_blocks * BLOCK - sinks]]
                live[layer][head] = kept[head].tolist()
                assert compaction.candidates[layer][head].tolist() == candidates
                # Equal tokens have equal norms in layer 0, so which of them stays is a matter of
                # rounding: the kept scores must be the same, and all else exactly.
                chosen = live[layer][head][base : base + len(stay)]
                untouched = live[layer][head][:base] + live[layer][head][base + len(stay) :]
                assert chosen == sorted(set(chosen) & set(candidates))
                assert chosen[:sinks] == candidates[:sinks]
                assert untouched == tokens[:base] + tokens[base + count :]
                assert sorted(scores[candidates.index(token)] for token in chosen) == (
                    pytest.approx(sorted(scores[i] for i in stay), rel=1e-5, abs=1e-5)
                )


@pytest.mark.parametrize("method", ["knorm", "keydiff", "random"])
def test_eviction_matters_and_heads_differ(method, model, prompt):
    full = make_oracle(model, make_settings(method="none")).run(prompt, 12)
    settings = make_settings(method=method)
    result = make_oracle(model, settings).run(prompt, 12, forced_tokens=full.tokens)
    # The first token is drawn from the exact prefill, the others are not.
    torch.testing.assert_close(result.logprobs[0], full.logprobs[0], atol=1e-6, rtol=0)
    assert (result.logprobs[1:] - full.logprobs[1:]).abs().amax(1).min() > 1e-3
    kept = result.compactions[0].kept
    assert not torch.equal(kept[0][0], kept[0][1])
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("phase", ["after_prefill", "during_prefill"])
def test_streaming_is_sinks_and_a_window(phase, model, prompt):
    result = make_oracle(model, make_settings(method="streaming", phase=phase)).run(prompt, 34)
    assert result.compactions
    for compaction in result.compactions:
        for kept in compaction.kept.values():
            window = kept.shape[1] - 3
            expected = [0, 1, 2, *range(compaction.position - window, compaction.position)]
            assert kept.tolist() == [expected] * KV_HEADS


def test_one_decoded_token_never_compacts_after_prefill(model, prompt):
    assert not make_oracle(model, make_settings()).run(prompt, 1).compactions
    assert make_oracle(model, make_settings()).run(prompt, 2).compactions


def test_compactions_follow_the_planned_trajectory(model, prompt):
    settings = make_settings(phase="during_prefill", pyramid_beta=3.0, skip_layers=(0,))
    dense = make_oracle(model, settings, bands=2)
    result = dense.run(prompt, 30)
    assert dense.band_layers == [(1,), (2,)]
    for band, budget in enumerate(dense.band_budgets):
        planned = planned_trajectory(settings, BLOCK, PROMPT_LENGTH, PROMPT_LENGTH + 29, budget)
        done = [c for c in result.compactions if c.band == band]
        assert planned == [
            (
                c.position,
                c.kept[band + 1].shape[1] + (c.candidate_blocks - c.kept_blocks) * BLOCK,
                c.candidate_blocks,
                c.kept_blocks,
            )
            for c in done
        ]
    assert all(0 not in c.kept for c in result.compactions)


def test_oracle_refuses_what_it_does_not_know(model):
    with pytest.raises(ValueError, match="float32"):
        make_oracle(tiny_model().bfloat16(), make_settings())
    with pytest.raises(ValueError, match="one budget per band"):
        DenseOracle(model, make_settings(), BLOCK, [(0, 1, 2)], [])
    with pytest.raises(ValueError, match="forced tokens"):
        make_oracle(model, make_settings()).run([1, 2], 3, forced_tokens=[1])


# The arithmetic, against numbers worked out by hand.


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("after_prefill", [100, 132, 164, 196]),
        ("during_prefill", [32, 64, 96, 100, 132, 164, 196]),
        ("decode", [132, 164, 196]),
    ],
)
def test_grid(phase, expected):
    settings = Settings(phase=phase, interval=32)
    assert [t for t in range(200) if is_grid_position(settings, 100, t)] == expected


def test_grid_when_the_prompt_ends_on_it():
    settings = Settings(phase="during_prefill", interval=32)
    assert [t for t in range(140) if is_grid_position(settings, 96, t)] == [32, 64, 96, 128]


@pytest.mark.parametrize(
    ("phase", "prompt_length", "base"),
    [
        ("after_prefill", 100, 0),
        ("during_prefill", 100, 0),
        ("decode", 100, 112),
        ("decode", 112, 112),
        ("decode", 1, 16),
    ],
)
def test_base(phase, prompt_length, base):
    assert untouched_base(Settings(phase=phase), 16, prompt_length) == base


@pytest.mark.parametrize(
    ("changes", "live", "budget", "expected"),
    [
        # n = 100, e = (100 - 8) // 16 = 5, u = 20, k = (64 - 20) // 16 = 2.
        ({}, 100, 64, (5, 2)),
        # Not over the budget.
        ({}, 64, 64, None),
        # One over: e = 57 // 16 = 3, u = 17, k = 47 // 16 = 2.
        ({}, 65, 64, (3, 2)),
        # Not one block is old enough.
        ({"recent_tokens": 85}, 100, 64, None),
        # e = 1 and k is at least 1: nothing to gain.
        ({"recent_tokens": 84}, 100, 64, None),
        # e = 2, u = 68 leaves nothing of the budget: k = 1.
        ({"recent_tokens": 68}, 100, 64, (2, 1)),
        # 33 sinks need 3 blocks.
        ({"sink_tokens": 33}, 100, 64, (5, 3)),
        ({"sink_tokens": 65}, 100, 64, None),
        # No recent window: e = 6, u = 4, k = 60 // 16 = 3.
        ({"recent_tokens": 0}, 100, 64, (6, 3)),
        # A quarter of 64 is recent: e = 84 // 16 = 5; half: e = 68 // 16 = 4, u = 36, k = 1.
        ({"recent_ratio": 0.25}, 100, 64, (5, 2)),
        ({"recent_ratio": 0.5}, 100, 64, (4, 1)),
        # All, but for two blocks less one token: 33, u = 36.
        ({"recent_ratio": 1.0}, 100, 64, (4, 1)),
        # The sinks' two blocks leave room for 17 more: e = 83 // 16 = 5, u = 20, k = 2.
        ({"recent_ratio": 1.0, "sink_tokens": 17}, 100, 64, (5, 2)),
        # More than that share: e = 60 // 16 = 3.
        ({"recent_ratio": 1.0, "recent_tokens": 40}, 100, 64, (3, 1)),
        ({"prune_after": 100}, 100, 64, (5, 2)),
        ({"prune_after": 101}, 100, 64, None),
        ({"method": "none"}, 100, 64, None),
    ],
)
def test_planned_blocks_of_a_budget(changes, live, budget, expected):
    settings = Settings(**{"recent_tokens": 8, "recent_ratio": 0.0, "budget": 64, **changes})
    assert planned_blocks(settings, 16, 0, live, live, budget, FLAT) == expected


def test_planned_blocks_in_phase_decode():
    settings = Settings(
        phase="decode", recent_tokens=8, recent_ratio=0.0, budget=48, sink_tokens=40
    )
    # n = 164 - 112 = 52 > 48, e = 44 // 16 = 2, u = 20, k = 28 // 16 = 1; no sinks.
    assert planned_blocks(settings, 16, 112, 164, 164, 48, FLAT) == (2, 1)
    # n = 20: within the budget.
    assert planned_blocks(settings, 16, 112, 132, 132, 48, FLAT) is None
    # Still inside the prompt's last block: n < 0.
    assert planned_blocks(settings, 16, 112, 105, 105, 48, FLAT) is None


@pytest.mark.parametrize(
    ("ratio", "share", "position", "live", "expected"),
    [
        # T = 30, e = 5, u = 20, k = ceil(10 / 16) = 1.
        (0.3, FLAT, 100, 100, (5, 1)),
        # T = 50, k = ceil(30 / 16) = 2.
        (0.5, FLAT, 100, 100, (5, 2)),
        # T = 100: everything.
        (1.0, FLAT, 100, 100, None),
        # T = 15 < u: k = 1.
        (0.15, FLAT, 100, 100, (5, 1)),
        # A share of 1.5: T = 75, k = ceil(55 / 16) = 4; of 3: T = 150.
        (0.5, Fraction(3, 2), 100, 100, (5, 4)),
        (0.5, Fraction(3), 100, 100, None),
        # Later: T is a share of all computed tokens. T = 66, e = 76 // 16 = 4, u = 20, k = 3.
        (0.5, FLAT, 132, 84, (4, 3)),
        (0.6, FLAT, 132, 84, None),
        # T = 56 exactly, where floating point says 57: e = 12, u = 8, k = 48 / 16 = 3.
        (0.28, FLAT, 200, 200, (12, 3)),
        # T = 102 exactly, where floating point says 103: e = 8, u = 22, k = 80 / 16 = 5.
        (0.68, FLAT, 150, 150, (8, 5)),
    ],
)
def test_planned_blocks_of_a_ratio(ratio, share, position, live, expected):
    settings = Settings(recent_tokens=8, recent_ratio=0.0, keep_ratio=ratio)
    assert planned_blocks(settings, 16, 0, position, live, None, share) == expected


def test_trajectory_after_prefill():
    settings = Settings(recent_tokens=8, recent_ratio=0.0, budget=64, interval=32)
    # 100 -> 20 + 32 = 52, 84 -> 52 twice; position 196 itself is never computed.
    assert planned_trajectory(settings, 16, 100, 196, 64) == [
        (100, 100, 5, 2),
        (132, 84, 4, 2),
        (164, 84, 4, 2),
    ]
    assert planned_trajectory(settings, 16, 100, 100, 64) == []


def test_trajectory_of_a_short_interval():
    settings = Settings(recent_tokens=8, recent_ratio=0.0, budget=64, interval=10)
    # 100 -> 52, 62 is within the budget, 72: e = 4, u = 8, k = 56 // 16 = 3 -> 56, 66: e = 3,
    # u = 18, k = 46 // 16 = 2 -> 50.
    assert planned_trajectory(settings, 16, 100, 131, 64) == [
        (100, 100, 5, 2),
        (120, 72, 4, 3),
        (130, 66, 3, 2),
    ]


def test_trajectory_during_prefill():
    settings = Settings(
        recent_tokens=8, recent_ratio=0.0, budget=64, interval=40, phase="during_prefill"
    )
    # 40 within; 80: e = 4, u = 16, k = 48 // 16 = 3 -> 64; 100 (the prompt's end): 84,
    # e = 4, u = 20, k = 2 -> 52; 140: 92, e = 5, u = 12, k = 3 -> 60.
    assert planned_trajectory(settings, 16, 100, 141, 64) == [
        (80, 80, 4, 3),
        (100, 84, 4, 2),
        (140, 92, 5, 3),
    ]


def test_trajectory_in_phase_decode():
    settings = Settings(recent_tokens=8, recent_ratio=0.0, budget=48, interval=32, phase="decode")
    # Base 112. 132: n = 20; 164: n = 52 -> 36 (live 148); 196: n = 68, e = 3, u = 20, k = 1
    # -> 36 again.
    assert planned_trajectory(settings, 16, 100, 197, 48) == [(164, 164, 2, 1), (196, 180, 3, 1)]


def test_band_budgets_of_a_pyramid():
    layers, budgets = band_budgets(Settings(budget=768, pyramid_beta=4.0), 30, 16, 6)
    assert layers == [tuple(range(first, first + 5)) for first in range(0, 30, 5)]
    # 768 times 0.95, 0.825, 0.7, 0.575, 0.45 and 0.325, rounded up to blocks.
    assert budgets == [736, 640, 544, 448, 352, 256]


def test_band_budgets_are_exact():
    # 384 * 0.875 = 336 is a whole number of blocks; floating point says a little more.
    settings = Settings(budget=384, pyramid_beta=2.5)
    assert band_budgets(settings, 12, 16, 2)[1][0] == 336
    assert band_budgets(settings, 12, 16, 12)[1][0] == 384


def test_band_budgets_skip_layers():
    settings = Settings(budget=100, skip_layers=(0, 3))
    assert band_budgets(settings, 6, 16, 3) == ([(1, 2), (4,), (5,)], [112, 112, 112])
    assert band_budgets(Settings(keep_ratio=0.5), 5, 16, 2) == ([(0, 1, 2), (3, 4)], [None, None])
    with pytest.raises(ValueError, match="5 bands of 4 layers"):
        band_budgets(settings, 6, 16, 5)


@st.composite
def requests(draw):
    """Settings, block size, prompt length, computed tokens and the budget in tokens."""
    block_size = draw(st.sampled_from([1, 4, 16]))
    phase = draw(st.sampled_from(["after_prefill", "during_prefill", "decode"]))
    how = {"budget": draw(st.integers(1, 200))}
    if phase != "decode" and draw(st.booleans()):
        how = {"keep_ratio": draw(st.floats(0.01, 1))}
    settings = Settings(
        phase=phase,
        sink_tokens=draw(st.integers(0, 40)),
        recent_tokens=draw(st.integers(0, 80)),
        recent_ratio=draw(st.sampled_from([0.0, 0.5, 1.0])),
        interval=draw(st.integers(1, 150)),
        prune_after=draw(st.sampled_from([0, 100])),
        **how,
    )
    prompt_length = draw(st.integers(1, 400))
    budget = band_budgets(settings, 1, block_size, 1)[1][0]
    return settings, block_size, prompt_length, prompt_length + draw(st.integers(0, 400)), budget


@given(requests())
@hypothesis_settings(max_examples=200, deadline=None)
def test_trajectory_properties(request_):
    settings, block_size, prompt_length, computed, budget = request_
    base = untouched_base(settings, block_size, prompt_length)
    sinks = 0 if settings.phase == "decode" else settings.sink_tokens
    floor = max(block_size, sinks + -sinks % block_size)
    removed = 0
    planned = planned_trajectory(settings, block_size, prompt_length, computed, budget)
    for position, live, e, k in planned:
        assert live == position - removed
        assert position >= settings.prune_after
        assert 0 < k < e
        kept = budget or math.ceil(Fraction(str(settings.keep_ratio)) * position)
        share = min(int(settings.recent_ratio * kept), kept - floor - block_size + 1)
        recent = max(settings.recent_tokens, share)
        assert base + e * block_size <= live - recent
        removed += (e - k) * block_size
        after = position - removed - base
        untouched = after - k * block_size
        assert recent <= untouched < recent + block_size
        least = untouched + floor
        if budget is None:
            target = math.ceil(Fraction(str(settings.keep_ratio)) * position)
            assert target <= after < max(target + block_size, least + 1)
        else:
            assert after <= max(budget, least)
            assert after > budget - block_size or k * block_size == floor
    if budget is not None and not settings.prune_after and settings.phase != "decode":
        # Between two grid positions a band holds at most its budget and an interval, or what
        # sinks and recent tokens need.
        least = settings.recent_tokens + block_size - 1 + floor
        held, done = 0, {position: (e - k) * block_size for position, _, e, k in planned}
        for position in range(computed):
            held -= done.get(position, 0)
            held += 1
            if position >= prompt_length or settings.phase == "during_prefill":
                assert held <= max(budget, least) + settings.interval


# Comparing with another implementation.


def record(scores: list[list[float]], keep: int, sinks: int = 1) -> Compaction:
    """A compaction of layer 0: candidates are the even positions, two tokens follow."""
    table = torch.tensor(scores)
    table[:, :sinks] = math.inf
    candidates = (torch.arange(table.shape[1]) * 2).repeat(len(table), 1)
    chosen = candidates[oracle.best_candidates(table, keep)].view(-1, keep)
    tail = torch.tensor([100, 101]).repeat(len(table), 1)
    kept = torch.cat([chosen, tail], 1)
    return Compaction(102, 0, 2, 1, {0: kept}, {0: candidates}, {0: table})


def test_best_candidates_breaks_ties_by_age():
    compaction = record([[9.0, 1.0, 3.0, 1.0, 1.0, 2.0], [0.0, 5.0, 5.0, 5.0, 5.0, 5.0]], 4)
    assert compaction.kept[0].tolist() == [[0, 2, 4, 10, 100, 101], [0, 2, 4, 6, 100, 101]]


def test_kept_sets_agree_up_to_near_ties():
    scores = [[0.0, 5.0, 3.0, 3.00001, 1.0, 4.0]]
    compaction = record(scores, 4)  # keeps 0, 2, 6, 10; drops 4, 8
    assert compaction.kept[0].tolist() == [[0, 2, 6, 10, 100, 101]]
    swapped = torch.tensor([[0, 2, 4, 10, 100, 101]])
    assert kept_sets_agree(compaction, 0, compaction.kept[0], rtol=0)
    assert kept_sets_agree(compaction, 0, swapped, rtol=1e-5)
    assert not kept_sets_agree(compaction, 0, swapped, rtol=1e-7)
    for wrong in (
        [[0, 2, 8, 10, 100, 101]],  # position 8 scores 1
        [[0, 4, 6, 10, 100, 101]],  # position 2 scores 5
        [[2, 4, 6, 10, 100, 101]],  # the sink is gone
        [[0, 2, 6, 10, 100, 102]],  # not among the candidates
        [[0, 2, 6, 10, 101, 100]],
        [[0, 2, 6, 6, 100, 101]],
        [[0, 2, 6, 10, 100]],
    ):
        assert not kept_sets_agree(compaction, 0, torch.tensor(wrong), rtol=1e-5)


def test_equal_scores_may_be_swapped_with_zero_tolerance():
    compaction = record([[0.0, 2.0, 2.0, 1.0]], 2)
    assert kept_sets_agree(compaction, 0, torch.tensor([[0, 4, 100, 101]]), rtol=0)
    assert not kept_sets_agree(compaction, 0, torch.tensor([[0, 6, 100, 101]]), rtol=0)


def test_forced_kept_is_followed(model, prompt):
    dense = make_oracle(model, make_settings())
    free = dense.run(prompt, 20)
    first = free.compactions[0]
    same = {(first.position, layer): kept for layer, kept in first.kept.items()}
    again = dense.run(prompt, 20, forced_kept=same)
    assert torch.equal(again.logprobs, free.logprobs)

    # Swap in another token of head 0 in layer 1, as an implementation in a near tie would.
    mine = first.kept[1].clone()
    dropped = set(first.candidates[1][0].tolist()) - set(mine[0].tolist())
    mine[0, 10] = min(dropped)
    mine = mine.sort(dim=1).values
    followed = dense.run(prompt, 20, free.tokens, forced_kept={(first.position, 1): mine})
    assert torch.equal(followed.compactions[0].kept[1], first.kept[1])
    replaced = [
        replace(followed.compactions[0], kept={**first.kept, 1: mine}),
        *followed.compactions[1:],
    ]
    logprobs, _ = masked_forward(model, prompt + free.tokens, replaced)
    expected = logprobs[PROMPT_LENGTH - 1 : -1]
    torch.testing.assert_close(followed.logprobs, expected, atol=1e-4, rtol=0)
    assert (followed.logprobs - free.logprobs).abs().max() > 1e-4

    with pytest.raises(ValueError, match="expected"):
        dense.run(prompt, 20, forced_kept={(first.position, 1): mine[:, 1:]})
    again = free.compactions[1]
    dead = again.kept[1].clone()
    dead[0, 3] = min(dropped)
    with pytest.raises(ValueError, match="dead"):
        dense.run(prompt, 20, forced_kept={(again.position, 1): dead})


def test_max_logprob_difference():
    assert max_logprob_difference([-1.0, -2.0], [-1.5, -2.25]) == 0.5
    assert math.isnan(max_logprob_difference([-1.0, -2.0], [-1.0, math.nan]))
    with pytest.raises(ValueError, match="shapes"):
        max_logprob_difference([-1.0], [-1.0, -2.0])
