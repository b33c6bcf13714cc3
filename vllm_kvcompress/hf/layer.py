"""One layer's cached slots, for a batch of rows that may hold different numbers of them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from vllm_kvcompress.hf.slots import Slots

FILLER = -1
"""Column of a slot that stands for nothing: a row may hold fewer slots than the longest."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of the slots that are left, and which tokens they stand for.

    To transformers a layer is as long as the row is, removed tokens included: positions and
    the attention mask that a model makes are those of the full sequence. What the mask says
    of each slot is looked up by :meth:`mask`, layer by layer.

    Attributes
    ----------
    keys, values : torch.Tensor
        ``[batch, kv_heads, slots, head_dim]``, oldest first; rows end together.
    columns : torch.Tensor or None
        ``[batch, kv_heads, head]``, int32: columns of the first ``head`` slots, ``FILLER``
        where a row holds fewer. Later slots are the latest columns. ``None`` until the
        first compaction, when slot and column are the same.
    counts : torch.Tensor or None
        ``[batch, head]``, int32: tokens each slot stands for; ``None`` if nothing was merged.
    length : int
        Columns seen: tokens of a row, padding and removed tokens included.
    fed : int
        Columns that the last call to :meth:`update` added.
    compacted_at : int
        ``length`` at the last compaction.
    awaiting : bool
        Whether keys were handed to the model whose attention has not come by yet.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.keys: Any = None  # Tensors from the first update on.
        self.values: Any = None
        self.is_initialized = False
        self.columns: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self.length = self.fed = self.compacted_at = 0
        self.has_filler = self.awaiting = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start empty, in the shape, type and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states ``[batch, kv_heads, tokens, head_dim]``; return all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        self.fed = key_states.shape[-2]
        self.length += self.fed
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of a row so far, as positions count them."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: those of the full sequence."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values and what is known of each slot."""
        held = (self.keys, self.values, self.columns, self.counts)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def full_nbytes(self) -> int:
        """Bytes that keys and values of all columns would take."""
        if not self.is_initialized or not self.keys.shape[-2]:
            return 0
        return (self.keys.nbytes + self.values.nbytes) // self.keys.shape[-2] * self.length

    def slot_columns(self) -> torch.Tensor:
        """Columns of all slots, ``[batch, kv_heads, slots]``, int64; ``FILLER`` for none."""
        batch, heads, slots, _ = self.keys.shape
        head = 0 if self.columns is None else self.columns.shape[-1]
        start = self.length - (slots - head)
        tail = torch.arange(start, self.length, device=self.keys.device)
        tail = tail.expand(batch, heads, -1)
        return tail if self.columns is None else torch.cat([self.columns.long(), tail], dim=-1)

    def slot_counts(self) -> torch.Tensor:
        """Tokens that each slot stands for, ``[batch, slots]``, int64."""
        batch, _, slots, _ = self.keys.shape
        ones = torch.ones(batch, slots, dtype=torch.int64, device=self.keys.device)
        if self.counts is not None:
            ones[:, : self.counts.shape[-1]] = self.counts
        return ones

    def mask(
        self, mask: torch.Tensor | None, dtype: torch.dtype, weighted: bool
    ) -> torch.Tensor | None:
        """The attention mask over the slots held.

        Parameters
        ----------
        mask : torch.Tensor or None
            ``[batch or 1, 1, queries, length]`` over all columns: boolean, true where a query
            sees, or added to the logits; ``None`` if every query sees every column.
        dtype : torch.dtype
            Of the queries.
        weighted : bool
            Whether a slot that stands for ``n`` tokens counts ``n`` times in the softmax,
            which is ``log(n)`` added to its logit.

        Returns
        -------
        torch.Tensor or None
            ``[batch, kv_heads or 1, queries or 1, slots]``, as ``mask``, or added if weighted.
        """
        if self.columns is None:
            return mask
        seen: torch.Tensor | None = None
        if mask is not None or self.has_filler:
            columns = self.slot_columns()
            held = (columns >= 0)[:, :, None]
            seen = held[:, :1] if mask is None else self._look_up(mask, columns, held)
        if self.counts is None or not weighted:
            return seen
        bias = self.slot_counts().log().to(dtype)[:, None, None]
        if seen is None:
            return bias
        if seen.dtype == torch.bool:
            return torch.where(seen, bias, torch.finfo(dtype).min)
        return (seen + bias).clamp_min(torch.finfo(dtype).min)

    def _look_up(
        self, mask: torch.Tensor, columns: torch.Tensor, held: torch.Tensor
    ) -> torch.Tensor:
        batch, heads, _ = columns.shape
        index = columns.clamp_min(0)[:, :, None].expand(-1, -1, mask.shape[2], -1)
        seen = mask.expand(batch, heads, -1, -1).gather(-1, index)
        if seen.dtype == torch.bool:
            return seen & held
        return seen.masked_fill(~held, torch.finfo(seen.dtype).min)

    def held(self, visible: torch.Tensor | None) -> torch.Tensor:
        """Slots that stand for a token, ``[batch, slots]``, boolean.

        Parameters
        ----------
        visible : torch.Tensor or None
            ``[batch, length]``, boolean: columns that are no padding; ``None`` if all.
        """
        batch, _, slots, _ = self.keys.shape
        head = 0 if self.columns is None else self.columns.shape[-1]
        held = torch.ones(batch, slots, dtype=torch.bool, device=self.keys.device)
        if self.columns is not None:  # no padding is left there, only fillers
            held[:, :head] = self.columns[:, 0] >= 0
        if visible is not None:
            held[:, head:] = visible[:, self.length - (slots - head) :]
        return held

    def split(self, held: torch.Tensor) -> list[Slots]:
        """The slots of each row, without padding and fillers."""
        columns, counts = self.slot_columns(), self.slot_counts()
        rows = []
        for row, chosen in enumerate(held):
            index = chosen.nonzero().squeeze(1)
            rows.append(
                Slots(
                    self.keys[row].index_select(1, index),
                    self.values[row].index_select(1, index),
                    columns[row].index_select(1, index),
                    counts[row].index_select(0, index),
                )
            )
        return rows

    def join(self, rows: list[Slots]) -> None:
        """Hold these slots from now on; shorter rows are filled up at their old end."""
        longest = max(map(len, rows))
        self.has_filler = any(len(row) < longest for row in rows)
        self.keys = torch.stack([_fill(row.keys, longest, 0, dim=1) for row in rows])
        self.values = torch.stack([_fill(row.values, longest, 0, dim=1) for row in rows])
        columns = [_fill(row.columns, longest, FILLER, dim=1) for row in rows]
        self.columns = torch.stack(columns).int()
        counts = torch.stack([_fill(row.counts, longest, 1, dim=0) for row in rows])
        merged = self.counts is not None or bool((counts > 1).any())
        self.counts = counts.int() if merged else None
        self.compacted_at = self.length

    def copy(self) -> SlotLayer:
        """A layer of the same tensors; what either does afterwards leaves the other alone."""
        twin = SlotLayer()
        twin.__dict__.update(self.__dict__)
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens, given as a negative number or 0; see :meth:`check_crop`."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove:
            self.keys = self.keys[:, :, :tokens_to_remove]
            self.values = self.values[:, :, :tokens_to_remove]
            self.length += tokens_to_remove

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove what cannot be removed.

        Raises
        ------
        ValueError
            For a positive number, or for tokens that a compaction has already seen.
        """
        remove = -tokens_to_remove
        if remove < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not supported on a compressed cache: pass the "
                "number of tokens to remove as a negative number."
            )
        if self.length - remove < self.compacted_at:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: the last compaction, at "
                f"{self.compacted_at} of {self.length} tokens, has already chosen with them."
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows of the chosen beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, given by index or by a boolean per row."""
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def _map_rows(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.columns = None if self.columns is None else change(self.columns)
            self.counts = None if self.counts is None else change(self.counts)

    def offload(self) -> NoReturn:
        """Refused: a compressed cache stays where it is."""
        raise NotImplementedError("Offloading a compressed cache is not supported.")


def _fill(states: torch.Tensor, length: int, value: int, dim: int) -> torch.Tensor:
    """Filled up to ``length`` at the start of axis ``dim``."""
    missing = length - states.shape[dim]
    if not missing:
        return states
    shape = list(states.shape)
    shape[dim] = missing
    return torch.cat([states.new_full(shape, value), states], dim=dim)
