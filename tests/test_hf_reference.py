"""Compressed transformers caches against dense attention written out, one slot at a time.

The reference knows nothing of caches: it runs a whole sequence through the model with an
attention function of its own, which keeps a list of slots per row, layer and KV head, and
compresses the list where the settings say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from vllm_kvcompress.hf import CompressedCache
from vllm_kvcompress.settings import Settings, parse_settings

PROMPT = 40
NEW = 24


@dataclass
class Slot:
    key: torch.Tensor
    value: torch.Tensor
    tokens: list[int]
    plain: list[torch.Tensor] = field(default_factory=list)
    """Keys of the tokens, rotated back to position 0."""


def turned(key: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """A key ``[head_dim]`` turned by ``angle`` per pair, as complex numbers."""
    first, second = key.double().chunk(2)
    number = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag]).float()


def norm_in_12_bits(key: torch.Tensor) -> float:
    mantissa, exponent = math.frexp(float((key * key).sum()))
    return round(mantissa * 4096) / 4096 * 2.0**exponent


def evicted(slots: list[Slot], keep: int, sinks: int) -> list[Slot]:
    """The sinks and the lowest key norms, older ones where equal."""
    rest = sorted(range(sinks, len(slots)), key=lambda i: (norm_in_12_bits(slots[i].key), i))
    return [slots[i] for i in sorted([*range(sinks), *rest[: keep - sinks]])]


def merged(slots: list[Slot], keep: int, sinks: int, pooling: str, angles: Any) -> list[Slot]:
    """Merge the two oldest of the most crowded level until ``keep`` are left."""
    slots = list(slots)
    while len(slots) > keep:
        sizes = [len(slot.tokens) for slot in slots[sinks:]]
        most = max(set(sizes), key=lambda size: (sizes.count(size), size))
        at = [i for i in range(sinks, len(slots)) if len(slots[i].tokens) == most][:2]
        assert at[1] == at[0] + 1, "levels never increase towards newer slots"
        older, newer = slots[at[0]], slots[at[1]]
        if pooling == "mean":
            tokens, plain = older.tokens + newer.tokens, older.plain + newer.plain
            centre = sum(tokens) / len(tokens)
            key = turned(torch.stack(plain).mean(0), angles * centre)
            value = (older.value + newer.value) / 2
        elif pooling == "max":
            key = torch.maximum(older.key, newer.key)
            value = torch.maximum(older.value, newer.value)
        else:
            best = newer if norm_in_12_bits(newer.key) < norm_in_12_bits(older.key) else older
            key, value = best.key, best.value
        slot = Slot(key, value, older.tokens + newer.tokens, older.plain + newer.plain)
        slots[at[0] : at[1] + 1] = [slot]
    return slots


class Reference:
    """Log-probabilities of sequences under compressed attention.

    ``ends`` are the lengths at which forward calls end, the prompt's first.
    """

    def __init__(self, model: Any, settings: Settings, ends: list[int]) -> None:
        self.model, self.settings, self.ends = model, settings, ends
        self.inv_freq = model.model.rotary_emb.inv_freq.double()
        AttentionInterface.register("written_out", self.attend)

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """``[tokens, vocabulary]`` of one sequence ``[tokens]``."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("written_out")
        try:
            with torch.no_grad():
                logits = self.model(ids[None], use_cache=False).logits[0]
        finally:
            self.model.set_attn_implementation(before)
        return logits.log_softmax(-1)

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        assert mask is None
        group = query.shape[1] // key.shape[1]
        output = torch.zeros_like(query)
        for head in range(key.shape[1]):
            slots: list[Slot] = []
            mine = slice(head * group, (head + 1) * group)
            for t in range(key.shape[2]):
                plain = turned(key[0, head, t], -self.inv_freq * t)
                slots.append(Slot(key[0, head, t], value[0, head, t], [t], [plain]))
                keys = torch.stack([slot.key for slot in slots])
                values = torch.stack([slot.value for slot in slots])
                weighted = getattr(self.settings, "merge_weighting", "") == "count"
                counts = [len(slot.tokens) if weighted else 1 for slot in slots]
                logits = query[0, mine, t] @ keys.T * scaling + torch.tensor(counts).log()
                output[0, mine, t] = logits.softmax(-1) @ values
                if t + 1 in self.ends:
                    slots = self.compressed(slots, module.layer_idx, t + 1)
        return output.transpose(1, 2), None

    def compressed(self, slots: list[Slot], layer: int, tokens: int) -> list[Slot]:
        """What is left of a head's slots after ``tokens`` tokens, if that is a grid point."""
        settings, prompt = self.settings, self.ends[0]
        base = prompt if settings.phase == "decode" else 0
        if layer in settings.skip_layers or tokens < settings.prune_after:
            return slots
        if (tokens - prompt) % settings.interval or (base and tokens == prompt):
            return slots
        slope = 1 / Fraction(str(settings.pyramid_beta)) - 1
        share = 1 + Fraction(layer, self.model.config.num_hidden_layers) * slope
        if settings.budget is not None:
            allowed = math.ceil(settings.budget * share)
        else:
            allowed = math.ceil(Fraction(str(settings.keep_ratio)) * share * tokens)
        if len(slots) - base <= allowed:
            return slots
        sinks = 0 if base else settings.sink_tokens
        beside = max(sinks, 1)
        if settings.method == "merge":
            beside = sinks + tokens.bit_length()
        recent = int(Fraction(str(settings.recent_ratio)) * allowed)
        recent = max(settings.recent_tokens, min(recent, allowed - beside))
        end, keep = len(slots) - recent, allowed - recent
        old = slots[base:end]
        if settings.method == "merge":
            old = merged(old, keep, sinks, settings.pooling, self.inv_freq)
        else:
            old = evicted(old, keep, sinks)
        return [*slots[:base], *old, *slots[end:]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def prompt_ids(rows: int = 1, length: int = PROMPT, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 500, (rows, length), generator=generator)


def generated(model: Any, cache: Any, ids: torch.Tensor, new: int = NEW, **options: Any) -> Any:
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


CASES: dict[str, dict[str, Any]] = {
    "knorm": {"budget": 24, "recent_tokens": 6},
    "half recent": {"budget": 24, "recent_tokens": 6, "recent_ratio": 0.5},
    "merged, half recent": {
        "method": "merge",
        "budget": 32,
        "recent_tokens": 2,
        "recent_ratio": 0.5,
    },
    "all recent": {"budget": 24, "recent_tokens": 6, "recent_ratio": 1.0},
    "ratio": {"keep_ratio": 0.5, "recent_tokens": 6, "sink_tokens": 2},
    "pyramid": {"budget": 36, "recent_tokens": 6, "pyramid_beta": 2.5, "skip_layers": (1,)},
    "prune_after": {"budget": 24, "recent_tokens": 6, "prune_after": 50},
    "decode": {"budget": 10, "recent_tokens": 3, "phase": "decode"},
    "mean": {"method": "merge", "budget": 24, "recent_tokens": 6},
    "max": {"method": "merge", "budget": 24, "recent_tokens": 6, "pooling": "max"},
    "best": {"method": "merge", "budget": 24, "recent_tokens": 6, "pooling": "best"},
    "unweighted": {
        "method": "merge",
        "budget": 30,
        "recent_tokens": 6,
        "merge_weighting": "none",
        "pyramid_beta": 1.3,
    },
    "merge-decode": {"method": "merge", "budget": 16, "recent_tokens": 2, "phase": "decode"},
}


@pytest.fixture(scope="module", autouse=True)
def _short_model(model: Any) -> None:
    """Merging needs a slot per binary digit of the longest row: make that a short one."""
    model.config.max_position_embeddings = 128


@pytest.mark.parametrize("case", CASES)
def test_generation_is_the_written_out_attention(model: Any, case: str) -> None:
    settings = parse_settings({"method": "knorm", "interval": 5} | CASES[case])
    cache = CompressedCache(settings)
    ids = prompt_ids()
    output = generated(model, cache, ids)
    sequence = output.sequences[0]
    ends = list(range(PROMPT, PROMPT + NEW))
    expected = Reference(model, settings, ends).log_probs(sequence)[PROMPT - 1 : -1]
    measured = torch.cat(output.logits).log_softmax(-1)
    torch.testing.assert_close(measured, expected, atol=1e-4, rtol=0)
    full = Reference(model, settings, [10_000]).log_probs(sequence)[PROMPT - 1 : -1]
    assert (full - expected).abs().max() > 0.05, "this case compresses nothing that matters"
    assert cache.get_seq_length() == PROMPT + NEW - 1
    assert cache.nbytes < cache.full_nbytes


def test_beams_carry_their_own_slots(model: Any) -> None:
    """The score of each beam is that of its sequence alone."""
    settings = parse_settings({"method": "knorm", "budget": 24, "recent_tokens": 6, "interval": 3})
    beams = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True}
    output = generated(model, CompressedCache(settings), prompt_ids(2), 12, **beams)
    reference = Reference(model, settings, list(range(PROMPT, PROMPT + 12)))
    assert len(output.sequences) == 6
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        steps = reference.log_probs(sequence)[PROMPT - 1 : -1]
        alone = steps.gather(1, sequence[PROMPT:, None]).sum()
        assert score.item() * 12 == pytest.approx(alone.item(), abs=1e-3)  # a mean per token


def test_sampling_draws_from_the_compressed_distribution(model: Any) -> None:
    settings = parse_settings({"method": "merge", "budget": 24, "recent_tokens": 6, "interval": 5})
    torch.manual_seed(3)
    output = generated(model, CompressedCache(settings), prompt_ids(), do_sample=True)
    reference = Reference(model, settings, list(range(PROMPT, PROMPT + NEW)))
    expected = reference.log_probs(output.sequences[0])[PROMPT - 1 : -1]
    measured = torch.cat(output.logits).log_softmax(-1)
    torch.testing.assert_close(measured, expected, atol=1e-4, rtol=0)


def test_a_question_of_several_tokens_after_compression(model: Any) -> None:
    """Causal among themselves, all of them see what is left, at their true positions."""
    settings = parse_settings({"method": "knorm", "budget": 20, "recent_tokens": 6, "interval": 8})
    ids = prompt_ids(length=PROMPT + 11)
    cache = CompressedCache(settings)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        # The grid point at 48 lies inside this call; it is served at the call's end, at 51.
        logits = model(ids[:, PROMPT:], past_key_values=cache).logits[0]
    expected = Reference(model, settings, [PROMPT]).log_probs(ids[0])[PROMPT:]
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-4, rtol=0)
    assert [layer.keys.shape[2] for layer in cache.layers] == [20] * 4


WRONG: dict[str, Callable[[Settings], Settings]] = {
    "one kept more": lambda settings: settings.model_copy(update={"budget": 25}),
    "other sinks": lambda settings: settings.model_copy(update={"sink_tokens": 0}),
    "other grid": lambda settings: settings.model_copy(update={"interval": 6}),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_reference_notices(model: Any, mistake: str) -> None:
    settings = parse_settings({"method": "knorm", "budget": 24, "recent_tokens": 6, "interval": 5})
    output = generated(model, CompressedCache(WRONG[mistake](settings)), prompt_ids())
    reference = Reference(model, settings, list(range(PROMPT, PROMPT + NEW)))
    expected = reference.log_probs(output.sequences[0])[PROMPT - 1 : -1]
    measured = torch.cat(output.logits).log_softmax(-1)
    assert (measured - expected).abs().max() > 1e-3
