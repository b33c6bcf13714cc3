"""Independent dense oracle of KV cache compression, for tests.

It runs a Hugging Face causal LM of the Llama family in float32 with dense keys, values and
a mask of live tokens, and shares nothing with the plugin but
:class:`~vllm_kvcompress.settings.Settings`. What follows is its whole specification.

State
-----
``bs`` is the block size, ``P`` the prompt length, ``t`` the number of tokens computed so far
(positions ``0 .. t-1``). Per layer there are the keys, rotated with their true positions, and
the values of every computed token, ``[kv_heads, t, head_dim]``, and a mask of the live ones,
``[kv_heads, t]``. A query at position ``i`` sees the tokens at positions ``<= i`` that were
live when it was computed; positions are never re-numbered.

When
----
A compaction may happen when ``t`` is a grid position, before the token at position ``t`` is
computed (its logits come from that later step, so logits of already computed tokens never
change):

* ``after_prefill``: ``P + j * interval``, ``j >= 0``;
* ``during_prefill``: the same, and ``j * interval < P``, ``j >= 1``;
* ``decode``: ``P + j * interval``, ``j >= 1``.

With a context of ``N`` prompt tokens the grid is, up to ``N``, that of a prompt of ``N`` tokens,
and after it ``P + j * interval``, ``j >= 1``.

Nothing happens while ``t < prune_after``, nor after the last computed token: the last
decoded token is drawn but never computed.

How many
--------
Layers in ``skip_layers`` belong to no band and keep everything. For each band, with ``B`` its
budget in tokens and ``f`` its share:

* ``base``: ``ceil(P / bs) * bs`` in phase ``decode``, else 0. The tokens at positions below
  ``base`` are never touched and do not count; with a base there are no sinks. With a context
  it is 0 up to ``N``, then as in phase ``decode``, and ``keep_ratio`` is a share of ``t - base``.
* ``n``: live tokens per head, minus ``base``.
* ``T``: the tokens to keep, ``B``, or with ``keep_ratio`` ``ceil(keep_ratio * f * t)``.
* ``k_min = max(ceil(sinks / bs), 1)`` blocks stay of the candidates below at least.
* ``r = max(recent_tokens, min(floor(recent_ratio * T), T - (k_min + 1) * bs + 1))``: a share of
  what is kept, if sinks and a partial block still fit beside it.
* ``e = max(0, (n - r) // bs)``: the oldest ``e * bs`` live tokens after ``base``
  are the candidates; the other ``u = n - e * bs`` stay.
* ``budget``: if ``n > B``, ``k = max((B - u) // bs, k_min)``.
* ``keep_ratio``: ``k = max(ceil((T - u) / bs), k_min)``.
* The band compacts if and only if ``k < e``; then ``k * bs`` of the candidates stay.
* With the method ``merge`` (see :mod:`merge_oracle`) tokens are slots, and ``k_min`` is
  ``ceil(sinks / bs) + 1``: sinks have blocks of their own. For ``r`` a block per binary digit of
  ``t // bs``, at least one, stands in the place of this 1, and with ``knorm+merge`` sinks have a
  block at least.

Ratios are exact: ``keep_ratio`` and ``pyramid_beta`` are the fractions their decimal
strings say, ``Fraction(str(value))``.

Heads in ``skip_heads`` keep everything; a layer compacts its other KV heads, if there are any.
Records of such a layer have rows for these only. Heads in ``boost_heads`` are a band of their
own, the last, with the share ``f = boost``; in records those of layer ``i`` of ``m`` are layer
``m + i``. Both are defined for one band of other heads, and not for ``random``, whose heads the
plugin counts by where they lie.

Bands are contiguous runs of the layers that are not skipped, as equal as possible, longer
ones first. Layer ``i`` of ``m`` (all layers of the model count) has the share
``1 + (i / m) * (1 / beta - 1)``; a band's share ``f`` is the mean of its layers, its budget
``B`` is ``budget * f`` rounded up to whole blocks.

Which
-----
Per KV head, the first ``sinks`` candidates stay; the others by score, in float32, on the
rotated keys, highest first, older first where equal:

* ``knorm``: minus the L2 norm of the key;
* ``keydiff``: minus the cosine between the key and the mean of the L2-normalised keys of all
  candidates (sinks included);
* ``kvdiff``: the norm of the value minus that cosine, each less its mean over all candidates
  and divided by its standard deviation (that of the population) over them;
* ``streaming``: the order of age, the newest highest;
* ``random``: the hash ``f(i * 0x9E3779B9 ^ key)`` of the candidate ``i``, in 32 bits, without
  its last 8. ``f`` is the finalizer of MurmurHash3. A head's key comes from the words ``seed``,
  ``seed >> 32``, ``layer``, ``t`` and ``head``: from 0 on, ``key = f(key + 0x9E3779B9 + word)``.

Near ties are decided by rounding noise, and the plugin rounds the scores of ``knorm``,
``keydiff`` and ``kvdiff`` to 12 bits so that age decides them; the oracle does not. (They are
not rare: rotation preserves norms, so in layer 0 all occurrences of one token tie in ``knorm``.)
Compare with :func:`kept_sets_agree` and follow with ``forced_kept``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from vllm_kvcompress.settings import Settings

QUERY_CHUNK = 256
"""Prompt tokens computed at once; only bounds the memory of the dense attention."""

MODEL_TYPES = ("llama", "qwen2")
"""Architectures with exactly the modules that :class:`DenseOracle` calls."""


@dataclass(frozen=True)
class Compaction:
    """One band compacted at one position.

    Attributes
    ----------
    position : int
        Tokens computed so far (``t``).
    band : int
        Index of the band.
    candidate_blocks, kept_blocks : int
        ``e`` and ``k``: the candidates fill ``e`` blocks, ``k`` blocks of them stay.
    kept : dict[int, torch.Tensor]
        Per layer (or boosted heads of one), the positions of all tokens that are live afterwards,
        ``[kv_heads, live]``, int64, ascending.
    candidates : dict[int, torch.Tensor]
        Per layer, the positions of the candidates, ``[kv_heads, e * bs]``, int64, ascending.
    scores : dict[int, torch.Tensor]
        Per layer, the scores of the candidates, ``[kv_heads, e * bs]``, float32;
        infinite for sinks.
    """

    position: int
    band: int
    candidate_blocks: int
    kept_blocks: int
    kept: dict[int, torch.Tensor]
    candidates: dict[int, torch.Tensor]
    scores: dict[int, torch.Tensor]


@dataclass(frozen=True)
class OracleResult:
    """What a run produced.

    Attributes
    ----------
    tokens : list[int]
        The decoded tokens, ``num_decode`` of them: greedy, or the forced ones.
    logprobs : torch.Tensor
        ``[num_decode, vocab]``, float32: row ``i`` is the distribution token ``i`` is drawn from.
    compactions : list[Compaction]
        In order of position, then band.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    compactions: list[Compaction]

    @property
    def token_logprobs(self) -> torch.Tensor:
        """Log-probability of each decoded token, ``[num_decode]``, float32."""
        return self.logprobs.gather(1, torch.tensor(self.tokens)[:, None])[:, 0]


# When and how many.


def is_grid_position(
    settings: Settings, prompt_length: int, position: int, context: int | None = None
) -> bool:
    """Whether a compaction may happen with ``position`` tokens computed."""
    if context is not None:
        if position > context:
            generated = position - prompt_length
            return generated > 0 and generated % settings.interval == 0
        prompt_length = context
    past_prompt = position - prompt_length
    if past_prompt < 0:
        during = settings.phase == "during_prefill"
        return during and position > 0 and position % settings.interval == 0
    if past_prompt == 0:
        return settings.phase != "decode"
    return past_prompt % settings.interval == 0


def untouched_base(settings: Settings, block_size: int, prompt_length: int) -> int:
    """First tokens that are outside of compression: the prompt's blocks in phase decode."""
    if settings.phase != "decode":
        return 0
    return math.ceil(Fraction(prompt_length, block_size)) * block_size


def layer_share(settings: Settings, layer: int, num_layers: int) -> Fraction:
    """Budget of a layer relative to that of layer 0, exact; boosted heads' one behind the last."""
    if layer >= num_layers:
        return Fraction(str(settings.boost))
    beta = Fraction(str(settings.pyramid_beta))
    return 1 + Fraction(layer, num_layers) * (1 / beta - 1)


def band_share(settings: Settings, layers: Sequence[int], num_layers: int) -> Fraction:
    """Mean share of a band's layers, exact."""
    return sum(layer_share(settings, layer, num_layers) for layer in layers) / len(layers)


def band_budgets(
    settings: Settings, num_layers: int, block_size: int, bands: int
) -> tuple[list[tuple[int, ...]], list[int | None]]:
    """Cut the layers into bands and give each its budget.

    Parameters
    ----------
    settings : Settings
    num_layers : int
        All layers of the model, skipped ones included.
    block_size : int
    bands : int
        Number of bands, at most the layers that are not skipped.

    Returns
    -------
    list[tuple[int, ...]]
        Layers of each band, and those of boosted heads if there are any.
    list[int | None]
        Budget of each band in tokens, a multiple of ``block_size``; ``None`` with
        ``keep_ratio``.
    """
    eligible = [layer for layer in range(num_layers) if layer not in settings.skip_layers]
    if not 1 <= bands <= len(eligible):
        raise ValueError(f"{bands} bands of {len(eligible)} layers")
    layers = [tuple(int(layer) for layer in run) for run in np.array_split(eligible, bands)]
    if settings.boost_heads:
        layers.append(tuple(num_layers + layer for layer in eligible))
    if settings.token_budget is None:
        return layers, [None] * len(layers)
    budgets = []
    for run in layers:
        tokens = settings.token_budget * band_share(settings, run, num_layers)
        budgets.append(math.ceil(tokens / block_size) * block_size)
    return layers, budgets


def planned_blocks(
    settings: Settings,
    block_size: int,
    base: int,
    position: int,
    live: int,
    budget: int | None,
    share: Fraction,
    since: int = 0,
) -> tuple[int, int] | None:
    """Decide on a band's compaction at a grid position.

    Parameters
    ----------
    settings : Settings
    block_size, base : int
        See the specification at the top of this module.
    position : int
        Tokens computed so far.
    live : int
        Live tokens per head, those below ``base`` included.
    budget : int or None
        Budget of the band in tokens; unused with ``keep_ratio``.
    share : Fraction
        Share of the band; used with ``keep_ratio`` only.
    since : int
        Position from which tokens count for ``keep_ratio``.

    Returns
    -------
    tuple[int, int] or None
        ``e`` and ``k``, or ``None`` if the band does not compact.
    """
    if not settings.enabled or position < settings.prune_after:
        return None
    n = live - base
    sinks = 0 if base else settings.sink_tokens
    sink_blocks = math.ceil(Fraction(sinks, block_size))
    at_least = sink_blocks + 1 if settings.method == "merge" else max(sink_blocks, 1)
    target = budget
    if settings.keep_ratio is not None:
        target = math.ceil(Fraction(str(settings.keep_ratio)) * share * (position - since))
    beside = at_least
    if "merge" in settings.method:
        beside = sink_blocks if settings.method == "merge" else max(sink_blocks, 1)
        beside += max(1, len(f"{position // block_size:b}"))
    recent = math.floor(Fraction(str(settings.recent_ratio)) * target)
    recent = max(settings.recent_tokens, min(recent, target - (beside + 1) * block_size + 1))
    e = max(0, (n - recent) // block_size)
    u = n - e * block_size
    if settings.keep_ratio is not None:
        k = max(math.ceil(Fraction(target - u, block_size)), at_least)
    elif n > budget:
        k = max((budget - u) // block_size, at_least)
    else:
        return None
    return (e, k) if k < e else None


def planned_trajectory(
    settings: Settings,
    block_size: int,
    prompt_length: int,
    computed: int,
    budget: int | None,
    share: Fraction = Fraction(1),
) -> list[tuple[int, int, int, int]]:
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
    list[tuple[int, int, int, int]]
        Position, live tokens per head before, ``e`` and ``k`` of each compaction.
    """
    base = untouched_base(settings, block_size, prompt_length)
    removed, compactions = 0, []
    for position in range(1, computed):
        if is_grid_position(settings, prompt_length, position):
            live = position - removed
            planned = planned_blocks(settings, block_size, base, position, live, budget, share)
            if planned is not None:
                compactions.append((position, live, *planned))
                removed += (planned[0] - planned[1]) * block_size
    return compactions


# Which.


def candidate_scores(
    settings: Settings,
    keys: torch.Tensor,
    layer: int,
    position: int,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score the candidates of one layer.

    Parameters
    ----------
    settings : Settings
        Names the method and the seed.
    keys : torch.Tensor
        ``[kv_heads, candidates, head_dim]``, float32, rotated, in age order.
    layer, position : int
        Seed the random method.
    values : torch.Tensor or None
        As ``keys``; only ``kvdiff`` needs them.

    Returns
    -------
    torch.Tensor
        ``[kv_heads, candidates]``, float32, the highest are kept.
    """
    heads, count, _ = keys.shape
    norms = keys.square().sum(-1).sqrt()
    if settings.method == "knorm":
        return -norms
    if settings.method == "keydiff":
        mean = (keys / norms[..., None]).mean(1)
        dots = torch.einsum("htd,hd->ht", keys, mean)
        return -dots / (norms * mean.square().sum(-1).sqrt()[:, None])
    if settings.method == "kvdiff":
        assert values is not None
        mean = (keys / norms[..., None]).mean(1)
        dots = torch.einsum("htd,hd->ht", keys, mean)
        cosines = dots / (norms * mean.square().sum(-1).sqrt()[:, None])
        lengths = values.square().sum(-1).sqrt()
        parts = []
        for part in (lengths, cosines):
            variance, average = torch.var_mean(part, dim=1, keepdim=True, correction=0)
            parts.append((part - average) / variance.sqrt())
        return parts[0] - parts[1]
    if settings.method == "streaming":
        return torch.arange(count).float().repeat(heads, 1)
    if settings.method == "random":
        rows = []
        for head in range(heads):
            key = np.zeros(1, np.uint32)
            for word in (settings.seed, settings.seed >> 32, layer, position, head):
                key = murmur_finalizer(key + np.uint32((0x9E3779B9 + word) & 0xFFFFFFFF))
            tokens = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9)
            rows.append(murmur_finalizer(tokens ^ key) >> np.uint32(8))
        return torch.from_numpy(np.stack(rows).astype(np.float32))
    raise ValueError(f"the oracle does not know the method {settings.method!r}")


def murmur_finalizer(words: np.ndarray) -> np.ndarray:
    """MurmurHash3's last step, of uint32."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def best_candidates(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Mark the candidates that stay.

    Parameters
    ----------
    scores : torch.Tensor
        ``[kv_heads, candidates]``, float32, in age order; infinite for sinks.
    keep : int
        Candidates to keep per head.

    Returns
    -------
    torch.Tensor
        ``[kv_heads, candidates]``, bool; ``keep`` true per head, older first where equal.
    """
    age = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    best = np.lexsort((age, -scores.numpy()))[:, :keep]
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    return chosen.scatter_(1, torch.from_numpy(best), True)


# The model.


class DenseOracle:
    """A causal LM with dense, per-head compressed attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Llama-like causal LM in float32.
    settings : Settings
    block_size : int
        Tokens per block.
    band_layers : sequence of sequence of int
        Layers of each band, ``m + i`` for boosted heads; other layers keep everything.
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
        config = model.config
        if config.model_type not in MODEL_TYPES:
            raise ValueError(f"the oracle knows {MODEL_TYPES}, not {config.model_type!r}")
        if model.dtype != torch.float32:
            raise ValueError(f"the oracle computes in float32, the model is {model.dtype}")
        if len(band_layers) != len(band_budgets):
            raise ValueError("one budget per band")
        self.model = model.eval()
        self.layers = model.model.layers
        self.settings = settings
        self.block_size = block_size
        self.band_layers = [tuple(layers) for layers in band_layers]
        self.band_budgets = list(band_budgets)
        self.shares = [
            band_share(settings, layers, len(self.layers)) for layers in self.band_layers
        ]
        self.query_heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        apart = {*settings.skip_heads, *settings.boost_heads}
        self.compressed = [
            [head for head in range(self.kv_heads) if (layer, head) not in apart]
            for layer in range(len(self.layers))
        ] + [
            [head for head in range(self.kv_heads) if (layer, head) in settings.boost_heads]
            for layer in range(len(self.layers))
        ]
        """KV heads of each layer that have the usual budget, then those that are boosted."""
        bands = 2 if settings.boost_heads else 1
        if apart and (len(band_layers) > bands or settings.method == "random"):
            raise ValueError("heads apart are defined for one band, and not for random")
        self.head_dim = self.layers[0].self_attn.head_dim

    @torch.no_grad()
    def run(
        self,
        prompt_ids: Sequence[int],
        num_decode: int,
        forced_tokens: Sequence[int] | None = None,
        forced_kept: Mapping[tuple[int, int], torch.Tensor] | None = None,
        context: int | None = None,
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
            Positions that are live after the compaction at a position in a layer,
            ``[kv_heads, live]``, instead of the oracle's choice: to follow another
            implementation through near ties. :attr:`Compaction.kept` still holds the
            oracle's own choice, made from the state that was followed until then.
        context : int, optional
            Prompt tokens that are compressed before the others are computed.

        Returns
        -------
        OracleResult
        """
        if forced_tokens is not None and len(forced_tokens) != num_decode:
            raise ValueError(f"{len(forced_tokens)} forced tokens for num_decode={num_decode}")
        prompt_length = len(prompt_ids)
        total = prompt_length + num_decode
        shape = (len(self.layers), self.kv_heads, total, self.head_dim)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        self._alive = torch.zeros(shape[:3], dtype=torch.bool)
        self._computed = 0
        self._base = untouched_base(self.settings, self.block_size, prompt_length)

        compactions: list[Compaction] = []
        tokens: list[int] = []
        logprobs = []
        forced_kept = forced_kept or {}

        def is_grid(position: int) -> bool:
            return is_grid_position(self.settings, prompt_length, position, context)

        cuts = [position for position in range(1, prompt_length) if is_grid(position)]
        for end in [*cuts, prompt_length]:
            if is_grid(self._computed):
                compactions += self._compact(forced_kept)
            hidden = self._forward(prompt_ids[self._computed : end])
        for step in range(num_decode):
            if step:
                if context is not None and self._computed > context:
                    self._base = math.ceil(prompt_length / self.block_size) * self.block_size
                if is_grid(self._computed):
                    compactions += self._compact(forced_kept)
                hidden = self._forward(tokens[-1:])
            logprobs.append(self.model.lm_head(hidden).float().log_softmax(-1))
            token = logprobs[-1].argmax() if forced_tokens is None else forced_tokens[step]
            tokens.append(int(token))
        return OracleResult(tokens, torch.stack(logprobs), compactions)

    def _forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Compute the next tokens; the last one's final hidden state, ``[hidden]``."""
        for start in range(0, len(token_ids), QUERY_CHUNK):
            ids = torch.tensor(token_ids[start : start + QUERY_CHUNK])
            end = self._computed + len(ids)
            hidden = self.model.model.embed_tokens(ids)
            cos, sin = self.model.model.rotary_emb(
                hidden[None], torch.arange(self._computed, end)[None]
            )
            for index, layer in enumerate(self.layers):
                normed = layer.input_layernorm(hidden)
                hidden = hidden + self._attend(index, normed, cos[0], sin[0])
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            self._computed = end
        return self.model.model.norm(hidden[-1])

    def _attend(
        self, index: int, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the new tokens over live and new ones, ``[tokens, hidden]``."""
        attention = self.layers[index].self_attn
        count, first = len(normed), self._computed
        end = first + count

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(count, -1, self.head_dim).transpose(0, 1)

        query = _rotate(heads(attention.q_proj(normed)), cos, sin)
        self._keys[index, :, first:end] = _rotate(heads(attention.k_proj(normed)), cos, sin)
        self._values[index, :, first:end] = heads(attention.v_proj(normed))
        self._alive[index, :, first:end] = True

        causal = torch.arange(end) <= torch.arange(first, end)[:, None]
        visible = self._alive[index, :, None, :end] & causal
        # Query heads of one KV head are neighbours: [kv_heads, group, tokens, ...].
        query = query.reshape(self.kv_heads, -1, count, self.head_dim)
        logits = torch.einsum("hgqd,hkd->hgqk", query, self._keys[index, :, :end])
        logits = logits / math.sqrt(self.head_dim)
        logits.masked_fill_(~visible[:, None], -math.inf)
        weights = logits.softmax(-1)
        output = torch.einsum("hgqk,hkd->hgqd", weights, self._values[index, :, :end])
        output = output.reshape(self.query_heads, count, self.head_dim).transpose(0, 1)
        return attention.o_proj(output.reshape(count, -1))

    def _compact(self, forced_kept: Mapping[tuple[int, int], torch.Tensor]) -> list[Compaction]:
        """Compact every band that is due at the current position."""
        position, done = self._computed, []
        for band, (layers, budget) in enumerate(
            zip(self.band_layers, self.band_budgets, strict=True)
        ):
            layers = [layer for layer in layers if self.compressed[layer]]
            counts = torch.cat([self._heads(self._alive, i).sum(-1) for i in layers])
            live = int(counts[0])
            assert (counts == live).all(), "heads and layers of a band hold equally many tokens"
            planned = planned_blocks(
                self.settings,
                self.block_size,
                self._untouched(layers[0]),
                position,
                live,
                budget,
                self.shares[band],
                self._base,
            )
            if planned is None:
                continue
            compaction = Compaction(position, band, *planned, kept={}, candidates={}, scores={})
            for layer in layers:
                self._compact_layer(layer, compaction)
                if (position, layer) in forced_kept:
                    forced = torch.as_tensor(forced_kept[position, layer])
                    if forced.shape != compaction.kept[layer].shape:
                        raise ValueError(
                            f"layer {layer} at {position}: kept {list(forced.shape)}, expected "
                            f"{list(compaction.kept[layer].shape)}"
                        )
                    if not self._heads(self._alive, layer).gather(1, forced).all():
                        raise ValueError(f"layer {layer} at {position}: kept a dead token")
                    self._keep_only(layer, forced)
                else:
                    self._keep_only(layer, compaction.kept[layer])
            done.append(compaction)
        return done

    def _heads(self, cache: torch.Tensor, layer: int) -> torch.Tensor:
        """A copy of a layer's compressed heads; ``layer`` as in records."""
        return cache[layer % len(self.layers), self.compressed[layer]]

    def _keep_only(self, layer: int, kept: torch.Tensor) -> None:
        """Let all tokens but these die in the heads of a layer that are compressed."""
        dead = torch.zeros_like(self._heads(self._alive, layer))
        index, heads = layer % len(self.layers), self.compressed[layer]
        self._alive[index, heads] = dead.scatter_(1, kept, True)

    def _compact_layer(self, layer: int, compaction: Compaction) -> None:
        """Choose the tokens of one layer that stay; fill the layer's part of the record."""
        keep = compaction.kept_blocks * self.block_size
        base = self._untouched(layer)
        stop = base + compaction.candidate_blocks * self.block_size
        # nonzero is ordered by head, then position.
        heads = self.compressed[layer]
        live = self._heads(self._alive, layer).nonzero()[:, 1].view(len(heads), -1)
        candidates = live[:, base:stop]
        index = candidates[..., None].expand(-1, -1, self.head_dim)
        keys, values = (
            self._heads(cache, layer).gather(1, index) for cache in (self._keys, self._values)
        )
        scores = candidate_scores(self.settings, keys, layer, compaction.position, values)
        scores[:, : 0 if self._base else self.settings.sink_tokens] = math.inf
        chosen = candidates[best_candidates(scores, keep)].view(len(heads), keep)
        compaction.candidates[layer] = candidates
        compaction.scores[layer] = scores
        compaction.kept[layer] = torch.cat([live[:, :base], chosen, live[:, stop:]], 1)

    def _untouched(self, layer: int) -> int:
        """Live tokens below the base: fewer than it where a context was compressed."""
        return int(self._heads(self._alive, layer)[0, : self._base].sum())


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding by halves: ``[heads, tokens, head_dim]``, ``[tokens, head_dim]`` twice."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-right, left], dim=-1) * sin


# Comparing.


def max_logprob_difference(
    oracle_logprobs: torch.Tensor | Sequence[float], other: torch.Tensor | Sequence[float]
) -> float:
    """Largest absolute difference of two lists of log-probabilities of the same tokens.

    Parameters
    ----------
    oracle_logprobs, other : torch.Tensor or sequence of float
        ``[tokens]``, e.g. :attr:`OracleResult.token_logprobs` and the engine's.

    Returns
    -------
    float
        Not finite if any of the numbers is not.
    """
    ours = torch.as_tensor(oracle_logprobs, dtype=torch.float64)
    theirs = torch.as_tensor(other, dtype=torch.float64)
    if ours.shape != theirs.shape or not ours.numel():
        raise ValueError(f"cannot compare shapes {list(ours.shape)} and {list(theirs.shape)}")
    return float((ours - theirs).abs().max())


def check_logprobs(wanted: OracleResult, found: Sequence[float]) -> None:
    """Fail unless an engine gave its tokens the oracle's log-probabilities, and they are greedy.

    Parameters
    ----------
    wanted : OracleResult
        Of a run that was forced to the engine's tokens.
    found : sequence of float
        The engine's log-probabilities of these tokens.
    """
    greedy = wanted.logprobs.max(dim=-1)
    difference = max_logprob_difference(wanted.token_logprobs, found)
    print(f"largest difference in log-probability {difference:.1e}")
    assert difference <= 1e-3
    assert ((greedy.values - wanted.token_logprobs) <= 1e-3).all(), "another token was likelier"


def kept_sets_agree(
    compaction: Compaction, layer: int, other_kept: torch.Tensor, rtol: float = 1e-5
) -> bool:
    """Whether another implementation kept the same tokens, up to near ties of the score.

    Parameters
    ----------
    compaction : Compaction
        The oracle's compaction.
    layer : int
    other_kept : torch.Tensor
        ``[kv_heads, live]``: positions the other one holds after the compaction.
    rtol : float
        Relative to the head's largest absolute score: the other one may drop a token that
        scores no more than this above the highest score dropped here, and keep one that
        scores no more than this below the lowest score kept here. 0 accepts equal scores only.

    Returns
    -------
    bool
        False also for another number of tokens, a wrong order or a token named twice, and
        for any difference outside of the candidates or among the sinks.
    """
    kept = compaction.kept[layer]
    other_kept = torch.as_tensor(other_kept)
    if other_kept.shape != kept.shape or not (other_kept.diff(dim=1) > 0).all():
        return False
    for head in range(len(kept)):
        candidates = compaction.candidates[layer][head].tolist()
        scores = compaction.scores[layer][head].double().tolist()
        score = dict(zip(candidates, scores, strict=True))
        ours, theirs = set(kept[head].tolist()), set(other_kept[head].tolist())
        if not (ours ^ theirs) <= score.keys():
            return False
        lowest_kept = min(score[token] for token in candidates if token in ours)
        highest_dropped = max(score[token] for token in candidates if token not in ours)
        slack = rtol * max(abs(value) for value in scores if math.isfinite(value))
        if any(score[token] - highest_dropped > slack for token in ours - theirs):
            return False
        if any(lowest_kept - score[token] > slack for token in theirs - ours):
            return False
    return True
