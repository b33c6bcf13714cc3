"""Independent dense oracle of merging, for tests.

As :mod:`oracle`, which holds what merging has in common with eviction: it runs a Hugging Face
causal LM of the Llama family in float32 and shares nothing with the plugin but
:class:`~vllm_kvcompress.settings.Settings`. When a band compacts and how many blocks stay is
specified there (``t``, ``bs``, ``base``, ``n``, ``e``, ``k``; a slot counts as a token does).
What follows is the specification of the rest, for the methods ``merge`` and ``knorm+merge``.

State
-----
Per layer there is the dense history of every computed token: its key without rotation, its
key rotated with its true position and its value, each ``[kv_heads, t, head_dim]``. The cache
is a list of blocks of ``bs`` slots, oldest first. A slot is its *members*, ``2**level`` tokens,
which with ``knorm+merge`` are others for each KV head; the level is that of the block, the same
for all heads of a layer and all layers of a band. A token's own slot has level 0. Every token
is a member of exactly one slot of each head. What a slot holds is not carried along but taken
from the dense history of its members (for ``best`` from the one token that it holds), so nothing
of it depends on the rounds in which the slot was made.

How many
--------
``s = ceil(sinks / bs)`` are the blocks of the sinks, 0 in phase ``decode``, and ``bits`` the
number of binary digits of ``t // bs``, at least 1: so many blocks of different levels hold any
number of tokens up to ``t``. ``k`` is at least ``s + bits`` with ``merge`` and
``max(1, s) + bits`` with ``knorm+merge``. As ever, a band compacts if and only if ``k < e``.

Levels
------
Merging some blocks into ``m``: the blocks have one level each, which never increases towards
newer blocks. Until ``m`` of them are left, the level that most of them have (the highest of
several such levels) loses its two oldest blocks, which become the newest block of the next
level. If no level has two blocks the settings cannot work: an error. The slots of the two
blocks, the older block's first, are pooled in neighbouring pairs.

* ``merge``: of the ``e`` candidate blocks behind ``base`` the first ``s`` stay as they are, the
  others are merged into ``k - s``. So members are consecutive, the slot's *span*.
* ``knorm+merge``: of the ``k`` blocks ``p = min(max(k // 4, bits), k - max(1, s))`` are pooled
  ones, the others kept ones. Of the ``e`` candidate blocks, the first are the pooled blocks of the
  last compaction (none before the first one); the tokens of the other ``r`` are *ranked*, in age
  order. Per KV head, ``(k - p) * bs`` of them are kept: the first ``sinks`` (none in phase
  ``decode``), then those of the lowest L2 norm of the rotated key, the older one where equal. The
  others, in age order, are ``r - (k - p)`` blocks of level 0, newer than all pooled blocks; with
  those they are merged into ``p``. The band is then: the ``p`` pooled blocks, the kept tokens in
  age order, the rest.

Slots
-----
In float32, per KV head:

* ``mean``: the mean of the unrotated keys, rotated with the mean of the members' positions, for
  ``merge`` the centre of the span; the mean of the values;
* ``max``: the elementwise maximum of the rotated keys, and of the values;
* ``best``: rotated key and value of one token, the *held* one. A merged slot holds that of the
  tokens held by the slots it was made of whose rotated key has the lowest L2 norm, the first
  of several such tokens, in the order of the slots.

Attention
---------
A query sees all slots of older tokens and its own. The logit of a slot with ``c`` tokens is
raised by ``log(c)`` if ``merge_weighting`` is ``count``. A query sees slots as they are when it
is computed, so every token that was computed keeps its output.

Near ties
---------
Near ties of norms are decided by rounding noise, and the plugin rounds squared norms to 12 bits
so that age decides them; the oracle does not. Compare with :func:`ranking_agrees` (which tokens
``knorm+merge`` keeps) and :func:`choices_agree` (which token a slot of ``best`` holds), and follow
with ``forced_kept`` and ``forced_choice``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import torch
from oracle import (
    DenseOracle,
    OracleResult,
    best_candidates,
    is_grid_position,
    kept_sets_agree,
    planned_blocks,
    untouched_base,
)
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_kvcompress.settings import Settings

METHODS = ("merge", "knorm+merge")
POOLINGS = ("mean", "max", "best")
WEIGHTINGS = ("count", "none")

Forced = Mapping[tuple[int, int], torch.Tensor]
"""What another implementation chose, by (position, layer)."""


@dataclass(frozen=True)
class MergeCompaction:
    """One band compacted at one position.

    Attributes
    ----------
    position : int
        Tokens computed so far (``t``).
    band : int
        Index of the band.
    layers : tuple[int, ...]
        Layers of the band.
    candidate_blocks, kept_blocks : int
        ``e`` and ``k``: the candidates fill ``e`` blocks, ``k`` blocks are made of them.
    pooled_blocks : int
        How many of the ``k`` blocks are pooled ones: ``k - s`` (the last ones) with ``merge``,
        ``p`` (the first ones) with ``knorm+merge``.
    levels : tuple[int, ...]
        Levels of the ``k`` blocks in the order of the cache, those that are not pooled included.
    members : dict[int, tuple[torch.Tensor, ...]]
        Per layer, the tokens of all slots afterwards, those below ``base`` and the untouched
        newest ones too: one ``[kv_heads, slots, 2**level]`` for each block. Here and in ``held``
        and ``held_before`` of later compactions, forced choices were followed.
    kept : dict[int, torch.Tensor]
        With ``knorm+merge``, per layer: the oracle's own choice of tokens to keep,
        ``[kv_heads, (k - p) * bs]``, int64, ascending.
    candidates : dict[int, torch.Tensor]
        With ``knorm+merge``, per layer: the ranked tokens, ``[kv_heads, r * bs]``, ascending.
    scores : dict[int, torch.Tensor]
        With ``knorm+merge``, per layer: the scores of ``candidates``, infinite for sinks.
    held : dict[int, torch.Tensor]
        With ``best``, per layer: the oracle's own choice of the token that each slot holds
        afterwards, ``[kv_heads, slots]``, int64. The slots are those of ``members``.
    held_before : dict[int, torch.Tensor]
        The same before the compaction, ``[kv_heads, slots_before]``.
    norms : dict[int, torch.Tensor]
        With ``best``, per layer: the norms of the keys of all computed tokens,
        ``[kv_heads, position]``, float32.
    """

    position: int
    band: int
    layers: tuple[int, ...]
    candidate_blocks: int
    kept_blocks: int
    pooled_blocks: int
    levels: tuple[int, ...]
    members: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    candidates: dict[int, torch.Tensor] = field(default_factory=dict)
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    held: dict[int, torch.Tensor] = field(default_factory=dict)
    held_before: dict[int, torch.Tensor] = field(default_factory=dict)
    norms: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """Slots of each layer afterwards, all of them."""
        return sum(block.shape[1] for block in self.members[self.layers[0]])

    @cached_property
    def spans(self) -> tuple[range, ...]:
        """Tokens of each slot afterwards; with ``merge`` only, where all layers agree."""
        (spans,) = {tuple(slot_spans(blocks)) for blocks in self.members.values()}
        return spans


# How many, levels and spans.


def sink_blocks(settings: Settings, block_size: int) -> int:
    """Number of blocks that the sinks need."""
    if settings.phase == "decode":
        return 0
    return math.ceil(Fraction(settings.sink_tokens, block_size))


def needed_bits(block_size: int, position: int) -> int:
    """Number of pooled blocks that hold any number of tokens up to ``position``."""
    return max(1, (position // block_size).bit_length())


def planned_merge(
    settings: Settings,
    block_size: int,
    base: int,
    position: int,
    live: int,
    budget: int | None,
    share: Fraction,
) -> tuple[int, int, int] | None:
    """Decide on a band's compaction; parameters as of :func:`oracle.planned_blocks`.

    Returns
    -------
    tuple[int, int, int] or None
        ``e``, ``k`` and how many of the ``k`` blocks are pooled ones, or ``None`` if the band
        does not compact.
    """
    planned = planned_blocks(settings, block_size, base, position, live, budget, share)
    if planned is None:
        return None
    e, k = planned
    sinks, bits = sink_blocks(settings, block_size), needed_bits(block_size, position)
    if settings.method == "merge":
        k = max(k, sinks + bits)
        pooled = k - sinks
    else:
        k = max(k, max(1, sinks) + bits)
        pooled = min(max(k // 4, bits), k - max(1, sinks))
    return (e, k, pooled) if k < e else None


def _oldest_pair(levels: Sequence[int]) -> int:
    """Index of the older one of the two blocks that merge next."""
    level = max(set(levels), key=lambda candidate: (levels.count(candidate), candidate))
    oldest = levels.index(level)
    if levels[oldest : oldest + 2] != [level, level]:
        raise ValueError(f"blocks of the levels {levels} do not fit into fewer")
    return oldest


def merged_levels(levels: Sequence[int], keep: int) -> list[int]:
    """Merge neighbouring blocks until few enough are left.

    Parameters
    ----------
    levels : sequence of int
        Levels of the blocks to merge, oldest first.
    keep : int
        Number of blocks to leave.

    Returns
    -------
    list[int]
        Levels of the blocks that are left, oldest first.
    """
    merged = list(levels)
    while len(merged) > keep:
        oldest = _oldest_pair(merged)
        merged[oldest : oldest + 2] = [merged[oldest] + 1]
    assert merged == sorted(merged, reverse=True), "levels never increase towards newer blocks"
    return merged


def merged_blocks(blocks: Sequence[torch.Tensor], keep: int) -> list[torch.Tensor]:
    """Merge blocks, given as the members of their slots, until few enough are left.

    Parameters
    ----------
    blocks : sequence of torch.Tensor
        ``[kv_heads, block_size, 2**level]`` each, oldest first.
    keep : int
        Number of blocks to leave.

    Returns
    -------
    list[torch.Tensor]
        The blocks that are left, oldest first.
    """
    merged = list(blocks)
    while len(merged) > keep:
        oldest = _oldest_pair([block_level(block) for block in merged])
        pair = torch.cat(merged[oldest : oldest + 2], 1)
        heads, slots, count = pair.shape
        merged[oldest : oldest + 2] = [pair.reshape(heads, slots // 2, 2 * count)]
    return merged


def block_level(block: torch.Tensor) -> int:
    """Level of a block, ``[kv_heads, block_size, 2**level]``."""
    level = block.shape[2].bit_length() - 1
    assert block.shape[2] == 2**level
    return level


def planned_levels(
    settings: Settings,
    block_size: int,
    prompt_length: int,
    computed: int,
    budget: int | None,
    share: Fraction = Fraction(1),
) -> list[tuple[int, int, tuple[int, ...]]]:
    """All compactions of one band of a request, from lengths alone.

    Parameters
    ----------
    settings : Settings
    block_size, prompt_length : int
    computed : int
        Tokens the request computes in all: the prompt and every decoded token but the last.
    budget : int or None
        Budget of the band in tokens; unused with ``keep_ratio``.
    share : Fraction
        Share of the band; used with ``keep_ratio`` only.

    Returns
    -------
    list[tuple[int, int, tuple[int, ...]]]
        Position, ``e``, and :attr:`MergeCompaction.levels`.
    """
    base = untouched_base(settings, block_size, prompt_length)
    removed, merging, before = 0, [], []
    levels: list[int] = []
    planned = []
    for position in range(1, computed):
        if not is_grid_position(settings, prompt_length, position):
            continue
        live = position - removed * block_size
        found = planned_merge(settings, block_size, base, position, live, budget, share)
        if found is None:
            continue
        e, k, pooled = found
        removed += e - k
        if settings.method == "merge":
            before = [0] * (k - pooled)
            merging = [*merging, *[0] * (e - len(before) - len(merging))]
            merging = merged_levels(merging, pooled)
            levels = [*before, *merging]
        else:
            fresh = e - len(merging) - (k - pooled)
            merging = merged_levels([*merging, *[0] * fresh], pooled)
            levels = [*merging, *[0] * (k - pooled)]
        planned.append((position, e, tuple(levels)))
    return planned


def block_spans(first: int, levels: Iterable[int], block_size: int) -> list[range]:
    """Spans of the slots of consecutive blocks.

    Parameters
    ----------
    first : int
        Oldest token of the oldest block.
    levels : iterable of int
        Level of each block, oldest first.
    block_size : int

    Returns
    -------
    list[range]
        ``block_size`` spans for each block.
    """
    spans = []
    for level in levels:
        for _ in range(block_size):
            spans.append(range(first, first + 2**level))
            first += 2**level
    return spans


def slot_spans(blocks: Iterable[torch.Tensor]) -> list[range]:
    """Spans of all slots of a layer whose members are consecutive and the same for all heads."""
    spans = []
    for block in blocks:
        first = block[:1, :, :1]
        if not torch.equal(block, (first + torch.arange(block.shape[2])).expand_as(block)):
            raise ValueError("the members of a slot are no span")
        spans += [range(start, start + block.shape[2]) for start in first.flatten().tolist()]
    return spans


# The model.


class DenseMergeOracle(DenseOracle):
    """A causal LM with dense attention over merged slots.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Llama-like causal LM in float32.
    settings : Settings
        With the method ``merge`` or ``knorm+merge``.
    block_size : int
        Tokens per block.
    band_layers : sequence of sequence of int
        Layers of each band; other layers keep everything.
    band_budgets : sequence of int or None
        Budget of each band in tokens; ``None`` with ``keep_ratio``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Settings,
        block_size: int,
        band_layers: Sequence[Sequence[int]],
        band_budgets: Sequence[int | None],
    ) -> None:
        super().__init__(model, settings, block_size, band_layers, band_budgets)
        for known, value in (
            (METHODS, settings.method),
            (POOLINGS, settings.pooling),
            (WEIGHTINGS, settings.merge_weighting),
        ):
            if value not in known:
                raise ValueError(f"this oracle knows {' and '.join(known)}, not {value!r}")

    @torch.no_grad()
    def run(
        self,
        prompt_ids: Sequence[int],
        num_decode: int,
        forced_tokens: Sequence[int] | None = None,
        forced_kept: Forced | None = None,
        forced_choice: Forced | None = None,
    ) -> OracleResult:
        """Compute the prompt and decode.

        Parameters
        ----------
        prompt_ids : sequence of int
        num_decode : int
            Tokens to decode, at least 1; there is no end-of-sequence token.
        forced_tokens : sequence of int, optional
            The decoded tokens, ``num_decode`` of them, instead of the greedy ones.
        forced_kept : mapping of (position, layer) to torch.Tensor, optional
            With ``knorm+merge``: which of the ranked tokens (:attr:`MergeCompaction.candidates`)
            are kept at a position in a layer, as ascending indices,
            ``[kv_heads, (k - p) * bs]``, instead of the oracle's choice: to follow another
            implementation through near ties. :attr:`MergeCompaction.kept` still has the
            oracle's own choice, made from the state that was followed until then.
        forced_choice : mapping of (position, layer) to torch.Tensor, optional
            With ``best``: what each slot holds after the compaction at a position in a layer,
            as in :attr:`MergeCompaction.held` (positions of tokens, all slots,
            ``[kv_heads, slots]``), likewise.

        Returns
        -------
        OracleResult
            Its compactions are :class:`MergeCompaction`, in order of position, then band.
        """
        if forced_choice and self.settings.pooling != "best":
            raise ValueError(f"pooling {self.settings.pooling!r} chooses nothing")
        if forced_kept and self.settings.method == "merge":
            raise ValueError("the method merge ranks nothing")
        count = len(self.layers)
        total = len(prompt_ids) + num_decode
        nothing = torch.zeros(self.kv_heads, 0, self.head_dim)
        self._unrotated = torch.zeros(count, self.kv_heads, total, self.head_dim)
        self._slot_keys, self._slot_values = [nothing] * count, [nothing] * count
        self._blocks: list[list[torch.Tensor]] = [[] for _ in self.layers]
        self._held = [torch.zeros(self.kv_heads, 0, dtype=torch.int64)] * count
        self._pooled = [0] * len(self.band_layers)
        self._forced_choice = forced_choice or {}
        return super().run(prompt_ids, num_decode, forced_tokens, forced_kept)

    def slots(self, layer: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Cache of one layer after the last run.

        Returns
        -------
        list[torch.Tensor]
            Members of the slots of each block, ``[kv_heads, slots, 2**level]``.
        torch.Tensor, torch.Tensor
            Keys and values, each ``[kv_heads, slots, head_dim]``.
        """
        return self._blocks[layer], self._slot_keys[layer], self._slot_values[layer]

    def _rotated(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate keys with the model's own code, at positions that need not be whole.

        Parameters
        ----------
        keys : torch.Tensor
            ``[heads, tokens, head_dim]``, without rotation.
        positions : torch.Tensor
            ``[heads, tokens]``.

        Returns
        -------
        torch.Tensor
            ``[heads, tokens, head_dim]``.
        """
        cos, sin = self.model.model.rotary_emb(keys, positions)
        # Each head is a batch of its own.
        return apply_rotary_pos_emb(keys[:, None], keys[:, None], cos, sin)[1][:, 0]

    def _attend(
        self, index: int, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the new tokens over all slots and new ones, ``[tokens, hidden]``."""
        attention = self.layers[index].self_attn
        first, count = self._computed, len(normed)
        new = torch.arange(first, first + count)
        query, key, value = (
            project(normed).view(count, -1, self.head_dim).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self._unrotated[index][:, new] = key
        (query,), (key,) = apply_rotary_pos_emb(query[None], key[None], cos[None], sin[None])
        self._keys[index][:, new], self._values[index][:, new] = key, value

        keys = torch.cat([self._slot_keys[index], key], 1)
        values = torch.cat([self._slot_values[index], value], 1)
        self._slot_keys[index], self._slot_values[index] = keys, values
        self._held[index] = torch.cat([self._held[index], new.expand(self.kv_heads, -1)], 1)
        blocks = self._blocks[index]
        added = new[:, None].expand(self.kv_heads, -1, 1)
        if blocks and blocks[-1].shape[1] < self.block_size:
            added = torch.cat([blocks.pop(), added], 1)
        blocks += added.split(self.block_size, 1)

        bias = torch.zeros(keys.shape[1])
        if self.settings.merge_weighting == "count":
            counts = [block.shape[2] for block in blocks for _ in range(block.shape[1])]
            bias = torch.tensor(counts).log()
        # The last slots are the new tokens.
        later = torch.arange(-len(bias), 0) > torch.arange(-count, 0)[:, None]
        # Query heads of one KV head are neighbours.
        group = self.query_heads // self.kv_heads
        output = scaled_dot_product_attention(
            query,
            keys.repeat_interleave(group, 0),
            values.repeat_interleave(group, 0),
            attn_mask=bias.expand(count, -1).masked_fill(later, -math.inf),
        )
        return attention.o_proj(output.transpose(0, 1).reshape(count, -1))

    def _compact(self, forced_kept: Forced) -> list[MergeCompaction]:
        """Compact every band that is due at the current position."""
        position, done = self._computed, []
        for band, (layers, budget) in enumerate(
            zip(self.band_layers, self.band_budgets, strict=True)
        ):
            shapes = [[block.shape for block in self._blocks[layer]] for layer in layers]
            assert all(shape == shapes[0] for shape in shapes), "one plan for a band"
            planned = planned_merge(
                self.settings,
                self.block_size,
                self._base,
                position,
                sum(slots for _, slots, _ in shapes[0]),
                budget,
                self.shares[band],
            )
            if planned is None:
                continue
            e, k, pooled = planned
            first = self._base // self.block_size
            compaction = None
            for layer in layers:
                blocks = self._blocks[layer]
                before, candidates, behind = (
                    blocks[:first],
                    blocks[first : first + e],
                    blocks[first + e :],
                )
                if self.settings.method == "merge":
                    sinks = k - pooled
                    made = candidates[:sinks] + merged_blocks(candidates[sinks:], pooled)
                    ranking = None
                else:
                    forced = forced_kept.get((position, layer))
                    old = self._pooled[band]
                    kept, others, ranking = self._rank(
                        layer, torch.cat(candidates[old:], 1)[..., 0], k - pooled, forced
                    )
                    made = merged_blocks([*candidates[:old], *others], pooled) + kept
                levels = tuple(block_level(block) for block in made)
                if compaction is None:
                    compaction = MergeCompaction(position, band, layers, e, k, pooled, levels)
                assert compaction.levels == levels, "one plan for a band"
                assert len(levels) == k
                if ranking is not None:
                    (
                        compaction.kept[layer],
                        compaction.candidates[layer],
                        compaction.scores[layer],
                    ) = ranking
                self._blocks[layer] = before + made + behind
                compaction.members[layer] = tuple(self._blocks[layer])
                if self.settings.pooling == "best":
                    self._choose(layer, compaction)
                self._fill_slots(layer)
            self._pooled[band] = pooled
            done.append(compaction)
        return done

    def _rank(
        self, layer: int, ranked: torch.Tensor, keep: int, forced: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Choose the tokens of one layer that stay alone.

        Parameters
        ----------
        layer : int
        ranked : torch.Tensor
            The ranked tokens, ``[kv_heads, tokens]``.
        keep : int
            Number of blocks to keep.
        forced : torch.Tensor or None
            What to keep instead, as indices into ``ranked``.

        Returns
        -------
        list[torch.Tensor], list[torch.Tensor]
            Blocks of kept tokens and of others.
        tuple[torch.Tensor, ...]
            The oracle's own choice, the candidates and the scores.
        """
        assert (ranked.diff(dim=1) > 0).all(), "ranked tokens are in age order"
        scores = -self._keys[layer].square().sum(-1).sqrt().gather(1, ranked)
        scores[:, : 0 if self._base else self.settings.sink_tokens] = math.inf
        count = keep * self.block_size
        chosen = best_candidates(scores, count)
        own = ranked[chosen].view(self.kv_heads, count)
        if forced is not None:
            forced = torch.as_tensor(forced)
            where = f"layer {layer} at {self._computed}"
            if forced.shape != own.shape:
                raise ValueError(f"{where}: kept {list(forced.shape)}, expected {list(own.shape)}")
            if not (forced.diff(dim=1) > 0).all():
                raise ValueError(f"{where}: what is kept is not in age order")
            chosen = torch.zeros_like(chosen).scatter_(1, forced, True)
        kept, others = (
            ranked[which].view(self.kv_heads, -1, 1).split(self.block_size, 1)
            for which in (chosen, ~chosen)
        )
        # Splitting nothing gives one empty tensor.
        return (
            [block for block in kept if block.shape[1]],
            [block for block in others if block.shape[1]],
            (own, ranked, scores),
        )

    def _choose(self, layer: int, compaction: MergeCompaction) -> None:
        """Choose the token that each slot of one layer holds; fill the layer's record."""
        before = self._held[layer]
        norms = self._keys[layer, :, : self._computed].square().sum(-1).sqrt()
        eligible = torch.full_like(norms, math.inf).scatter_(1, before, norms.gather(1, before))
        held = []
        for block in compaction.members[layer]:
            # A tree of comparisons in which the first wins ties finds the first of the lowest,
            # and so does numpy's argmin.
            lowest = eligible.gather(1, block.flatten(1)).view(block.shape).numpy().argmin(2)
            held.append(block.gather(2, torch.from_numpy(lowest)[..., None])[..., 0])
        compaction.held[layer] = torch.cat(held, 1)
        compaction.held_before[layer] = before
        compaction.norms[layer] = norms
        self._held[layer] = compaction.held[layer]
        forced = self._forced_choice.get((compaction.position, layer))
        if forced is not None:
            forced = torch.as_tensor(forced)
            where = f"layer {layer} at {compaction.position}"
            if forced.shape != compaction.held[layer].shape:
                raise ValueError(
                    f"{where}: holds {list(forced.shape)}, expected "
                    f"{list(compaction.held[layer].shape)}"
                )
            if not _possible_choices(compaction, layer, forced):
                raise ValueError(f"{where}: a slot holds a token that it cannot hold")
            self._held[layer] = forced

    def _fill_slots(self, layer: int) -> None:
        """Take what the slots of one layer hold from the dense history."""
        keys, values = self._keys[layer], self._values[layer]
        if self.settings.pooling == "best":
            self._slot_keys[layer] = self._history(keys, self._held[layer])
            self._slot_values[layer] = self._history(values, self._held[layer])
            return
        slot_keys, slot_values = [], []
        for members in self._blocks[layer]:
            if self.settings.pooling == "max":
                slot_keys.append(self._history(keys, members).amax(2))
                slot_values.append(self._history(values, members).amax(2))
            else:
                mean = self._history(self._unrotated[layer], members).mean(2)
                slot_keys.append(self._rotated(mean, members.double().mean(2).float()))
                slot_values.append(self._history(values, members).mean(2))
        self._slot_keys[layer] = torch.cat(slot_keys, 1)
        self._slot_values[layer] = torch.cat(slot_values, 1)

    def _history(self, history: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Part of ``[kv_heads, t, head_dim]``, the tokens ``[kv_heads, ...]`` of each head."""
        index = tokens.flatten(1)[..., None].expand(-1, -1, self.head_dim)
        return history.gather(1, index).view(*tokens.shape, self.head_dim)


# Comparing.


def ranking_agrees(
    compaction: MergeCompaction, layer: int, found: torch.Tensor, rtol: float = 1e-5
) -> bool:
    """Whether another implementation of ``knorm+merge`` kept the same tokens, but for near ties.

    Parameters
    ----------
    compaction : MergeCompaction
        The oracle's compaction.
    layer : int
    found : torch.Tensor
        As in ``forced_kept`` of :meth:`DenseMergeOracle.run`: indices of the ranked tokens that
        the other one keeps, ``[kv_heads, (k - p) * bs]``.
    rtol : float
        As in :func:`oracle.kept_sets_agree`.

    Returns
    -------
    bool
    """
    found, ranked = torch.as_tensor(found), compaction.candidates[layer]
    if found.shape != compaction.kept[layer].shape:
        return False
    if not ((found >= 0) & (found < ranked.shape[1])).all():
        return False
    tokens = ranked.gather(1, found)
    if ranked.shape == tokens.shape:
        return torch.equal(tokens, ranked)
    return kept_sets_agree(compaction, layer, tokens, rtol)


def _possible_choices(compaction: MergeCompaction, layer: int, found: torch.Tensor) -> bool:
    """Whether each slot holds a token of its own that was held before, ``[kv_heads, slots]``."""
    first = 0
    for members in compaction.members[layer]:
        held = found[:, first : first + members.shape[1], None]
        if not (members == held).any(2).all():
            return False
        first += members.shape[1]
    return all(
        torch.isin(tokens, before).all()
        for tokens, before in zip(found, compaction.held_before[layer], strict=True)
    )


def choices_agree(
    compaction: MergeCompaction, layer: int, found: torch.Tensor, rtol: float = 1e-5
) -> bool:
    """Whether another implementation of ``best`` chose the same tokens, up to near ties.

    Parameters
    ----------
    compaction : MergeCompaction
        The oracle's compaction.
    layer : int
    found : torch.Tensor
        ``[kv_heads, slots]``: position of the token that each slot of the other one holds after
        the compaction, for all slots, as in :attr:`MergeCompaction.held`.
    rtol : float
        A slot may hold any member that was held before and whose norm is at most this share
        above the lowest norm of all members. All members count, not only those that were
        held: rounding norms keeps their order, so near ties do not add up over rounds.
        0 accepts equal norms only.

    Returns
    -------
    bool
        False also for another number of slots and for any difference outside of merged slots.
    """
    found = torch.as_tensor(found)
    if found.shape != compaction.held[layer].shape:
        return False
    if not _possible_choices(compaction, layer, found):
        return False
    norms = compaction.norms[layer].double()
    lowest = [
        norms.gather(1, block.flatten(1)).view(block.shape).amin(2)
        for block in compaction.members[layer]
    ]
    return bool((norms.gather(1, found) <= torch.cat(lowest, 1) * (1 + rtol)).all())
