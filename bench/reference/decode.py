"""What the model answers, or how well it predicts a text, on caches that were compressed.

As in kvpress's pipeline: the question is computed on the compressed cache with its true
positions, and decoding is greedy. Caches of equal length are decoded as one batch, and an
answer ends at the first end-of-sequence token (the pipeline looks for it from the second on).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.reference.prefill import KeysValues


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room behind it, so that a new token does not copy all others."""

    def __init__(self, caches: Sequence[KeysValues], room: int) -> None:
        super().__init__()
        self.lazy_initialization(*caches[0])
        self._whole = [
            torch.cat([F.pad(rows, (0, 0, 0, room)) for rows in part])
            for part in zip(*caches, strict=True)
        ]
        self._show(caches[0][0].shape[2])

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (part[:, :, :tokens] for part in self._whole)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> KeysValues:
        """Write behind the last token."""
        first = self.keys.shape[2]
        end = first + key_states.shape[2]
        for part, states in zip(self._whole, (key_states, value_states), strict=True):
            part[:, :, first:end] = states
        self._show(end)
        return self.keys, self.values


@contextmanager
def folded_attention() -> Iterator[None]:
    """Single queries of one KV head as the rows of one matrix: the same sums, read once.

    On CPU in bfloat16 it is several times faster than transformers' own way.
    """
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, Any]:
        rows, heads, queries, dim = query.shape
        if queries > 1 or mask is not None:
            return plain(module, query, key, value, mask, **more)
        grouped = query.view(rows, key.shape[1], -1, dim)
        found = F.scaled_dot_product_attention(grouped, key, value, scale=more["scaling"])
        return found.reshape(rows, 1, heads, dim), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def batch_of(caches: Sequence[Sequence[KeysValues]], room: int) -> Cache:
    """Caches of equal length as the rows of one, with room for more tokens."""
    return Cache(layers=[RoomyLayer(layer, room) for layer in zip(*caches, strict=True)])


@torch.no_grad()
@folded_attention()
def greedy(
    model: PreTrainedModel,
    caches: Sequence[Sequence[KeysValues]],
    start: Sequence[int],
    position: int,
    count: int,
    stop: frozenset[int],
) -> list[list[int]]:
    """Greedy continuations.

    Parameters
    ----------
    model : PreTrainedModel
    caches : sequence
        Rows of equal length, each a list of keys and values by layer.
    start : sequence of int
        Tokens to compute first, the same for all rows.
    position : int
        True position of the first of them.
    count : int
        Tokens to generate at most.
    stop : frozenset of int
        Tokens that end a continuation; they are not part of it.

    Returns
    -------
    list of list of int
        By row.
    """
    cache = batch_of(caches, len(start) + count)
    tokens = torch.tensor([list(start)] * len(caches))
    found: list[list[int]] = [[] for _ in caches]
    going = set(range(len(caches)))
    for _ in range(count):
        positions = torch.arange(position, position + tokens.shape[1])[None]
        position += tokens.shape[1]
        output = model(
            input_ids=tokens, past_key_values=cache, position_ids=positions, logits_to_keep=1
        )
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        for row in sorted(going):
            token = int(tokens[row])
            if token in stop:
                going.discard(row)
            else:
                found[row].append(token)
        if not going:
            break
    return found


@torch.no_grad()
def likelihood(
    model: PreTrainedModel, cache: Sequence[KeysValues], text: Sequence[int], position: int
) -> tuple[float, float]:
    """How well the model predicts a text, all of its tokens but the first.

    Parameters
    ----------
    model : PreTrainedModel
    cache : sequence
    text : sequence of int
    position : int
        True position of its first token.

    Returns
    -------
    tuple of float
        Share of the tokens that greedy decoding would have chosen, and their mean negative
        log-likelihood in nats.
    """
    output = model(
        input_ids=torch.tensor([list(text[:-1])]),
        past_key_values=batch_of([cache], len(text)),
        position_ids=torch.arange(position, position + len(text) - 1)[None],
    )
    logits, wanted = output.logits[0].float(), torch.tensor(list(text[1:]))
    chosen = (logits.argmax(-1) == wanted).double().mean()
    return float(chosen), float(F.cross_entropy(logits, wanted))
