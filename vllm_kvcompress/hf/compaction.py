"""A compaction of one layer: which rows, what of each, and with which method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vllm_kvcompress.hf.layer import SlotLayer
from vllm_kvcompress.hf.rotary import rotation_of
from vllm_kvcompress.hf.slots import Evict, Merge, Reduce, Step, run_step
from vllm_kvcompress.methods import METHODS, POOLINGS, ScoreContext
from vllm_kvcompress.settings import Settings


class Lengths(NamedTuple):
    """Tokens of each row, without padding.

    Attributes
    ----------
    length : int
        Columns seen.
    visible : torch.Tensor or None
        ``[rows, length]``, boolean: columns that are no padding; ``None`` if all.
    before, now : list of int
        Tokens before and after the latest forward call.
    prompt : list of int
        Tokens of the prompt.
    """

    length: int
    visible: torch.Tensor | None
    before: list[int]
    now: list[int]
    prompt: list[int]

    @classmethod
    def of(
        cls, length: int, fed: int, prompt: int, rows: int, visible: torch.Tensor | None
    ) -> Lengths:
        """Lengths after a forward call of ``fed`` columns; the prompt ends at column ``prompt``."""
        if visible is None:
            return cls(length, None, [length - fed] * rows, [length] * rows, [prompt] * rows)
        visible = visible.expand(rows, -1)
        ends = (length - fed, length, min(prompt, length))
        before, now, seen = torch.stack([visible[:, :end].sum(-1) for end in ends]).tolist()
        ahead = prompt - ends[2]
        return cls(length, visible, before, now, [tokens + ahead for tokens in seen])

    def row(self, row: int) -> tuple[int, int, int]:
        """One row's tokens before and after the call and in its prompt."""
        return self.before[row], self.now[row], self.prompt[row]


def visible_columns(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Columns that the latest query sees, ``[rows, length]``: all but padding.

    Parameters
    ----------
    mask : torch.Tensor or None
        As :meth:`SlotLayer.mask` takes it.
    """
    if mask is None:
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def compact(
    layer: SlotLayer,
    index: int,
    held: torch.Tensor,
    steps: Mapping[int, Step],
    tokens: Sequence[int],
    reduce: Reduce,
) -> None:
    """Run the steps of some rows of a layer; the others only lose their padding.

    Parameters
    ----------
    layer : SlotLayer
    index : int
        Of the layer in the model.
    held : torch.Tensor
        From :meth:`SlotLayer.held`.
    steps : mapping of int to Step
        By row.
    tokens : sequence of int
        Tokens of each row so far, removed ones included.
    reduce : Reduce
    """
    if not steps:
        return
    with torch.no_grad():
        rows = layer.split(held)
        for row, step in steps.items():
            heads = rows[row].keys.shape[0]
            context = ScoreContext(index, tokens[row], total_heads=heads)
            rows[row] = run_step(rows[row], step, reduce, context)
        layer.join(rows)


def reducer(settings: Settings, model: Any) -> Reduce:
    """What makes the slots of a row fewer.

    Parameters
    ----------
    settings : Settings
    model : Module or PreTrainedConfig
        Model, attention module or configuration, for its rotary embedding.

    Raises
    ------
    SettingsError
        If the method needs a rotary embedding and this one cannot be used.
    """
    if settings.method in METHODS:
        return Evict(METHODS[settings.method](settings.seed))
    pooling = POOLINGS[settings.pooling]()
    return Merge(pooling, rotation_of(model) if pooling.needs_rotation else None)
