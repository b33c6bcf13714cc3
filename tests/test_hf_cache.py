"""CompressedCache inside transformers: same as plain, batches, beams, refusals."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    Qwen3Config,
    T5Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_kvcompress.bands import plan_bands
from vllm_kvcompress.hf import CompressedCache
from vllm_kvcompress.hf.attention import register
from vllm_kvcompress.hf.plan import Plan
from vllm_kvcompress.methods import METHODS, ScoreContext, select_tokens
from vllm_kvcompress.scheduler.schedule import Schedule
from vllm_kvcompress.scheduler.trajectory import Trajectory
from vllm_kvcompress.settings import SettingsError, parse_settings

SMALL: dict[str, Any] = {"budget": 24, "recent_tokens": 6, "interval": 4}
NEVER = {"budget": 500}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model.config.max_position_embeddings = 128  # merging needs a slot per digit of it
    return model


def random_ids(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(5, 500, (length,), generator=generator) for length in lengths]


def generated(model: Any, cache: Any, ids: torch.Tensor, new: int = 20, **options: Any) -> Any:
    defaults = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **(defaults | options),
    )


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    mask = [torch.arange(longest) >= longest - len(prompt) for prompt in prompts]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask).long()}


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_beams": 3}],
    ids=["greedy", "sample", "beams", "sampled beams"],
)
@pytest.mark.parametrize("method", ["knorm", "merge", "none"])
def test_a_budget_never_reached_is_plain_generation(
    model: Any, method: str, options: dict[str, Any]
) -> None:
    inputs = padded(random_ids(30, 21))
    outputs = []
    for cache in (None, CompressedCache({"method": method} | NEVER)):
        torch.manual_seed(7)
        outputs.append(
            model.generate(
                **inputs, past_key_values=cache, max_new_tokens=12, pad_token_id=0, **options
            )
        )
    assert torch.equal(*outputs)


CASES: dict[str, dict[str, Any]] = {
    "knorm": {},
    "keydiff": {"method": "keydiff"},
    "kvdiff": {"method": "kvdiff"},
    "random": {"method": "random", "seed": 3},
    "streaming": {"method": "streaming", "keep_ratio": 0.5, "budget": None},
    "merge": {"method": "merge"},
    "best": {"method": "merge", "pooling": "best", "merge_weighting": "none"},
    "pyramid": {"budget": 40, "pyramid_beta": 2.0, "skip_layers": (2,)},
    "decode": {"phase": "decode", "budget": 8, "recent_tokens": 2},
    "merge-decode": {"method": "merge", "phase": "decode", "budget": 14, "recent_tokens": 2},
    "during_prefill": {"phase": "during_prefill"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_padded_row_is_what_it_is_alone(model: Any, case: str) -> None:
    """Rows of 41, 18 and 30 tokens: one starts over its budget, one never gets there."""
    settings = SMALL | {"prune_after": 20} | CASES[case]
    prompts = random_ids(41, 10, 30)
    cache = CompressedCache(settings)
    inputs = padded(prompts)
    batch = generated(model, cache, inputs.pop("input_ids"), **inputs)
    assert cache.nbytes < cache.full_nbytes
    for row, prompt in enumerate(prompts):
        alone = generated(model, CompressedCache(settings), prompt[None])
        assert torch.equal(batch.sequences[row, -20:], alone.sequences[0, -20:])
        measured = torch.stack(batch.logits)[:, row].log_softmax(-1)
        expected = torch.stack(alone.logits)[:, 0].log_softmax(-1)
        torch.testing.assert_close(measured, expected, atol=1e-3, rtol=0)


def test_padding_is_never_kept(model: Any) -> None:
    cache = CompressedCache(SMALL)
    with torch.no_grad():
        model(**padded(random_ids(41, 12, 30)), past_key_values=cache)
    for layer in cache.layers:
        columns = layer.slot_columns()
        assert columns.shape == (3, 4, 24)
        assert (columns[1] == torch.tensor([*[-1] * 12, *range(29, 41)])).all()
        assert columns[2].min() == 11  # its first token; there are 11 columns of padding
        assert (columns[:, :, -6:] == torch.arange(35, 41)).all()


def test_methods_know_layer_and_position(model: Any) -> None:
    """What stays is what the method file says for this layer, seed and length."""
    (ids,) = random_ids(41)
    cache = CompressedCache(SMALL | {"method": "random", "seed": 3})
    with torch.no_grad():
        model(ids[None], past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        context = ScoreContext(index, 41, total_heads=4)
        scores = METHODS["random"](3).score(torch.empty(4, 35, 1), context)
        expected = select_tokens(scores, 18, 4)
        assert torch.equal(layer.slot_columns()[0, :, :18], expected)


def test_padded_beams_carry_their_own_slots(model: Any) -> None:
    prompts = random_ids(41, 18)
    beams = {"num_beams": 3, "output_scores": True}
    inputs = padded(prompts)
    batch = generated(model, CompressedCache(SMALL), inputs.pop("input_ids"), **inputs, **beams)
    for row, prompt in enumerate(prompts):
        alone = generated(model, CompressedCache(SMALL), prompt[None], **beams)
        assert torch.equal(batch.sequences[row, -20:], alone.sequences[0, -20:])
        assert batch.sequences_scores[row].item() == pytest.approx(
            alone.sequences_scores[0].item(), abs=1e-4
        )


def test_a_prompt_in_chunks_is_the_prompt_at_once(model: Any) -> None:
    (ids,) = random_ids(41)
    once = generated(model, CompressedCache(SMALL), ids[None])
    cache = CompressedCache(SMALL, prompt_tokens=41)
    chunks = generated(model, cache, ids[None], prefill_chunk_size=16)
    assert torch.equal(once.sequences, chunks.sequences)
    for told, held in ((41, 32), (None, 24)):
        cache = CompressedCache(SMALL, prompt_tokens=told)
        with torch.no_grad():
            for chunk in ids[None, :32].split(16, dim=1):
                model(chunk, past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == held


def test_during_prefill_bounds_a_prompt_in_chunks(model: Any) -> None:
    (ids,) = random_ids(96)
    cache = CompressedCache(SMALL | {"phase": "during_prefill"}, prompt_tokens=96)
    held = []
    with torch.no_grad():
        for chunk in ids[None].split(8, dim=1):
            model(chunk, past_key_values=cache)
            held.append(cache.layers[0].keys.shape[2])
    assert held == [8, 16, *[24] * 10]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep_ratio": 0.4, "budget": None},
        {"prune_after": 47},
        {"phase": "decode", "budget": 9, "recent_tokens": 2},
        {"phase": "during_prefill"},
        {"method": "merge"},
        {"pyramid_beta": 1.7, "budget": 40, "skip_layers": (3,)},
    ],
)
@pytest.mark.parametrize("prompt", [5, 24, 25, 61])
def test_when_and_how_much_is_as_in_the_paged_cache(changes: dict[str, Any], prompt: int) -> None:
    """One token per call from the start, against the scheduler's trajectory."""
    settings = parse_settings(SMALL | changes)
    plan = Plan.of(settings, 4, longest=128)
    layered = settings.model_copy(update={"bands": 4 - len(settings.skip_layers)})
    bands = plan_bands(layered, 4, 1, longest=128)
    schedule = Schedule.of(settings, [band.limits for band in bands], 1, 128)
    trajectory = Trajectory(schedule, prompt)
    held = [0] * 4
    base = prompt if settings.phase == "decode" else 0
    for tokens in range(1, 120):
        held = [slots + 1 for slots in held]
        if plan.passes_grid(tokens - 1, tokens, prompt):
            for layer in range(4):
                step = plan.step(layer, base, held[layer], tokens)
                held[layer] -= step.old - step.kept if step else 0
        trajectory.advance(tokens)
        for group, band in enumerate(bands):
            for layer in band.layers:
                assert held[layer] == tokens - trajectory.removed[group], (tokens, layer)
    assert min(held) < 119


def test_rows_can_be_repeated_and_chosen(model: Any) -> None:
    cache = CompressedCache(SMALL)
    inputs = padded(random_ids(41, 30))
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(3)
        twin.batch_select_indices(torch.tensor([3, 1]))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        token, position = torch.tensor([[7], [9]]), mask.sum(-1, keepdim=True) - 1

        def step(cache: CompressedCache, rows: list[int]) -> torch.Tensor:
            return model(
                token[rows],
                attention_mask=mask[rows],
                position_ids=position[rows],
                past_key_values=cache,
            ).logits

        torch.testing.assert_close(step(twin, [1, 0]), step(cache, [0, 1])[[1, 0]])
    assert cache.get_seq_length() == twin.get_seq_length() == 42


def test_crop_takes_back_what_no_compaction_has_seen(model: Any) -> None:
    (ids,) = random_ids(50)
    cache = CompressedCache(SMALL | {"interval": 100})
    with torch.no_grad():
        model(ids[None, :40], past_key_values=cache)
        expected = model(ids[None, 40:42], past_key_values=cache).logits
        cache.crop(-2)
        assert cache.get_seq_length() == 40
        model(ids[None, 45:48], past_key_values=cache)
        cache.crop(-3)
        again = model(ids[None, 40:42], past_key_values=cache).logits
    torch.testing.assert_close(again, expected)
    with pytest.raises(ValueError, match="the last compaction, at 40 of 42 tokens"):
        cache.crop(-3)
    cache.layers[0].compacted_at = 0
    with pytest.raises(ValueError, match="the last compaction"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [42] * 4
    with pytest.raises(ValueError, match="as a negative number"):
        cache.crop(40)


def test_reset_starts_a_new_request(model: Any) -> None:
    first, second = random_ids(41, 33)
    cache = CompressedCache(SMALL)
    generated(model, cache, first[None])
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    again = generated(model, cache, second[None])
    assert torch.equal(
        again.sequences, generated(model, CompressedCache(SMALL), second[None]).sequences
    )


def test_memory_is_given_back_at_once_and_reported(model: Any) -> None:
    (ids,) = random_ids(100)
    cache = CompressedCache(SMALL | {"interval": 2})
    gc.disable()
    try:
        with torch.no_grad():
            model(ids[None], past_key_values=cache)
            model(ids[None, :1], past_key_values=cache)
            held = [weakref.ref(layer.keys) for layer in cache.layers]
            model(ids[None, :1], past_key_values=cache)
        assert not any(ref() is not None for ref in held)
        nbytes, full_nbytes = cache.nbytes, cache.full_nbytes
        with torch.no_grad():
            model(ids[None, :1], past_key_values=cache)
        held = [weakref.ref(layer.keys) for layer in cache.layers]
        del cache
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()
    # 4 layers, 4 heads of 32 floats, keys and values; 4 bytes for the column of each slot.
    assert nbytes == 4 * 4 * 24 * (2 * 32 * 4 + 4)
    assert full_nbytes == 4 * 4 * 102 * (2 * 32 * 4)


def test_the_default_attention_is_replaced_once() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    register()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_importing_needs_no_vllm() -> None:
    code = "import sys, vllm_kvcompress.hf.__main__; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_smollm_in_bfloat16(smollm: Path) -> None:
    """A real model still finds what it read, with a third of the cache."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    key = "The pass key is 68305. Remember it. 68305 is the pass key. "
    text = filler * 9 + key + filler * 12 + "\nWhat is the pass key? The pass key is"
    inputs = tokenizer(text, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.bfloat16).eval()
    cache = CompressedCache({"budget": 144, "interval": 16})
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert "68305" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert cache.nbytes < 0.4 * cache.full_nbytes


OTHERS = {
    "gpt2": lambda: GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "neox": lambda: GPTNeoXConfig(**WIDTHS, num_attention_heads=4, rotary_pct=0.25),
    "qwen3": lambda: Qwen3Config(**WIDTHS, num_attention_heads=4, num_key_value_heads=2),
    "cohere": lambda: CohereConfig(**WIDTHS, num_attention_heads=4, num_key_value_heads=2),
    "phi": lambda: PhiConfig(**WIDTHS, num_attention_heads=4),
}
WIDTHS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_work_too(name: str) -> None:
    """Of other code than Llama's: same as plain while small, as alone when padded."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[name]()).eval()
    prompts = random_ids(41, 30)
    inputs = padded(prompts)
    ids = inputs.pop("input_ids")
    plain = generated(model, None, ids, **inputs).sequences
    assert torch.equal(generated(model, CompressedCache(NEVER), ids, **inputs).sequences, plain)
    for method in ("knorm", "merge"):
        cache = CompressedCache(SMALL | {"method": method})
        batch = generated(model, cache, ids, **inputs)
        assert [layer.keys.shape[2] for layer in cache.layers] == [24 + 19 % 4] * 2
        alone = generated(model, CompressedCache(SMALL | {"method": method}), prompts[1][None])
        measured = torch.stack(batch.logits)[:, 1].log_softmax(-1)
        expected = torch.stack(alone.logits)[:, 0].log_softmax(-1)
        torch.testing.assert_close(measured, expected, atol=1e-3, rtol=0)


# Refusals


def test_other_attention_is_refused_by_name(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    (ids,) = random_ids(30)
    cache = CompressedCache(SMALL)
    with torch.no_grad():
        model(ids[None], past_key_values=cache)  # exact: nothing has been compressed yet
        with pytest.raises(NotImplementedError, match="attn_implementation='sdpa'"):
            model(ids[None, :1], past_key_values=cache)


def test_sliding_windows_are_refused() -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    with pytest.raises(NotImplementedError, match="sliding window"):
        MistralForCausalLM(config)(torch.ones(1, 4).long(), past_key_values=CompressedCache(SMALL))


def test_a_mask_must_cover_removed_tokens_and_all_heads(model: Any) -> None:
    (ids,) = random_ids(41)
    cache = CompressedCache(SMALL)
    with torch.no_grad():
        model(ids[None], past_key_values=cache)
        mask = torch.ones(1, 1, 1, 25, dtype=torch.bool)
        with pytest.raises(ValueError, match="covers 25 tokens, but the cache has seen 42"):
            model(ids[None, :1], attention_mask=mask, past_key_values=cache)
    mask = torch.ones(1, 8, 41, 41, dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="same for all heads"):
        model(ids[None], attention_mask=mask, past_key_values=CompressedCache(SMALL))


def test_a_mask_added_to_the_logits_works_too(model: Any) -> None:
    """As the boolean one, with padding and with weights of merged slots."""
    inputs = padded(random_ids(41, 30))
    seen = torch.ones(41, 41, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None]
    last = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1).bool()[:, None]
    outputs = []
    for added in (False, True):
        cache = CompressedCache(SMALL | {"method": "merge"})
        for mask, ids in ((seen, inputs["input_ids"]), (last, torch.tensor([[7], [9]]))):
            low = torch.finfo(torch.float32).min
            mask = torch.where(mask, 0.0, low)[:, None] if added else mask[:, None]
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        outputs.append(logits)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgett": 8}, "unknown setting 'budgett'"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"skip_layers": (4,)}, r"skip_layers=\[4\] is not allowed: the model has layers 0 to 3"),
        ({"budget": 8, "recent_tokens": 6}, "do not fit"),
        ({"method": "merge", "budget": 16, "recent_tokens": 6}, "too small for method=merge"),
        ({"skip_heads": "0:0,1:1"}, "skip_heads and boost_heads are not supported in transformers"),
        ({"boost_heads": "0:0,1:1"}, "boost_heads are not supported in transformers caches"),
        ({"method": "knorm+merge"}, r"method=knorm\+merge is not supported in transformers"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_runs(
    model: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        CompressedCache(settings, config=model.config)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SettingsError, match="not int"):
        CompressedCache(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt_tokens=-1"):
        CompressedCache(SMALL, prompt_tokens=-1)
    with pytest.raises(SettingsError, match="encoder-decoder"):
        CompressedCache(SMALL, config=T5Config())


def test_a_layer_that_does_not_exist_is_refused_at_the_latest_in_the_first_call(model: Any) -> None:
    with pytest.raises(SettingsError, match="layers 0 to 3"), torch.no_grad():
        model(random_ids(5)[0][None], past_key_values=CompressedCache({"skip_layers": (9,)}))
