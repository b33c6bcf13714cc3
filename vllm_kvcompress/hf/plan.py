"""When a row compacts and how much stays: the paged caches' rules, with blocks of one slot."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from vllm_kvcompress.bands import plan_bands, pyramid_share
from vllm_kvcompress.hf.slots import Step
from vllm_kvcompress.limits import Limits
from vllm_kvcompress.settings import Settings, SettingsError

UNSUPPORTED = ("knorm+merge",)
"""Methods of the paged caches that these caches do not have."""


@dataclass(frozen=True)
class Plan:
    """What a cache does by itself.

    Attributes
    ----------
    settings : Settings
    limits : tuple of (Limits or None)
        By layer; ``None`` for a layer that keeps every token.
    """

    settings: Settings
    limits: tuple[Limits | None, ...]

    @classmethod
    def of(cls, settings: Settings, num_layers: int, longest: int) -> Plan:
        """Plan for a model.

        Without ``bands`` every layer has its own budget on the pyramid: layers share
        nothing here, so that bands, which save block tables, would save nothing.

        Parameters
        ----------
        settings : Settings
        num_layers : int
            Layers of the model.
        longest : int
            Longest row in tokens; merging needs room for it. 0 if not known.

        Raises
        ------
        SettingsError
            For a layer that does not exist, or limits that do not fit.
        """
        check_method(settings)
        if settings.bands is None:
            skipped = sum(layer < num_layers for layer in settings.skip_layers)
            bands = max(1, num_layers - skipped)
            settings = settings.model_copy(update={"bands": bands})
        limits: list[Limits | None] = [None] * num_layers
        for band in plan_bands(settings, num_layers, 1, longest=longest):
            for layer in band.layers:
                limits[layer] = band.limits
        return cls(settings, tuple(limits))

    @classmethod
    def of_config(cls, settings: Settings, config: Any) -> Plan:
        """Plan for a model with this configuration of transformers; refuse what is not exact.

        Raises
        ------
        SettingsError
            See :meth:`of`; also for encoder-decoder models and shared caches.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise SettingsError("kvcompress: encoder-decoder models are not supported.")
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_kv_shared_layers", 0):
            raise SettingsError("kvcompress: models whose layers share caches are not supported.")
        longest = getattr(text, "max_position_embeddings", None) or 0
        return cls.of(settings, text.num_hidden_layers, longest)

    def passes_grid(self, before: int, now: int, prompt: int) -> bool:
        """Whether a grid point lies in ``(before, now]``.

        Parameters
        ----------
        before, now : int
            Tokens of the row before and after a forward call.
        prompt : int
            Tokens of its prompt.
        """
        interval, phase = self.settings.interval, self.settings.phase
        if now >= prompt:
            if before < prompt:  # in the decode phase there is nothing behind the prompt yet
                return True
            return (now - prompt) // interval > max(0, before - prompt) // interval
        return phase == "during_prefill" and now // interval > before // interval

    def step(self, layer: int, base: int, held: int, tokens: int) -> Step | None:
        """The step of a row at a grid point, or ``None`` if it is within its limits.

        Parameters
        ----------
        layer : int
        base : int
            Slots of the prompt, where the phase leaves it alone.
        held : int
            Slots the row holds, those of the base included.
        tokens : int
            Tokens of the row so far, removed ones included.
        """
        limits = self.limits[layer]
        if limits is None or tokens < self.settings.prune_after:
            return None
        old, kept = limits.blocks_kept(held - base, tokens)
        return Step(base, old, kept, limits.sinks) if kept < old else None


def recent_window(
    window: int,
    beta: float,
    sinks: int,
    recent: int | None,
    layers: tuple[int, int],
    longest: int,
) -> int:
    """The recent window beside merged slots: by default half of the room for both.

    Parameters
    ----------
    window, beta : int, float
        ``L0`` and steepness of the pyramid.
    sinks : int
    recent : int or None
        What is asked for.
    layers : tuple of int
        Number of layers, and the last one that is compressed.
    longest : int
        Longest row in tokens.

    Raises
    ------
    SettingsError
        If the smallest layer has no room; in the words of the merging functions.
    """
    if window < 1 or not 0 < beta < inf:
        raise SettingsError(
            f"initial_local_window={window} and steepness_coefficient={beta} are not allowed: "
            "both must be positive."
        )
    count, last = layers
    smallest = max(1, ceil(window * pyramid_share(beta, [last], count)))
    # Merging can leave one slot per binary digit of the tokens it pools.
    room = smallest - sinks - longest.bit_length() - (recent or 0)
    if room < 0:
        raise SettingsError(
            f"initial_local_window={window} is too small: layer {last} gets {smallest} slots, but "
            f"sink_tokens={sinks}, recent_tokens={recent or 0} and {longest.bit_length()} merged "
            f"slots, which rows of {longest} tokens may need, are {smallest - room}."
        )
    return room // 2 if recent is None else recent


def check_method(settings: Settings) -> None:
    """Refuse methods that only the paged caches have.

    Raises
    ------
    SettingsError
    """
    if settings.places_heads:
        raise SettingsError(
            "kvcompress: skip_heads and boost_heads are not supported in transformers caches; use "
            "them in vLLM, or skip_layers here."
        )
    if settings.method in UNSUPPORTED:
        raise SettingsError(
            f"kvcompress: method={settings.method} is not supported in transformers caches; "
            "use it in vLLM, or use merge or an eviction method here."
        )
