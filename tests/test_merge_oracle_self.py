"""The dense oracle of merging against Hugging Face, hand-made cases and its own written rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import oracle
import pytest
import test_oracle_self
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from merge_oracle import (
    DenseMergeOracle,
    MergeCompaction,
    block_spans,
    choices_agree,
    merged_levels,
    needed_bits,
    planned_levels,
    planned_merge,
    ranking_agrees,
    slot_spans,
)
from oracle import band_budgets
from test_oracle_self import BLOCK, KV_HEADS, LAYERS, PROMPT_LENGTH, VOCAB, tiny_model
from transformers import DynamicCache

from vllm_kvcompress.settings import Settings

POOLINGS = ("mean", "max", "best")
WEIGHTINGS = ("count", "none")
KNORM = "knorm+merge"
METHODS = ("merge", KNORM)
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}


model = test_oracle_self.model
prompt = test_oracle_self.prompt


def make_settings(**changes) -> Settings:
    """Small numbers, so that a short request compacts several times."""
    if "keep_ratio" not in changes:
        changes.setdefault("budget", 40 if changes.get("method") == KNORM else 32)
    return Settings(
        **{"method": "merge", "sink_tokens": 3, "recent_tokens": 6, "interval": 8, **changes}
    )


def make_oracle(
    model: torch.nn.Module, settings: Settings, bands: int = 1, block_size: int = BLOCK
) -> DenseMergeOracle:
    layers, budgets = band_budgets(settings, model.config.num_hidden_layers, block_size, bands)
    return DenseMergeOracle(model, settings, block_size, layers, budgets)


# Without compression: Hugging Face's own generate.


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 6, "attention_bias": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
        ("llama", LLAMA3),
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize("off", [{"budget": 1000}, {"prune_after": 1000, "pooling": "best"}])
def test_uncompressed_run_is_hugging_face_generate(family, changes, off, prompt):
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


# With merging: Hugging Face's own attention over a cache that holds every slot as often as it
# counts, merged two slots at a time from what is in that cache.


Slot = tuple[np.ndarray, np.ndarray, int, float]
"""Key and value of one slot of one head, ``[head_dim]``, the token held, and the centre."""


def turned(keys: np.ndarray, angle: float, frequencies: np.ndarray) -> np.ndarray:
    """Rotate keys by a distance in tokens, as complex numbers, ``[..., head_dim]``."""
    half = keys.shape[-1] // 2
    spun = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(1j * angle * frequencies)
    return np.concatenate([spun.real, spun.imag], axis=-1)


class PagedReplay:
    """The merging of one model's cache as a paged implementation does it, slot by slot.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    settings : Settings
    """

    def __init__(self, model: torch.nn.Module, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.frequencies = model.model.rotary_emb.inv_freq.double().numpy()
        heads = range(model.config.num_key_value_heads)
        # Slots of each layer and head by their tokens, in the order of the cache.
        self.cache: list[list[dict[tuple[int, ...], Slot]]] = [
            [{} for _ in heads] for _ in model.model.layers
        ]

    def run(self, token_ids: list[int], compactions: list[MergeCompaction]) -> torch.Tensor:
        """Log-probabilities of all tokens, ``[tokens, vocab]``, with slots as in compactions."""
        logprobs, start = [], 0
        for stop, due in itertools.groupby(compactions, lambda compaction: compaction.position):
            logprobs.append(self.forward(token_ids, start, stop))
            for compaction in due:
                for layer in compaction.layers:
                    self.compact(layer, compaction)
            start = stop
        logprobs.append(self.forward(token_ids, start, len(token_ids)))
        return torch.cat(logprobs)

    def forward(self, token_ids: list[int], start: int, stop: int) -> torch.Tensor:
        """Compute the tokens ``start .. stop-1`` and put their slots into the cache."""
        cache, handles = DynamicCache(config=self.model.config), []
        for index, layer in enumerate(self.model.model.layers):
            mask = torch.full((stop - start, stop - start), -math.inf).triu(1)
            if start:
                copies = [
                    [
                        slot
                        for tokens, slot in slots.items()
                        for _ in tokens[: None if self.settings.merge_weighting == "count" else 1]
                    ]
                    for slots in self.cache[index]
                ]
                keys, values = (
                    torch.tensor(np.array([[slot[part] for slot in head] for head in copies]))
                    for part in (0, 1)
                )
                cache.update(keys[None].float(), values[None].float(), index)
                mask = torch.cat([torch.zeros(stop - start, keys.shape[1]), mask], 1)
            handles.append(layer.self_attn.register_forward_pre_hook(_with(mask), with_kwargs=True))
        try:
            with torch.no_grad():
                logits = self.model(
                    torch.tensor([token_ids[start:stop]]),
                    position_ids=torch.arange(start, stop)[None],
                    past_key_values=cache,
                ).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        for heads, layer in zip(self.cache, cache.layers, strict=True):
            keys, values = layer.keys[0].double().numpy(), layer.values[0].double().numpy()
            for head, slots in enumerate(heads):
                for token in range(start, stop):
                    at = head, token - stop
                    slots[token,] = keys[at], values[at], token, float(token)
        return logits.log_softmax(-1)

    def compact(self, layer: int, compaction: MergeCompaction) -> None:
        for head, old in enumerate(self.cache[layer]):

            def make(tokens: tuple[int, ...], held: int, old: dict = old) -> Slot:
                if tokens in old:
                    return old[tokens]
                middle = len(tokens) // 2
                return self.pool(make(tokens[:middle], held), make(tokens[middle:], held), held)

            members = [
                tuple(tokens)
                for block in compaction.members[layer]
                for tokens in block[head].tolist()
            ]
            follow = [-1] * len(members)
            if layer in compaction.held:
                follow = compaction.held[layer][head].tolist()
            self.cache[layer][head] = {
                tokens: make(tokens, held) for tokens, held in zip(members, follow, strict=True)
            }

    def pool(self, x: Slot, y: Slot, follow: int) -> Slot:
        """Pool a pair of slots; near ties of ``best`` as they were decided there."""
        centre = (x[3] + y[3]) / 2
        if self.settings.pooling == "max":
            return np.maximum(x[0], y[0]), np.maximum(x[1], y[1]), -1, centre
        if self.settings.pooling == "mean":
            unrotated = [turned(slot[0], -slot[3], self.frequencies) for slot in (x, y)]
            key = turned(sum(unrotated) / 2, centre, self.frequencies)
            return key, (x[1] + y[1]) / 2, -1, centre
        norms = [np.linalg.norm(slot[0]) for slot in (x, y)]
        if follow in (x[2], y[2]) and np.isclose(*norms, rtol=1e-5, atol=0):
            return x if follow == x[2] else y
        return x if norms[0] <= norms[1] else y


def _with(mask: torch.Tensor) -> Callable:
    return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask[None, None]})


RATIO = {"keep_ratio": 0.6, "skip_layers": (1,)}
PYRAMID = {"budget": 48, "pyramid_beta": 2.0}
CASES = [
    (method, pooling, weighting, phase, changes)
    for method in METHODS
    for pooling in POOLINGS
    for weighting in WEIGHTINGS
    for phase in ("after_prefill", "during_prefill", "decode")
    for changes in ({}, PYRAMID, RATIO)
    if not (phase == "decode" and changes)
]


@pytest.mark.parametrize(("method", "pooling", "weighting", "phase", "changes"), CASES)
def test_merged_run_is_hugging_face_with_a_merged_cache(
    method, pooling, weighting, phase, changes, model, prompt
):
    settings = make_settings(
        method=method, pooling=pooling, merge_weighting=weighting, phase=phase, **changes
    )
    oracle = make_oracle(model, settings, 2 if changes is PYRAMID else 1)
    result = oracle.run(prompt, 72 if phase == "decode" else 42)
    assert len({compaction.position for compaction in result.compactions}) >= 2
    assert max(level for compaction in result.compactions for level in compaction.levels) >= 2

    replay = PagedReplay(model, settings)
    logprobs = replay.run(prompt + result.tokens, result.compactions)
    torch.testing.assert_close(result.logprobs, logprobs[PROMPT_LENGTH - 1 : -1], atol=2e-4, rtol=0)
    if pooling == "best":
        for layer, heads in enumerate(replay.cache):
            held = np.array([[slot[2] for slot in slots.values()] for slots in heads])
            done = [c for c in result.compactions if layer in c.held]
            if done:
                assert (held[:, : done[-1].slots] == done[-1].held[layer].numpy()).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_other_rotations_and_biases(family, method, prompt):
    model = tiny_model("qwen2") if family == "qwen2" else tiny_model(**LLAMA3)
    settings = make_settings(method=method, pooling="mean")
    result = make_oracle(model, settings).run(prompt, 34)
    logprobs = PagedReplay(model, settings).run(prompt + result.tokens, result.compactions)
    torch.testing.assert_close(result.logprobs, logprobs[PROMPT_LENGTH - 1 : -1], atol=2e-4, rtol=0)


def test_every_choice_matters_and_the_prompt_stays_exact(model, prompt):
    full = make_oracle(model, make_settings(budget=1000)).run(prompt, 12)
    runs = [full.logprobs]
    for method, pooling, weighting in itertools.product(METHODS, POOLINGS, WEIGHTINGS):
        settings = make_settings(method=method, pooling=pooling, merge_weighting=weighting)
        runs.append(make_oracle(model, settings).run(prompt, 12, full.tokens).logprobs)
    for one, other in itertools.combinations(runs, 2):
        torch.testing.assert_close(one[0], other[0], atol=1e-6, rtol=0)
        assert (one[1:] - other[1:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_chunks_do_not_matter(pooling, method, model, prompt, monkeypatch):
    settings = make_settings(method=method, pooling=pooling, phase="during_prefill", interval=16)
    whole = make_oracle(model, settings).run(prompt, 36)
    monkeypatch.setattr(oracle, "QUERY_CHUNK", 3)
    held = {(c.position, layer): held for c in whole.compactions for layer, held in c.held.items()}
    kept = {at: indices for c in whole.compactions for at, indices in kept_indices(c).items()}
    chunked = make_oracle(model, settings).run(prompt, 36, forced_choice=held, forced_kept=kept)
    assert chunked.tokens == whole.tokens
    assert [c.position for c in chunked.compactions] == [48, 50, 66, 82]
    for compaction in chunked.compactions:
        for layer in compaction.held:
            assert choices_agree(compaction, layer, held[compaction.position, layer])
        for layer in compaction.kept:
            assert ranking_agrees(compaction, layer, kept[compaction.position, layer])
    torch.testing.assert_close(chunked.logprobs, whole.logprobs, atol=1e-4, rtol=0)


def kept_indices(compaction: MergeCompaction) -> dict[tuple[int, int], torch.Tensor]:
    """The oracle's own choice of tokens to keep, as another implementation gives it."""
    return {
        (compaction.position, layer): torch.searchsorted(compaction.candidates[layer], kept)
        for layer, kept in compaction.kept.items()
    }


# Slots worked out by hand.


HAND_SPANS = [
    *(range(token, token + 1) for token in range(4)),  # one sink block
    *(range(4 + 8 * slot, 12 + 8 * slot) for slot in range(4)),  # level 3: 4 .. 35
    *(range(36 + 4 * slot, 40 + 4 * slot) for slot in range(4)),  # level 2: 36 .. 51
    *(range(52 + 2 * slot, 54 + 2 * slot) for slot in range(4)),  # level 1: 52 .. 59
    *(range(token, token + 1) for token in range(60, 74)),
]
"""After the compaction at 74, see ``test_planned_levels_by_hand``."""


def first_layer(model: torch.nn.Module, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Unrotated keys and values of layer 0, ``[kv_heads, tokens, head_dim]``."""
    layer = model.model.layers[0]
    with torch.no_grad():
        normed = layer.input_layernorm(model.model.embed_tokens(torch.tensor(token_ids)))
        projected = layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
    shape = len(token_ids), -1, layer.self_attn.head_dim
    keys, values = (heads.view(shape).transpose(0, 1).double().numpy() for heads in projected)
    return keys, values


@pytest.mark.parametrize("pooling", POOLINGS)
def test_slots_by_hand(pooling, model, prompt):
    dense = make_oracle(model, make_settings(pooling=pooling))
    result = dense.run(prompt, 25)  # 74 tokens computed, but no token after that
    assert [compaction.position for compaction in result.compactions] == [50, 58, 66]
    result = dense.run(prompt, 26)
    assert [compaction.position for compaction in result.compactions] == [50, 58, 66, 74]
    assert list(result.compactions[-1].spans) == HAND_SPANS
    blocks, keys, values = dense.slots(0)
    spans = slot_spans(blocks)
    assert spans == [*HAND_SPANS, range(74, 75)]

    unrotated, plain = first_layer(model, prompt + result.tokens)
    frequencies = 10000.0 ** -np.arange(0, 1, 2 / unrotated.shape[-1])
    rotated = np.stack(
        [turned(unrotated[:, token], token, frequencies) for token in range(75)], axis=1
    )
    norms = np.sqrt(np.square(rotated).sum(-1))
    for slot, span in enumerate(spans):
        tokens = list(span)
        for head in range(KV_HEADS):
            if pooling == "mean":
                mean = sum(unrotated[head, token] for token in tokens) / len(tokens)
                key = turned(mean, sum(tokens) / len(tokens), frequencies)
                value = sum(plain[head, token] for token in tokens) / len(tokens)
            elif pooling == "max":
                key = [max(rotated[head, tokens, channel]) for channel in range(8)]
                value = [max(plain[head, tokens, channel]) for channel in range(8)]
            else:
                lowest = min(tokens, key=lambda token: norms[head, token])
                if slot < len(HAND_SPANS):
                    held = int(result.compactions[-1].held[0][head, slot])
                    assert held in tokens
                    assert norms[head, held] == pytest.approx(norms[head, lowest], rel=1e-6)
                    # Equal tokens tie here.
                    ids = prompt + result.tokens
                    assert ids[held] == ids[lowest]
                    lowest = held
                key, value = rotated[head, lowest], plain[head, lowest]
            assert keys[head, slot].tolist() == pytest.approx(key, abs=2e-5)
            assert values[head, slot].tolist() == pytest.approx(value, abs=2e-5)


@pytest.fixture(scope="module")
def distinct() -> list[int]:
    """Tokens of which none is like another, so that norms of layer 0 do not tie."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2)).tolist()


def paired(older: list[tuple[int, ...]], newer: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Members of the slots of two blocks that merge."""
    a, b, c, d = older
    e, f, g, h = newer
    return [a + b, c + d, e + f, g + h]


def ranked_by_hand(
    ranked: list[int], norms: np.ndarray, keep: int
) -> tuple[list[int], list[list[tuple[int, ...]]]]:
    """Tokens kept of those ranked by one head, 3 of them sinks, and blocks of the others."""
    best = sorted(ranked[3:], key=lambda token: norms[token])[: keep - 3]
    kept = sorted([*ranked[:3], *best])
    rest = [(token,) for token in ranked if token not in kept]
    return kept, [rest[start : start + 4] for start in range(0, len(rest), 4)]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_ranked_and_pooled_slots_by_hand(pooling, model, distinct):
    """Layer 0 after the compactions at 50, 58 and 66 of ``test_planned_levels_by_hand``."""
    dense = make_oracle(model, make_settings(method=KNORM, pooling=pooling))
    result = dense.run(distinct[:50], 18, distinct[50:68])
    assert [compaction.position for compaction in result.compactions] == [50, 58, 66]
    unrotated, plain = first_layer(model, distinct[:67])
    frequencies = 10000.0 ** -np.arange(0, 1, 2 / unrotated.shape[-1])
    rotated = np.stack(
        [turned(unrotated[:, token], token, frequencies) for token in range(67)], axis=1
    )
    blocks, keys, values = dense.slots(0)
    for head in range(KV_HEADS):
        norms = np.linalg.norm(rotated[head], axis=-1)
        # 11 blocks ranked, 4 kept; 7 others: three pairs and one.
        kept, (b0, b1, b2, b3, b4, b5, b6) = ranked_by_hand(list(range(44)), norms, 16)
        twos = [paired(b0, b1), paired(b2, b3), paired(b4, b5)]
        first = [*twos[0], *twos[1], *twos[2], *b6, *((token,) for token in kept)]
        assert members_of(result.compactions[0], head)[:32] == first
        # 4 pooled; kept tokens and 44 .. 51 ranked, 4 blocks kept; 2 others: 1 1 1 0 0 0,
        # 2 1 0 0 0, 2 1 1 0.
        kept, (f0, f1) = ranked_by_hand([*kept, *range(44, 52)], norms, 16)
        four, two = paired(twos[0], twos[1]), paired(b6, f0)
        second = [*four, *twos[2], *two, *f1, *((token,) for token in kept)]
        assert members_of(result.compactions[1], head)[:32] == second
        # 4 pooled; kept tokens and 52 .. 59 ranked, 3 blocks kept; 3 others: 2 1 1 0 0 0 0,
        # 2 1 1 1 0 0, 2 2 1 0 0.
        kept, (g0, g1, g2) = ranked_by_hand([*kept, *range(52, 60)], norms, 12)
        pooled = [*four, *paired(twos[2], two), *paired(f1, g0), *g1, *g2]
        third = [*pooled, *((token,) for token in [*kept, *range(60, 66)])]
        assert members_of(result.compactions[2], head) == third
        assert kept[:3] == [0, 1, 2]
        members = [tuple(slot) for block in blocks for slot in block[head].tolist()]
        assert members == [*third, (66,)]
        for slot, tokens in enumerate(members):
            at = list(tokens)
            if pooling == "mean":
                mean = sum(unrotated[head, token] for token in at) / len(at)
                key = turned(mean, sum(at) / len(at), frequencies)
                value = sum(plain[head, token] for token in at) / len(at)
            elif pooling == "max":
                key, value = rotated[head, at].max(0), plain[head, at].max(0)
            else:
                lowest = min(at, key=lambda token: norms[token])
                key, value = rotated[head, lowest], plain[head, lowest]
                assert slot == 38 or result.compactions[2].held[0][head, slot] == lowest
            assert keys[head, slot].tolist() == pytest.approx(key, abs=2e-5)
            assert values[head, slot].tolist() == pytest.approx(value, abs=2e-5)
    # Heads rank for themselves, so their spans and centres differ.
    assert not torch.equal(blocks[0][0], blocks[0][1])
    assert [block.shape[2] for block in blocks] == [4, 4, 2, 1, 1, *[1] * 5]


def members_of(compaction: MergeCompaction, head: int, layer: int = 0) -> list[tuple[int, ...]]:
    return [tuple(slot) for block in compaction.members[layer] for slot in block[head].tolist()]


def test_centres_differ_by_head_by_hand():
    """One layer, four tokens of high norm for one head, other ones for the other."""
    model = tiny_model(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=2
    )
    attention = model.model.layers[0].self_attn
    # Every token's hidden state is its channel; norms by head and token are as told here.
    model.model.embed_tokens.weight.data.zero_()
    tokens = list(range(12))
    model.model.embed_tokens.weight.data[tokens, tokens] = 1.0
    scale = (1 / (1 / 48 + model.config.rms_norm_eps)) ** 0.5
    loud = {0: (1, 2, 5, 6), 1: (0, 3, 4, 7)}
    attention.k_proj.weight.data.zero_()
    for head, high in loud.items():
        for token in tokens:
            size = 5.0 if token in high else 1.0
            attention.k_proj.weight.data[2 * head, token] = size / scale
    settings = make_settings(method=KNORM, budget=8, sink_tokens=0, recent_tokens=0, interval=100)
    dense = make_oracle(model, settings, block_size=2)
    # t = 12: e = 6, bits = 3, k = 4, p = 3, so one block is kept; 5 others: 1 1 0.
    result = dense.run(tokens, 2, [0, 0])
    (compaction,) = result.compactions
    assert compaction.levels == (1, 1, 0, 0)
    # The older of all that are quiet stay.
    assert compaction.kept[0].tolist() == [[0, 3], [1, 2]]
    assert [[tuple(slot) for slot in block[0].tolist()] for block in compaction.members[0]] == [
        [(1, 2), (4, 5)],
        [(6, 7), (8, 9)],
        [(10,), (11,)],
        [(0,), (3,)],
    ]
    assert members_of(compaction, 1)[:4] == [(0, 3), (4, 5), (6, 7), (8, 9)]
    keys = dense.slots(0)[1]
    # Means 5, 3, 3 and 1 turned to 1.5, 4.5, 6.5 and 8.5; of the other head 5 to 1.5 as well.
    for head, slot, size, angle in (
        (0, 0, 5, 1.5),
        (0, 1, 3, 4.5),
        (0, 2, 3, 6.5),
        (0, 3, 1, 8.5),
        (0, 4, 1, 10),
        (0, 7, 1, 3),
        (1, 0, 5, 1.5),
        (1, 1, 3, 4.5),
        (1, 6, 1, 1),
        (1, 7, 1, 2),
    ):
        expected = [size * math.cos(angle), size * math.sin(angle)]
        assert keys[head, slot].tolist() == pytest.approx(expected, abs=1e-4)


def circle_model(key: tuple[float, float]) -> torch.nn.Module:
    """One layer, one head of two channels, so one turn per radian; every key is the same."""
    model = tiny_model(
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        attention_bias=True,
    )
    attention = model.model.layers[0].self_attn
    torch.nn.init.zeros_(attention.k_proj.weight)
    attention.k_proj.bias.data = torch.tensor(key)
    return model


def test_a_mean_points_to_the_centre_of_its_span(prompt):
    settings = make_settings(pooling="mean", keep_ratio=0.6)
    dense = make_oracle(circle_model((2.0, 0.0)), settings)
    result = dense.run(prompt, 2)
    assert result.compactions[0].levels == (0, 2, 1, 1, 0, 0)
    blocks, keys, _ = dense.slots(0)
    spans = slot_spans(blocks)
    # Blocks 1 to 3: tokens 4 .. 19 by fours, 20 .. 35 by twos.
    assert spans[4] == range(4, 8)
    assert keys[0, 4].tolist() == pytest.approx([2 * math.cos(5.5), 2 * math.sin(5.5)], abs=1e-5)
    assert spans[5] == range(8, 12)
    assert keys[0, 5].tolist() == pytest.approx([2 * math.cos(9.5), 2 * math.sin(9.5)], abs=1e-5)
    assert spans[8] == range(20, 22)
    assert keys[0, 8].tolist() == pytest.approx([2 * math.cos(20.5), 2 * math.sin(20.5)], abs=1e-5)
    assert spans[16] == range(36, 37)
    assert keys[0, 16].tolist() == pytest.approx([2 * math.cos(36), 2 * math.sin(36)], abs=1e-5)


def test_max_takes_each_channel_by_itself(prompt):
    dense = make_oracle(circle_model((2.0, 0.0)), make_settings(pooling="max", keep_ratio=0.6))
    dense.run(prompt, 2)
    _, keys, _ = dense.slots(0)
    # Tokens 4 .. 7, as rotated: the cosine is highest at 6, the sine at 7.
    expected = [2 * math.cos(6), 2 * math.sin(7)]
    assert keys[0, 4].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_older_one_is_held_where_norms_are_equal(prompt):
    dense = make_oracle(circle_model((0.0, 0.0)), make_settings(pooling="best"))
    for compaction in dense.run(prompt, 34).compactions:
        assert compaction.held[0].tolist() == [[span.start for span in compaction.spans]]


@pytest.mark.parametrize("method", METHODS)
def test_merging_a_constant_sequence_changes_nothing(method, model):
    same = [7] * 84
    full = make_oracle(model, make_settings(budget=1000))
    wanted = full.run(same[:50], 34, same[50:])
    for weighting in WEIGHTINGS:
        dense = make_oracle(model, make_settings(method=method, merge_weighting=weighting))
        result = dense.run(same[:50], 34, same[50:])
        assert len(result.compactions) == 5
        torch.testing.assert_close(result.logprobs, wanted.logprobs, atol=1e-4, rtol=0)
        frequencies = model.model.rotary_emb.inv_freq.double().numpy()
        for layer in range(LAYERS):
            _, every_key, every_value = full.slots(layer)
            blocks, keys, values = dense.slots(layer)
            key, value = every_key[:, 0].double().numpy(), every_value[:, 0].numpy()
            centres = torch.cat([block.double().mean(2) for block in blocks], 1).numpy()
            for head, slot in np.ndindex(centres.shape):
                # Token 0 is not rotated.
                expected = turned(key[head], centres[head, slot], frequencies)
                np.testing.assert_allclose(keys[head, slot], expected, atol=1e-4)
                np.testing.assert_allclose(values[head, slot], value[head], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_slot_counts_as_often_as_it_has_tokens(method, model):
    """Merging equal keys and values at nearly one place is exact if and only if slots count."""
    # With a very slow rotation all positions are nearly the same one.
    model = tiny_model(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 1e9}
    )
    same = [7] * 50 + list(range(8, 32))
    wanted = make_oracle(model, make_settings(budget=1000)).run(same[:50], 24, same[50:])
    counted, once = (
        make_oracle(model, make_settings(method=method, merge_weighting=weighting)).run(
            same[:50], 24, same[50:]
        )
        for weighting in WEIGHTINGS
    )
    assert counted.compactions
    # Until the compaction at 58 all merged slots are made of equal tokens.
    torch.testing.assert_close(counted.logprobs[:9], wanted.logprobs[:9], atol=1e-4, rtol=0)
    assert (counted.logprobs[9:] - wanted.logprobs[9:]).abs().max() > 1e-3
    assert (once.logprobs[1:] - wanted.logprobs[1:]).abs().amax(1).min() > 1e-2


# Levels, against numbers worked out by hand.


@pytest.mark.parametrize(
    ("levels", "keep", "expected"),
    [
        ([0, 0, 0, 0, 0, 0], 6, [0, 0, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 0], 5, [1, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 0], 4, [1, 1, 0, 0]),
        # Two each: the higher level.
        ([0, 0, 0, 0, 0, 0], 3, [2, 0, 0]),
        ([0, 0, 0, 0, 0, 0], 2, [2, 1]),
        # 10 zeros: 1 0*8, 1 1 0*6, 1 1 1 0*4, 1*4 0 0, 2 1 1 0 0, 2 2 0 0, 3 0 0.
        ([0] * 10, 3, [3, 0, 0]),
        ([0] * 10, 2, [3, 1]),
        ([0] * 8, 1, [3]),
        # The most blocks, not the highest level.
        ([1, 1, 0, 0, 0, 0], 5, [1, 1, 1, 0, 0]),
        ([3, 0, 0, 0, 0], 3, [3, 1, 1]),
        ([3, 1, 1, 0, 0], 3, [3, 2, 1]),
        ([3, 2, 2, 0, 0], 3, [4, 0, 0]),
        # A single block of the next level between others.
        ([5, 2, 0, 0, 0], 4, [5, 2, 1, 0]),
        ([0], 1, [0]),
        ([], 1, []),
    ],
)
def test_merged_levels_by_hand(levels, keep, expected):
    assert merged_levels(levels, keep) == expected


@pytest.mark.parametrize(("levels", "keep"), [([0] * 6, 1), ([0] * 7, 2), ([2, 1], 1)])
def test_levels_that_do_not_fit(levels, keep):
    with pytest.raises(ValueError, match="do not fit"):
        merged_levels(levels, keep)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            # t = 50: n = 50, e = 44 // 4 = 11, u = 6, k = 26 // 4 = 6; one sink block, 10 -> 5.
            # Then n = 38, e = 8 every 8 tokens: two new blocks each time.
            [
                (50, 11, (0, 2, 1, 1, 0, 0)),
                (58, 8, (0, 2, 2, 1, 0, 0)),
                (66, 8, (0, 3, 1, 1, 0, 0)),
                (74, 8, (0, 3, 2, 1, 0, 0)),
                (82, 8, (0, 3, 2, 2, 0, 0)),
            ],
        ),
        (
            {"phase": "during_prefill"},
            # t = 40: n = 40, e = 34 // 4 = 8, u = 8, k = 24 // 4 = 6; 7 -> 5.
            # t = 48: n = 40, the same. t = 50: n = 34, e = 7, u = 6, k = 26 // 4 = 6.
            [
                (40, 8, (0, 1, 1, 0, 0, 0)),
                (48, 8, (0, 2, 1, 0, 0, 0)),
                (50, 7, (0, 2, 1, 1, 0, 0)),
                (58, 8, (0, 2, 2, 1, 0, 0)),
                (66, 8, (0, 3, 1, 1, 0, 0)),
                (74, 8, (0, 3, 2, 1, 0, 0)),
                (82, 8, (0, 3, 2, 2, 0, 0)),
            ],
        ),
        (
            {"phase": "decode", "budget": 28},
            # base = 52 and no sinks. t = 82: n = 30, e = 6, u = 6, k = 22 // 4 = 5.
            # t = 90: n = 34, e = 7. t = 98: n = 34.
            [(82, 6, (1, 0, 0, 0, 0)), (90, 7, (1, 1, 1, 0, 0)), (98, 7, (2, 1, 1, 0, 0))],
        ),
        (
            {"keep_ratio": 0.6},
            # t = 50: T = 30, e = 11, u = 6, k = 6. t = 58: T = 35, n = 38, e = k = 8.
            # t = 66: T = 40, n = 46, e = 10, k = 9. t = 74: T = 45, n = 50, e = 11, k = 10.
            # t = 82: T = 50, n = 54, e = 12, k = 11.
            [
                (50, 11, (0, 2, 1, 1, 0, 0)),
                (66, 10, (0, 2, 1, 1, 1, 0, 0, 0, 0)),
                (74, 11, (0, 2, 1, 1, 1, 1, 0, 0, 0, 0)),
                (82, 12, (0, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0)),
            ],
        ),
        (
            {"sink_tokens": 5, "recent_tokens": 18, "budget": 14, "prune_after": 51},
            # t = 58: e = 10, u = 18 is over the budget; two sink blocks and, for
            # 58 // 4 = 14 = 0b1110, four others.
            [(58, 10, (0, 0, 2, 1, 0, 0))],
        ),
        (
            {"method": KNORM},
            # t = 50: n = 50, e = 44 // 4 = 11, u = 6, k = 34 // 4 = 8. p = 4 for 12 = 0b1100;
            # 11 ranked blocks, 4 kept, 7 -> 4 pooled.
            # t = 58: n = 46, e = 10, P = 4, 6 ranked, 4 kept, 2 more: 1 1 1 0 0 0 -> 4.
            # t = 66: p = 5 for 16 = 0b10000, 3 kept, 3 more: 2 1 1 0 0 0 0 -> 5.
            # t = 74: P = 5, 5 ranked, 3 kept, 2 more: 2 2 1 0 0 0 0 -> 5.
            # t = 82: 3 1 1 0 0 0 0 -> 5.
            [
                (50, 11, (1, 1, 1, 0, 0, 0, 0, 0)),
                (58, 10, (2, 1, 1, 0, 0, 0, 0, 0)),
                (66, 10, (2, 2, 1, 0, 0, 0, 0, 0)),
                (74, 10, (3, 1, 1, 0, 0, 0, 0, 0)),
                (82, 10, (3, 2, 1, 0, 0, 0, 0, 0)),
            ],
        ),
        (
            {"method": KNORM, "budget": 1, "sink_tokens": 0},
            # k = 1 + 4 at 50 and 58, 1 + 5 from 64 on; always one kept block.
            # t = 50: 10 -> 4. t = 58: n = 50 - 24 + 8 = 34, e = 7, 3 ranked, 2 more:
            # 2 2 0 0 0 0 -> 4. t = 66: n = 34, e = 7, k = 6, p = 5, 2 more.
            # t = 74: n = 38, e = 8, k = 6, 2 more. t = 82: the same.
            [
                (50, 11, (2, 2, 0, 0, 0)),
                (58, 7, (3, 1, 0, 0, 0)),
                (66, 7, (3, 1, 1, 0, 0, 0)),
                (74, 8, (3, 2, 1, 0, 0, 0)),
                (82, 8, (3, 2, 2, 0, 0, 0)),
            ],
        ),
    ],
)
def test_planned_levels_by_hand(changes, expected, model, prompt):
    settings = make_settings(**changes)
    computed = expected[-1][0] + 1
    planned = planned_levels(settings, BLOCK, 50, computed, settings.token_budget)
    assert planned == expected
    result = make_oracle(model, settings).run(prompt, computed - 49)
    assert [(c.position, c.candidate_blocks, c.levels) for c in result.compactions] == expected


def test_fewest_blocks():
    at = {"recent_tokens": 8, "budget": 64, "sink_tokens": 33}
    arguments = 16, 0, 200, 200, 64, Fraction(1)
    # e = 12, u = 8, k = 3 by the budget, 33 sinks need 3 blocks, 200 // 16 = 12 has 4 bits.
    assert oracle.planned_blocks(Settings(method="knorm", **at), *arguments) == (12, 3)
    assert planned_merge(Settings(method="merge", **at), *arguments) == (12, 7, 4)
    assert planned_merge(Settings(method=KNORM, **at), *arguments) == (12, 7, 4)
    at["sink_tokens"] = 0
    assert planned_merge(Settings(method="merge", **at), *arguments) == (12, 4, 4)
    assert planned_merge(Settings(method=KNORM, **at), *arguments) == (12, 5, 4)
    at["budget"] = 148
    assert planned_merge(Settings(method="merge", **at), *arguments) == (12, 4, 4)
    # Not if that is no fewer.
    arguments = 16, 0, 80, 80, 64, Fraction(1)
    assert oracle.planned_blocks(Settings(method="merge", **at), *arguments) == (4, 3)
    assert planned_merge(Settings(method="merge", **at), *arguments) == (4, 3, 3)
    assert planned_merge(Settings(method=KNORM, **at), *arguments) is None
    assert [needed_bits(16, t) for t in (3, 16, 32, 63, 64)] == [1, 1, 2, 2, 3]


def test_a_quarter_of_the_blocks_is_pooled():
    settings = Settings(method=KNORM, sink_tokens=0, recent_tokens=8, budget=1000)
    # u = 8, k = (budget - 8) // 16, and 1000 // 16 = 62 has 6 bits.
    for blocks, pooled in ((27, 6), (28, 7), (31, 7), (32, 8), (7, 6), (6, 6)):
        k = max(blocks, 7)
        found = planned_merge(settings, 16, 0, 1000, 1000, blocks * 16 + 8, Fraction(1))
        assert found == (62, k, pooled)


def test_sinks_are_never_pooled():
    # A quarter of 24 + 6 blocks would leave 23 for 24 blocks of sinks.
    settings = Settings(method=KNORM, sink_tokens=24 * 16, recent_tokens=8)
    found = planned_merge(settings, 16, 0, 1000, 1000, 392, Fraction(1))
    assert found == (62, 30, 6)
    found = planned_merge(settings, 16, 0, 1000, 1000, 32 * 16 + 8, Fraction(1))
    assert found == (62, 32, 8)
    settings = Settings(method=KNORM, sink_tokens=24 * 16, recent_tokens=8, phase="decode")
    found = planned_merge(settings, 16, 16, 1016, 1016, 392, Fraction(1))
    assert found == (62, 24, 6)


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    prompt_length=st.integers(1, 300),
    decoded=st.integers(1, 200),
    block_size=st.sampled_from([2, 4, 16]),
    sinks=st.integers(0, 20),
    recent=st.integers(0, 40),
    interval=st.integers(1, 60),
    blocks=st.integers(1, 12),
    phase=st.sampled_from(["after_prefill", "during_prefill", "decode"]),
    method=st.sampled_from(METHODS),
)
def test_levels_never_increase_and_blocks_stay_in_the_budget(
    prompt_length, decoded, block_size, sinks, recent, interval, blocks, phase, method
):
    in_front = 0 if phase == "decode" else -(-sinks // block_size)
    computed = prompt_length + decoded
    blocks += in_front + needed_bits(block_size, computed)
    budget = blocks * block_size + recent + block_size
    settings = Settings(
        method=method,
        sink_tokens=sinks,
        recent_tokens=recent,
        interval=interval,
        budget=budget,
        phase=phase,
    )
    planned = planned_levels(settings, block_size, prompt_length, computed, budget)
    base = oracle.untouched_base(settings, block_size, prompt_length)
    slots, since = -base, 0
    for position, e, levels in planned:
        slots += position - since
        since = position
        # A prompt is exact until its end unless the phase says otherwise.
        if position != prompt_length or phase != "after_prefill":
            assert slots <= budget + interval
        slots -= (e - len(levels)) * block_size
        assert slots <= budget
        lead = in_front if method == "merge" else 0
        assert list(levels[:lead]) == [0] * lead
        assert list(levels[lead:]) == sorted(levels[lead:], reverse=True)
        if method == KNORM:
            pooled = max(len(levels) // 4, needed_bits(block_size, position))
            assert not any(levels[pooled:])
            assert len(levels) - pooled >= max(1, in_front)
        # Every token is in one slot, and the recent ones are still alone.
        untouched = slots - len(levels) * block_size
        assert sum(2**level for level in levels) * block_size == position - base - untouched
        assert recent <= untouched < recent + block_size


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    prompt_length=st.integers(1, 300),
    decoded=st.integers(1, 200),
    block_size=st.sampled_from([2, 4, 16]),
    sinks=st.integers(0, 20),
    recent=st.integers(0, 40),
    interval=st.integers(1, 60),
    ratio=st.sampled_from([0.1, 0.3, 0.5, 0.75]),
    phase=st.sampled_from(["after_prefill", "during_prefill"]),
    method=st.sampled_from(METHODS),
)
def test_every_token_has_its_place_with_a_ratio(
    prompt_length, decoded, block_size, sinks, recent, interval, ratio, phase, method
):
    settings = Settings(
        method=method,
        sink_tokens=sinks,
        recent_tokens=recent,
        interval=interval,
        keep_ratio=ratio,
        phase=phase,
    )
    computed = prompt_length + decoded
    for position, _, levels in planned_levels(settings, block_size, prompt_length, computed, None):
        tokens = sum(2**level for level in levels) * block_size
        assert recent <= position - tokens < recent + block_size


def test_block_spans():
    assert block_spans(10, [2, 0], 2) == [
        range(10, 14),
        range(14, 18),
        range(18, 19),
        range(19, 20),
    ]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("phase", ["after_prefill", "during_prefill"])
def test_spans_sinks_and_recent_tokens(pooling, phase, model, prompt):
    settings = make_settings(pooling=pooling, phase=phase, **PYRAMID)
    dense = make_oracle(model, settings, bands=2)
    full = make_oracle(model, make_settings(budget=1000))
    result = dense.run(prompt, 34)
    full.run(prompt, 34, result.tokens)
    assert {compaction.band for compaction in result.compactions} == {0, 1}
    for compaction in result.compactions:
        spans, t = compaction.spans, compaction.position
        assert [token for span in spans for token in span] == list(range(t))
        assert [len(span) for span in spans[:BLOCK]] == [1] * BLOCK
        assert [len(span) for span in spans[-6:]] == [1] * 6
        budget = dense.band_budgets[compaction.band]
        assert len(spans) <= budget
        lengths = [2**level for level in compaction.levels for _ in range(BLOCK)]
        assert [len(span) for span in spans[: len(lengths)]] == lengths
        assert len(lengths) == compaction.kept_blocks * BLOCK
        assert all(len(span) == 1 for span in spans[len(lengths) :])
    # The sinks were computed before anything merged.
    for layer in range(LAYERS):
        for part in (1, 2):
            mine, theirs = dense.slots(layer)[part], full.slots(layer)[part]
            torch.testing.assert_close(mine[:, :4], theirs[:, :4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("phase", ["after_prefill", "during_prefill", "decode"])
def test_every_token_is_in_one_slot_of_each_head(pooling, phase, model, prompt):
    settings = make_settings(method=KNORM, pooling=pooling, phase=phase, **PYRAMID)
    dense = make_oracle(model, settings, bands=2)
    result = dense.run(prompt, 80 if phase == "decode" else 34)
    first = 52 // BLOCK if phase == "decode" else 0
    sinks = 0 if phase == "decode" else 3
    assert {compaction.band for compaction in result.compactions} == {0, 1}
    bands_pooled = {0: 0, 1: 0}
    heads_differ = False
    for compaction in result.compactions:
        t, k, p = compaction.position, compaction.kept_blocks, compaction.pooled_blocks
        assert compaction.slots <= dense.band_budgets[compaction.band] + first * BLOCK
        assert len(compaction.levels) == k
        assert not any(compaction.levels[p:])
        assert list(compaction.levels) == sorted(compaction.levels, reverse=True)
        for layer in compaction.layers:
            blocks = compaction.members[layer]
            levels = [block.shape[2].bit_length() - 1 for block in blocks]
            assert tuple(levels[first : first + k]) == compaction.levels
            everything = torch.cat([block.flatten(1) for block in blocks], 1)
            assert (everything.sort(1).values == torch.arange(t)).all()
            assert torch.equal(everything[:, -6:], torch.arange(t - 6, t).expand(2, -1))
            assert torch.equal(
                everything[:, : first * BLOCK], torch.arange(first * BLOCK).expand(2, -1)
            )
            kept = torch.cat(blocks[first + p : first + k], 1)[..., 0]
            assert torch.equal(kept, compaction.kept[layer])
            assert (kept.diff(dim=1) > 0).all()
            assert (kept[:, :sinks] == torch.arange(sinks)).all()
            ranked = compaction.candidates[layer]
            count = (compaction.candidate_blocks - bands_pooled[compaction.band]) * BLOCK
            assert ranked.shape == (KV_HEADS, count)
            lost = ~torch.stack([torch.isin(r, h) for r, h in zip(ranked, kept, strict=True)])
            norms = dense._keys[layer].norm(dim=-1)
            highest = norms.gather(1, kept[:, sinks:]).amax(1)
            lowest = norms.gather(1, ranked).masked_fill(~lost, math.inf).amin(1)
            assert (highest <= lowest * (1 + 1e-6)).all()
            heads_differ |= not torch.equal(kept[0], kept[1])
        bands_pooled[compaction.band] = p
    assert heads_differ


def test_a_compaction_may_pool_nothing_new(model, prompt):
    prompt = prompt + prompt[:40]
    settings = make_settings(method=KNORM, budget=60, interval=1, recent_tokens=4, sink_tokens=2)
    dense = make_oracle(model, settings, block_size=2)
    result = dense.run(prompt, 12)
    planned = planned_levels(settings, 2, 90, 101, 60)
    assert [(c.position, c.candidate_blocks, c.levels) for c in result.compactions] == planned
    # t = 90: u = 4, k = 56 // 2 = 28, a quarter of them pooled. t = 91: n = 61, u = 5, e = 28,
    # k = 55 // 2 = 27, p = 6; of the 21 ranked blocks all are kept, and 7 -> 6 pooled.
    first, second = result.compactions[:2]
    assert [(c.position, c.kept_blocks, c.pooled_blocks) for c in (first, second)] == [
        (90, 28, 7),
        (91, 27, 6),
    ]
    for layer, kept in second.kept.items():
        assert torch.equal(kept, second.candidates[layer])
        everything = torch.arange(42).expand(KV_HEADS, -1)
        assert ranking_agrees(second, layer, everything)
        assert not ranking_agrees(second, layer, everything.flip(1))
    replay = PagedReplay(model, settings)
    logprobs = replay.run(prompt + result.tokens, result.compactions)
    torch.testing.assert_close(result.logprobs, logprobs[89:-1], atol=2e-4, rtol=0)


def test_skipped_layers_and_the_prompt_of_phase_decode_are_untouched(model, prompt):
    dense = make_oracle(model, make_settings(skip_layers=(1,)))
    dense.run(prompt, 34)
    assert [dense.slots(layer)[1].shape[1] for layer in range(LAYERS)] == [31, 83, 31]
    dense = make_oracle(model, make_settings(phase="decode", budget=28))
    compactions = dense.run(prompt, 50).compactions
    spans = [range(token, token + 1) for token in range(52)]
    spans += block_spans(52, [2, 1, 1, 0, 0], BLOCK) + block_spans(92, [0, 0], 3)
    assert list(compactions[-1].spans) == spans


def test_oracle_refuses_what_it_does_not_know(model, prompt):
    with pytest.raises(ValueError, match="merge"):
        make_oracle(model, make_settings(method="knorm"))
    with pytest.raises(ValueError, match="chooses nothing"):
        make_oracle(model, make_settings()).run(prompt, 2, forced_choice={(50, 0): torch.ones(1)})
    with pytest.raises(ValueError, match="ranks nothing"):
        make_oracle(model, make_settings()).run(prompt, 2, forced_kept={(50, 0): torch.ones(1)})


# Following and comparing the choices of ``best``.


def record(norms: list[list[float]], before: list[list[int]], spans: list[range]):
    """A compaction of layer 0; what is held is left to the caller's questions."""
    held = torch.zeros(len(norms), len(spans), dtype=torch.int64)
    return MergeCompaction(
        position=len(norms[0]),
        band=0,
        layers=(0,),
        candidate_blocks=1,
        kept_blocks=1,
        pooled_blocks=1,
        levels=(1,),
        members={0: tuple(torch.tensor([[list(span)]] * len(norms)) for span in spans)},
        held={0: held},
        held_before={0: torch.tensor(before)},
        norms={0: torch.tensor(norms)},
    )


def test_choices_agree():
    # Tokens 0 .. 6; 1 was lost earlier to 0 in head 0, and 0 to 1 in head 1.
    compaction = record(
        [[3.0, 3.1, 3.000003, 9.0, 5.0, 5.0, 1.0], [3.0, 2.0, 2.5, 9.0, 4.0, 5.0, 1.0]],
        [[0, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]],
        [range(0, 4), range(4, 6), range(6, 7)],
    )
    for right, rtol in (
        ([[0, 4, 6], [1, 4, 6]], 0),
        ([[0, 5, 6], [1, 4, 6]], 0),  # equal norms
        ([[2, 4, 6], [1, 4, 6]], 1e-5),
    ):
        assert choices_agree(compaction, 0, torch.tensor(right), rtol)
    for wrong, rtol in (
        ([[2, 4, 6], [1, 4, 6]], 1e-7),
        ([[3, 4, 6], [1, 4, 6]], 1e-5),
        ([[0, 4, 6], [2, 4, 6]], 1e-5),
        ([[0, 4, 6], [1, 5, 6]], 1e-5),
        ([[1, 4, 6], [1, 4, 6]], 0.1),  # lost before
        ([[4, 4, 6], [1, 4, 6]], 1.0),  # of another slot
        ([[0, 4, 5], [1, 4, 6]], 9.0),
        ([[0, 4], [1, 4]], 1e-5),
        ([[0, 4, 6]], 1e-5),
    ):
        assert not choices_agree(compaction, 0, torch.tensor(wrong), rtol)


def test_own_choices_agree(model, prompt):
    result = make_oracle(model, make_settings(pooling="best")).run(prompt, 34)
    assert result.compactions
    for compaction in result.compactions:
        assert sorted(compaction.held) == [0, 1, 2]
        for layer, held in compaction.held.items():
            assert choices_agree(compaction, layer, held, rtol=0)
            assert not choices_agree(compaction, layer, held.flip(0), rtol=1e-5)


def test_forced_choice_is_followed(model, prompt):
    settings = make_settings(pooling="best")
    dense = make_oracle(model, settings)
    free = dense.run(prompt, 34)
    first = free.compactions[0]
    same = {(first.position, layer): held for layer, held in first.held.items()}
    again = dense.run(prompt, 34, forced_choice=same)
    assert torch.equal(again.logprobs, free.logprobs)

    # Another token in one slot of head 0 in layer 1, as in a near tie.
    mine = first.held[1].clone()
    mine[0, 4] = next(token for token in first.spans[4] if token != mine[0, 4])
    followed = dense.run(prompt, 34, free.tokens, forced_choice={(first.position, 1): mine})
    own = followed.compactions
    assert torch.equal(own[0].held[1], first.held[1])
    assert torch.equal(own[1].held_before[1][:, : mine.shape[1]], mine)
    # Slot 4 merges again at 82, and chooses among what was followed.
    assert [int(c.held[1][0, 4]) for c in own[1:4]] == [int(mine[0, 4])] * 3
    assert own[4].held[1][0, 4] in own[4].held_before[1][0, 4:6]
    assert (followed.logprobs[1:] - free.logprobs[1:]).abs().amax() > 1e-4
    assert not choices_agree(own[0], 1, mine)

    with pytest.raises(ValueError, match="expected"):
        dense.run(prompt, 34, forced_choice={(first.position, 1): mine[:, 1:]})
    wrong = first.held[1].clone()
    wrong[0, 4] = first.spans[5][0]
    with pytest.raises(ValueError, match="cannot hold"):
        dense.run(prompt, 34, forced_choice={(first.position, 1): wrong})
    second = free.compactions[1]
    lost = second.held[1].clone()
    lost[0, 4] = next(token for token in second.spans[4] if token != lost[0, 4])
    with pytest.raises(ValueError, match="cannot hold"):
        dense.run(prompt, 34, forced_choice={(second.position, 1): lost})


def test_ranking_agrees_and_is_followed(model, distinct):
    settings = make_settings(method=KNORM)
    dense = make_oracle(model, settings)
    free = dense.run(distinct[:50], 34, distinct[50:84])
    same = {at: indices for c in free.compactions for at, indices in kept_indices(c).items()}
    for compaction in free.compactions:
        for layer in compaction.layers:
            assert ranking_agrees(compaction, layer, same[compaction.position, layer], rtol=0)
    again = dense.run(distinct[:50], 34, distinct[50:84], forced_kept=same)
    assert torch.equal(again.logprobs, free.logprobs)

    # Head 0 of layer 1 keeps the next best instead of its worst.
    first = free.compactions[0]
    found = same[50, 1].clone()
    order = first.scores[1][0].argsort(descending=True)
    worst, next_best = int(order[15]), int(order[16])
    found[0] = torch.cat([found[0][found[0] != worst], torch.tensor([next_best])]).sort().values
    scores = first.scores[1][0]
    gap = float((scores[worst] - scores[next_best]) / scores[scores.isfinite()].abs().max())
    assert ranking_agrees(first, 1, found, rtol=gap * 1.01)
    assert not ranking_agrees(first, 1, found, rtol=gap * 0.99)
    followed = dense.run(distinct[:50], 34, distinct[50:84], forced_kept={(50, 1): found})
    own = followed.compactions
    assert torch.equal(own[0].kept[1], first.kept[1])
    assert torch.equal(own[0].scores[1], first.scores[1])
    ranked = first.candidates[1][0]
    assert (ranked[next_best],) in [tuple(slot) for slot in members_of(own[0], 0, 1)[16:32]]
    assert ranked[next_best] in own[1].candidates[1][0]
    assert ranked[worst] not in own[1].candidates[1][0]
    assert torch.equal(own[1].candidates[1][1], free.compactions[1].candidates[1][1])
    torch.testing.assert_close(followed.logprobs[0], free.logprobs[0], atol=0, rtol=0)
    assert (followed.logprobs[1:] - free.logprobs[1:]).abs().amax() > 1e-4

    sink = same[50, 1].clone()
    sink[0] = torch.cat([sink[0, 1:], torch.tensor([next_best])]).sort().values
    for wrong in (sink, found[:, 1:], found.flip(1), found - 1, found + 30):
        assert not ranking_agrees(first, 1, wrong, rtol=gap * 1.01)
    with pytest.raises(ValueError, match="expected"):
        dense.run(distinct[:50], 2, forced_kept={(50, 1): found[:, 1:]})
    with pytest.raises(ValueError, match="age order"):
        dense.run(distinct[:50], 2, forced_kept={(50, 1): found.flip(1)})


def test_choices_of_ranked_slots_agree_and_are_followed(model, distinct):
    settings = make_settings(method=KNORM, pooling="best")
    dense = make_oracle(model, settings)
    free = dense.run(distinct[:50], 34, distinct[50:84])
    held = {(c.position, layer): held for c in free.compactions for layer, held in c.held.items()}
    assert len(held) == 5 * LAYERS
    for compaction in free.compactions:
        for layer in compaction.layers:
            mine = held[compaction.position, layer]
            assert choices_agree(compaction, layer, mine, rtol=0)
            assert not choices_agree(compaction, layer, mine.flip(0), rtol=1e-5)
    again = dense.run(distinct[:50], 34, distinct[50:84], forced_choice=held)
    assert torch.equal(again.logprobs, free.logprobs)
    mine = held[50, 1].clone()
    members = members_of(free.compactions[0], 0, 1)[4]
    mine[0, 4] = next(token for token in members if token != mine[0, 4])
    forced = {(50, 1): mine}
    followed = dense.run(distinct[:50], 34, distinct[50:84], forced_choice=forced)
    assert torch.equal(followed.compactions[0].held[1], held[50, 1])
    assert torch.equal(followed.compactions[1].held_before[1][:, : mine.shape[1]], mine)
    assert not choices_agree(followed.compactions[0], 1, mine)
    wrong = mine.clone()
    wrong[0, 4] = members_of(free.compactions[0], 0, 1)[5][0]
    with pytest.raises(ValueError, match="cannot hold"):
        dense.run(distinct[:50], 34, forced_choice={(50, 1): wrong})
