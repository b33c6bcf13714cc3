"""Server settings: one validated model, read by every process.

They arrive as ``additional_config={"kvcompress": {...}}`` (``LLM``, ``vllm serve``,
``vllm bench``) or as the ``--kvcompress-*`` options of ``serve.py``, which are made from
the fields below. Checks that need the model or the block size are in
:mod:`vllm_kvcompress.bands`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_kvcompress.methods import MERGING, METHODS

CONFIG_KEY = "kvcompress"
"""Key of the settings inside vLLM's ``additional_config``."""

DEFAULT_BUDGET = 1024

MOST_TOKENS = 1_000_000_000
"""Largest budget that can be asked for; far beyond any context."""

Heads = tuple[tuple[int, int], ...]
"""KV heads, as pairs of layer and head."""

Phase = Literal["after_prefill", "during_prefill", "decode"]


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""


class Settings(BaseModel):
    """What to compress, how far and when.

    Token counts are per request and per layer; every KV head keeps the same number of
    tokens, each its own choice of them, but for those in ``skip_heads``, which keep all, and in
    ``boost_heads``, which keep ``boost`` times as many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: str = Field(
        "kvdiff",
        description="Method: kvdiff, keydiff, knorm, streaming or random evict tokens, merge pools "
        "old ones, knorm+merge pools those that knorm would evict; none is stock vLLM.",
    )
    budget: int | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="Tokens a request may keep per layer in band 0 "
        f"(default {DEFAULT_BUDGET} unless keep_ratio is set).",
    )
    max_budget: int | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="Largest budget that a request may ask for (default: any, but the server's "
        "own with phase=during_prefill, where the pool is sized by it).",
    )
    keep_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a request's tokens to keep instead of a fixed budget, in (0, 1].",
    )
    prune_after: int = Field(
        0, ge=0, description="Requests with fewer tokens than this are left alone."
    )
    sink_tokens: int = Field(
        4, ge=0, description="First tokens of a request that are never removed."
    )
    recent_tokens: int = Field(
        64, ge=0, description="Latest tokens of a request that are never removed."
    )
    recent_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the tokens kept that are the latest ones, where these are more than "
        "recent_tokens and leave room for the sinks.",
    )
    skip_layers: tuple[int, ...] = Field(
        (), description="Layers that keep every token, by index from 0."
    )
    skip_heads: Heads = Field(
        (),
        description="KV heads that keep every token, as LAYER:HEAD,LAYER:HEAD,...; they change "
        "places with other heads, so that pages of their own hold them.",
    )
    boost_heads: Heads = Field(
        (),
        description="KV heads that keep boost times as many tokens as the others, named and placed "
        "like skip_heads.",
    )
    boost: float = Field(
        4.0,
        ge=1,
        allow_inf_nan=False,
        description="Budget of boost_heads, as a multiple of that of the others.",
    )
    pyramid_beta: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Steepness of the per-layer pyramid: layer k of m has "
        "budget * (1 + k/m * (1/beta - 1)); 1 is flat.",
    )
    bands: int | None = Field(
        None,
        ge=1,
        description="Bands of layers with a budget and block table of their own "
        "(default: 1 when flat, else the choice nearest to 6 that wastes no memory).",
    )
    interval: int = Field(128, ge=1, description="Tokens between two compactions of a request.")
    phase: Phase = Field(
        "after_prefill",
        description="When to compress: after_prefill (prompt exact, then compressed), "
        "during_prefill (also every interval prompt tokens; bounds the peak), "
        "decode (generated tokens only).",
    )
    pooling: Literal["mean", "max", "best"] = Field(
        "mean",
        description="How merging methods pool two slots: mean (keys turned to a common position), "
        "max (elementwise) or best (the lower-norm key with its value).",
    )
    merge_weighting: Literal["count", "none"] = Field(
        "count",
        description="Weight of a pooled slot in attention: count (as often as it stands for "
        "tokens; frees memory, not attention time) or none (once; frees both).",
    )
    finished_requests: int = Field(
        1000,
        ge=0,
        le=100_000,
        description="Finished requests whose memory accounts each engine keeps for its API.",
    )
    seed: int = Field(0, ge=0, le=1_000_000, description="Seed of the random method.")

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value != "none" and value not in METHODS and value not in MERGING:
            raise ValueError(f"allowed are {', '.join([*METHODS, *MERGING, 'none'])}")
        return value

    @field_validator("skip_layers", mode="before")
    @classmethod
    def _layers_as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("skip_layers")
    @classmethod
    def _layers_sorted_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in value):
            raise ValueError("layer indices count from 0 and cannot be negative")
        if len(set(value)) != len(value):
            raise ValueError("a layer is named twice")
        return tuple(sorted(value))

    @field_validator("skip_heads", "boost_heads", mode="before")
    @classmethod
    def _heads_as_pairs(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        return tuple(map(_head, value)) if isinstance(value, list | tuple) else value

    @field_validator("skip_heads", "boost_heads")
    @classmethod
    def _heads_sorted_once(cls, value: Heads) -> Heads:
        if any(layer < 0 or head < 0 for layer, head in value):
            raise ValueError("layers and heads count from 0 and cannot be negative")
        if len(set(value)) != len(value):
            raise ValueError("a head is named twice")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _not_contradictory(self) -> Settings:
        if self.budget is not None and self.keep_ratio is not None:
            raise ValueError(
                f"budget ({self.budget}) and keep_ratio ({self.keep_ratio}) are both set; "
                "set one of them"
            )
        if self.phase == "decode" and self.keep_ratio is not None:
            raise ValueError(
                f"keep_ratio ({self.keep_ratio}) is a share of all tokens, the prompt's too, which "
                "phase=decode leaves alone; set budget instead"
            )
        if both := sorted(set(self.skip_heads) & set(self.boost_heads)):
            layer, head = both[0]
            raise ValueError(f"{layer}:{head} is in both skip_heads and boost_heads")
        if self.boost_heads and self.pyramid_beta != 1:
            raise ValueError(
                f"boost_heads and pyramid_beta ({self.pyramid_beta}) are both set, and both give "
                "layers budgets of their own; set one of them"
            )
        if self.boost_heads and self.bands is not None:
            raise ValueError(
                f"boost_heads and bands ({self.bands}) are both set; boosted heads are a band of "
                "their own, and the others are split as wastes no memory; set one of them"
            )
        if "boost" in self.model_fields_set and not self.boost_heads:
            raise ValueError(f"boost ({self.boost}) is set, but no boost_heads")
        own = self.token_budget
        if self.max_budget is not None and own is not None and self.max_budget < own:
            raise ValueError(
                f"max_budget ({self.max_budget}) is less than budget ({own}); requests that ask "
                "for nothing would get more than a request may ask for"
            )
        if self.method not in MERGING:
            for name in ("pooling", "merge_weighting"):
                if name in self.model_fields_set:
                    raise ValueError(
                        f"{name} ({getattr(self, name)}) is set, but method={self.method} merges "
                        f"nothing; use it with method={' or '.join(MERGING)}"
                    )
        return self

    @property
    def enabled(self) -> bool:
        """Whether anything is to be compressed."""
        return self.method != "none"

    @property
    def places_heads(self) -> bool:
        """Whether KV heads change places."""
        return bool(self.skip_heads or self.boost_heads)

    @property
    def token_budget(self) -> int | None:
        """Budget of band 0 in tokens, ``None`` when ``keep_ratio`` is used."""
        if self.keep_ratio is not None:
            return None
        return DEFAULT_BUDGET if self.budget is None else self.budget

    @property
    def largest_budget(self) -> int | None:
        """Largest budget that a request may ask for, ``None`` if any."""
        if self.max_budget is None and self.phase == "during_prefill":
            return self.token_budget
        return self.max_budget

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that a request may ask for: what merges needs more than its name."""
        return (*METHODS, *([self.method] if self.method in MERGING else []))


def _head(value: Any) -> Any:
    """``"7:2"`` as ``(7, 2)``; what is no text is left to the model to refuse."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    layer, colon, head = value.strip().partition(":")
    if not (colon and layer.isdecimal() and head.isdecimal()):
        raise ValueError(f"a head is named LAYER:HEAD, as 7:2, not {value!r}")
    return int(layer), int(head)


def parse_settings(raw: Any) -> Settings:
    """Validate the value of ``additional_config["kvcompress"]``.

    Parameters
    ----------
    raw : Any
        What the user passed; a mapping of setting names to values.

    Returns
    -------
    Settings

    Raises
    ------
    SettingsError
        One sentence naming the key, the value and what is allowed.
    """
    if isinstance(raw, Settings):
        return raw
    if not isinstance(raw, dict):
        raise SettingsError(
            f"additional_config['{CONFIG_KEY}'] must be an object of settings, "
            f"not {type(raw).__name__}."
        )
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(_one_sentence(error)) from None


def _one_sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return (
            f"kvcompress: unknown setting {key!r} (value {first['input']!r}); "
            f"allowed are {', '.join(Settings.model_fields)}."
        )
    if not key:
        return f"kvcompress: {message}."
    return f"kvcompress: {key}={first['input']!r} is not allowed: {message}."
