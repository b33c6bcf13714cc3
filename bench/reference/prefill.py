"""One exact prefill for all presses.

A press prunes a layer's cache after that layer's attention has run, so what the model computes
during the prefill is the same with every press and without any. It is computed once here, with
a press that prunes nothing and remembers what it was given; each press is then given the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from kvpress import BasePress, ScorerPress, StreamingLLMPress
from torch import nn
from transformers import DynamicCache, PreTrainedModel

KeysValues = tuple[torch.Tensor, torch.Tensor]


class Seen(NamedTuple):
    """What kvpress gives a press for one layer: the arguments of ``BasePress.compress``."""

    module: nn.Module
    hidden_states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attentions: torch.Tensor | None
    kwargs: Mapping[str, Any]


@dataclass
class Recorder(BasePress):
    """Prunes nothing and remembers what it saw, layer by layer."""

    seen: list[Seen] = field(default_factory=list)

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> KeysValues:
        """Remember the arguments and return the keys and values as they are."""
        self.seen.append(Seen(module, hidden_states, keys, values, attentions, kwargs))
        return keys, values


@dataclass(frozen=True)
class Prefill:
    """A computed prompt, uncompressed.

    Attributes
    ----------
    model : PreTrainedModel
    layers : list of Seen
    hidden : torch.Tensor
        ``[1, 1, hidden_size]``: of the last token, after the last layer.
    scores : dict
        By press, of every layer; filled as presses are asked for.
    """

    model: PreTrainedModel
    layers: list[Seen]
    hidden: torch.Tensor
    scores: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, token_ids: list[int]) -> Prefill:
        """Compute a prompt."""
        recorder = Recorder()
        with recorder(model):
            output = model.model(
                input_ids=torch.tensor([token_ids]), past_key_values=DynamicCache()
            )
        return cls(model, recorder.seen, output.last_hidden_state[:, -1:])

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.layers[0].keys.shape[2]

    def whole(self) -> list[KeysValues]:
        """Keys and values of all layers, each ``[1, kv_heads, tokens, head_dim]``."""
        return [(layer.keys, layer.values) for layer in self.layers]

    @torch.no_grad()
    def compressed(self, press: ScorerPress, seed: int = 0) -> list[KeysValues]:
        """What a press leaves of the keys and values of all layers.

        Scores that do not depend on the share are computed once.

        Parameters
        ----------
        press : ScorerPress
        seed : int
            Of torch, for presses that draw random numbers: the prefill itself draws none.
        """
        name = type(press).__name__
        press.post_init_from_model(self.model)
        if name not in self.scores or isinstance(press, StreamingLLMPress):
            torch.manual_seed(seed)
            self.scores[name] = [press.score(*layer) for layer in self.layers]
        scores = iter(self.scores[name])
        press.score = lambda *_: next(scores)
        return [press.compress(*layer) for layer in self.layers]
