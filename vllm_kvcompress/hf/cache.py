"""A transformers cache that compresses itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from vllm_kvcompress.hf.attention import IMPLEMENTATION, Origin, mark
from vllm_kvcompress.hf.compaction import Lengths, compact, reducer, visible_columns
from vllm_kvcompress.hf.layer import SlotLayer
from vllm_kvcompress.hf.plan import Plan, check_method
from vllm_kvcompress.hf.slots import Reduce
from vllm_kvcompress.settings import Settings, parse_settings


class CompressedCache(Cache):
    """Keys and values of a model, compressed as settings say.

    Pass it to ``model(...)`` or ``model.generate(...)`` as ``past_key_values``. A compaction
    runs right after a layer's attention, so that the call that feeds the prompt is exact.
    One that falls due inside a forward call of several tokens runs at the end of that call,
    over everything cached. Padding is never kept: a padded row holds what it would alone.

    Parameters
    ----------
    settings : Settings or mapping
        As for vLLM, with blocks of one token. Without ``bands`` every layer has its own
        budget on the pyramid.
    config : PreTrainedConfig or None
        The model's, if known already: what does not fit the model is then refused here,
        else in the first forward call.
    prompt_tokens : int or None
        Length of the prompt, padding included, if several forward calls feed it
        (``prefill_chunk_size``); by default the first call feeds it.

    Raises
    ------
    SettingsError
        For settings that cannot be used.
    ValueError
        For a negative ``prompt_tokens``.
    """

    def __init__(
        self,
        settings: Settings | Mapping[str, Any],
        *,
        config: Any = None,
        prompt_tokens: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.settings = parse_settings(
            dict(settings) if isinstance(settings, Mapping) else settings
        )
        check_method(self.settings)
        if prompt_tokens is not None and prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} is not allowed: it must be positive.")
        self.prompt_tokens = prompt_tokens
        self.weighted = self.settings.merge_weighting == "count"
        self._plan: Plan | None = None
        self._reduce: Reduce | None = None
        self._prompt: int | None = None
        self._lengths: Lengths | None = None
        if config is not None and self.settings.enabled:
            self._prepare(config)

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values and what is known of each slot."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that the keys and values would take uncompressed."""
        return sum(layer.full_nbytes for layer in self.layers)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of a forward call; return all that a layer holds.

        Raises
        ------
        NotImplementedError
            If the model's attention does not come by here.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer())
        layer = self.layers[layer_idx]
        if layer.awaiting and (self.settings.enabled or layer.columns is not None):
            raise NotImplementedError(
                "The model's attention cannot use a compressed cache: load it with "
                f"attn_implementation={IMPLEMENTATION!r}. Others (eager, flash, flex) and models "
                "with an attention of their own are not supported."
            )
        layer.awaiting = True
        keys, values = layer.update(key_states, value_states)
        return mark(keys, Origin(self, layer_idx)), values

    def before_attention(
        self, layer: int, module: Any, mask: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The mask over the slots of a layer; see :meth:`SlotLayer.mask`.

        Raises
        ------
        ValueError
            For a mask that does not cover all tokens seen.
        """
        slots = self.layers[layer]
        if mask is not None and mask.shape[-1] != slots.length:
            raise ValueError(
                f"The attention mask covers {mask.shape[-1]} tokens, but the cache has seen "
                f"{slots.length}: a mask must cover removed tokens too."
            )
        return slots.mask(mask, dtype, self.weighted)

    def after_attention(self, layer: int, module: Any, mask: torch.Tensor | None) -> None:
        """Compact a layer if it is due."""
        slots = self.layers[layer]
        slots.awaiting = False
        if not self.settings.enabled:
            return
        if self._plan is None:
            self._prepare(module.config, module)
        plan, reduce = self._plan, self._reduce
        assert plan is not None and reduce is not None
        if plan.limits[layer] is None:
            return
        lengths = self._lengths_now(slots, mask)
        due = [row for row in range(len(lengths.now)) if plan.passes_grid(*lengths.row(row))]
        if not due:
            return
        held = slots.held(lengths.visible)
        sizes = held.sum(-1).tolist()
        steps = {}
        for row in due:
            base = lengths.prompt[row] if self.settings.phase == "decode" else 0
            step = plan.step(layer, base, sizes[row], lengths.now[row])
            if step is not None:
                steps[row] = step
        compact(slots, layer, held, steps, lengths.now, reduce)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens, given as a negative number or 0.

        Raises
        ------
        ValueError
            For a positive number, or for tokens that a compaction has already seen.
        """
        for layer in self.layers:  # all or none
            layer.check_crop(tokens_to_remove)
        self._lengths = None
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, for a new prompt."""
        self._lengths = self._prompt = None
        self.layers.clear()

    def _prepare(self, config: Any, module: Any = None) -> None:
        self._plan = Plan.of_config(self.settings, config)
        self._reduce = reducer(self.settings, config if module is None else module)

    def _lengths_now(self, layer: SlotLayer, mask: torch.Tensor | None) -> Lengths:
        """Worked out once per forward call: with padding it takes numbers off the device."""
        if self._prompt is None:
            self._prompt = self.prompt_tokens or layer.length
        if self._lengths is None or self._lengths.length != layer.length:
            visible = visible_columns(mask)
            rows = layer.keys.shape[0]
            self._lengths = Lengths.of(layer.length, layer.fed, self._prompt, rows, visible)
        return self._lengths
