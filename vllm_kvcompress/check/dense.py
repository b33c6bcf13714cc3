"""Compressing a context once, in plain transformers, as the strict protocol has it.

The context is computed exactly and compressed; then comes what follows it (a question, or how
a text goes on), at its true positions. The paged cache does the same, but for whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vllm_kvcompress.methods import Method, ScoreContext, select_tokens, take_tokens
from vllm_kvcompress.settings import parse_settings


@dataclass(frozen=True)
class Context:
    """A computed context.

    Attributes
    ----------
    keys, values : tuple of torch.Tensor
        One per layer, ``[kv_heads, tokens, head_dim]``, as the model caches them.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        """Length of the context."""
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class Shape:
    """What no method may remove.

    Attributes
    ----------
    sinks, recent : int
        First and last tokens of the context that stay.
    recent_ratio : float
        Share of the tokens kept that are the last ones, where these are more than ``recent``.
    """

    sinks: int = 4
    recent: int = 64
    recent_ratio: float = 0.0

    @classmethod
    def usual(cls, recent_ratio: float | None = None) -> Shape:
        """The default of the settings, with another share if one is given."""
        usual = parse_settings({} if recent_ratio is None else {"recent_ratio": recent_ratio})
        return cls(usual.sink_tokens, usual.recent_tokens, usual.recent_ratio)

    def window(self, stay: int) -> int:
        """How many of the tokens kept are the last ones."""
        return max(self.recent, min(int(self.recent_ratio * stay), stay - self.sinks))


@torch.inference_mode()
def compute(model: Any, token_ids: Sequence[int]) -> Context:
    """Run a context through a causal LM.

    Raises
    ------
    ValueError
        Layers that do not cache keys and values of every token.
    """
    tokens = torch.tensor([list(token_ids)], device=model.device)
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    layers = getattr(cache, "layers", ())
    for number, layer in enumerate(layers):
        keys = getattr(layer, "keys", None)
        if keys is None or keys.ndim != 4 or keys.shape[2] != len(token_ids):
            raise ValueError(
                f"Layer {number} of this model does not cache a key of every token "
                f"({type(layer).__name__}); only models with full attention in all layers can be "
                "checked."
            )
    if not layers:
        raise ValueError(f"This model's cache ({type(cache).__name__}) has no layers to look at.")
    return Context(
        tuple(layer.keys[0] for layer in layers), tuple(layer.values[0] for layer in layers)
    )


def layer_scores(context: Context, method: Method, layer: int, recent: int) -> torch.Tensor:
    """Scores ``[kv_heads, candidates]`` of the tokens before the recent window."""
    old = slice(0, max(context.tokens - recent, 0))
    keys = context.keys[layer][:, old].float()
    values = context.values[layer][:, old].float() if method.needs_values else None
    return method.score(keys, ScoreContext(layer, context.tokens, 0, keys.shape[0]), values)


def kept_tokens(removed: float, tokens: int, shape: Shape) -> int:
    """How many tokens stay of a context when a share of it is removed."""
    return min(tokens, max(round((1 - removed) * tokens), shape.sinks + shape.recent))


def kept_of(context: Context, method: Method, layer: int, stay: int, shape: Shape) -> torch.Tensor:
    """Which tokens of a layer stay.

    Parameters
    ----------
    context : Context
    method : Method
    layer : int
    stay : int
        How many, as from :func:`kept_tokens`.
    shape : Shape

    Returns
    -------
    torch.Tensor
        ``[kv_heads, stay]``, int64, ascending indices.
    """
    recent = min(shape.window(stay), context.tokens)
    scores = layer_scores(context, method, layer, recent)
    sinks = min(shape.sinks, scores.shape[1])
    old = select_tokens(scores, max(stay - recent, sinks), sinks)
    new = torch.arange(context.tokens - recent, context.tokens, device=old.device)
    return torch.cat([old, new.expand(len(old), -1)], dim=1)


@torch.inference_mode()
def compress(context: Context, method: Method, keep: Sequence[int], shape: Shape) -> Context:
    """The context with fewer tokens, per layer and KV head.

    Parameters
    ----------
    context : Context
    method : Method
    keep : sequence of int
        Tokens that stay in each layer, as from :func:`kept_tokens`.
    shape : Shape

    Returns
    -------
    Context
    """
    keys, values = [], []
    for layer, stay in enumerate(keep):
        own_keys, own_values = context.keys[layer], context.values[layer]
        if stay < context.tokens:
            tokens = kept_of(context, method, layer, stay, shape)
            own_keys, own_values = take_tokens(own_keys, tokens), take_tokens(own_values, tokens)
        keys.append(own_keys)
        values.append(own_values)
    return Context(tuple(keys), tuple(values))


def cache_of(contexts: Sequence[Context]) -> DynamicCache:
    """A cache with these contexts as rows; they have equally many tokens in each layer."""
    return DynamicCache(
        [
            (
                torch.stack([context.keys[layer] for context in contexts]),
                torch.stack([context.values[layer] for context in contexts]),
            )
            for layer in range(len(contexts[0].keys))
        ]
    )


@torch.inference_mode()
def follow(
    model: Any, contexts: Sequence[Context], position: int, token_ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed what comes after a (compressed) context, at its true positions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With :func:`~vllm_kvcompress.check.attention.own_attention`.
    contexts : sequence of Context
        Compressed in several ways, to equally many tokens in each layer.
    position : int
        Tokens of the whole context, before compression.
    token_ids : sequence of int
        At least two.

    Returns
    -------
    tuple of torch.Tensor
        Log-probabilities of all these tokens but the first, and whether each was the most
        probable one, both ``[contexts, tokens - 1]``.
    """
    ids = torch.tensor([list(token_ids)], device=model.device).expand(len(contexts), -1)
    positions = torch.arange(position, position + ids.shape[1] - 1, device=ids.device)
    output = model(
        ids[:, :-1],
        past_key_values=cache_of(contexts),
        position_ids=positions.expand(len(contexts), -1),
        use_cache=True,
    )
    logprobs = torch.log_softmax(output.logits.float(), dim=-1)
    told = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return told, logprobs.argmax(dim=-1) == ids[:, 1:]
