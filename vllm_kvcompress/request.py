"""Settings of one request: what it may ask for, beside the server's settings.

They arrive as ``kvcompress_*`` keys of ``SamplingParams.extra_args``, which the OpenAI API fills
from ``vllm_xargs``. The API process refuses what cannot be used
(:mod:`vllm_kvcompress.input_check`); the engine core reads the same keys again
(:mod:`vllm_kvcompress.scheduler.requests`). Neither vLLM nor the model is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_kvcompress.methods import MERGING
from vllm_kvcompress.settings import MOST_TOKENS, Settings, SettingsError, parse_settings

PREFIX = "kvcompress_"
"""Start of the keys that are ours."""

REPORT_KEY = f"{PREFIX}report"
"""Key that puts a request's account into its answer."""


class RequestSettings(BaseModel):
    """What a request asks for; ``None`` leaves it to the server.

    Attributes
    ----------
    enabled : bool
        Whether the request is compressed at all. If not, the other settings are checked and
        have no effect.
    method : str or None
    budget : int or None
        Replaces the server's ``keep_ratio`` too.
    keep_ratio : float or None
        Replaces the server's ``budget`` too.
    prune_after : int or None
    context_tokens : int or None
        First tokens of the prompt that are compressed before the others are computed.
    report : bool
        Whether the answer carries the request's account; changes nothing of what is kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = Field(True, description="0 or 1")
    method: str | None = Field(None, description="a method's name")
    budget: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="a whole number of tokens from 1"
    )
    keep_ratio: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="a number above 0 and up to 1"
    )
    prune_after: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description="a whole number of tokens from 0"
    )
    context_tokens: int | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="a whole number of tokens from 1 to the length of the prompt",
    )
    report: bool = Field(False, description="0 or 1")

    @field_validator("enabled", "report", mode="before")
    @classmethod
    def _zero_or_one(cls, value: Any) -> Any:
        # JSON has booleans, but vllm_xargs has not: vLLM hands them on as numbers.
        return bool(value) if type(value) is int and value in (0, 1) else value


class Asked(NamedTuple):
    """What a request gets.

    Attributes
    ----------
    settings : Settings
        The server's, with what the request asks for in their place.
    context_tokens : int or None
    """

    settings: Settings
    context_tokens: int | None = None


def own_keys(extra_args: Any) -> dict[str, Any]:
    """The keys in a request's ``extra_args`` that are ours, most often none."""
    if not isinstance(extra_args, Mapping):
        return {}
    return {
        key: value
        for key, value in extra_args.items()
        if isinstance(key, str) and key.startswith(PREFIX)
    }


def asked(server: Settings, extra_args: Any) -> Asked:
    """Work out what a request gets.

    Parameters
    ----------
    server : Settings
        The server's.
    extra_args : Any
        ``SamplingParams.extra_args`` of the request; keys of others are ignored.

    Returns
    -------
    Asked

    Raises
    ------
    SettingsError
        One sentence naming the key, its value and what is allowed.
    """
    keys = own_keys(extra_args)
    if not keys:
        return Asked(server)
    request = _read(keys)
    if request.method is not None and request.method not in server.methods:
        raise refusal(
            "method",
            request.method,
            f"allowed are {', '.join(server.methods)}; {PREFIX}enabled=0 asks for no compression",
        )
    if request.budget is not None and request.keep_ratio is not None:
        raise SettingsError(
            f"{PREFIX}budget={request.budget} and {PREFIX}keep_ratio={request.keep_ratio} are "
            "both set; a request may set one of them."
        )
    most = server.largest_budget
    if request.budget is not None and most is not None and request.budget > most:
        raise refusal("budget", request.budget, f"the server's max_budget allows up to {most}")
    if server.phase == "decode":
        for name in ("keep_ratio", "context_tokens"):
            if (value := getattr(request, name)) is not None:
                raise refusal(
                    name,
                    value,
                    "this server compresses generated tokens only (phase=decode); allowed are "
                    f"{PREFIX}method, {PREFIX}budget and {PREFIX}prune_after",
                )
    return Asked(
        _with_changes(server, request), request.context_tokens if request.enabled else None
    )


def refusal(name: str, value: Any, reason: str) -> SettingsError:
    """The error for one setting of a request."""
    return SettingsError(f"{PREFIX}{name}={_shown(value)} is not allowed: {reason}.")


def _read(keys: dict[str, Any]) -> RequestSettings:
    raw = {key.removeprefix(PREFIX): value for key, value in keys.items()}
    for name, value in raw.items():
        if name not in RequestSettings.model_fields:
            allowed = ", ".join(PREFIX + known for known in RequestSettings.model_fields)
            raise SettingsError(
                f"unknown key {_shown(PREFIX + name)} (value {_shown(value)}); allowed are "
                f"{allowed}."
            )
    try:
        return RequestSettings.model_validate(raw)
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_context=False)[0]["loc"][0])
    meant = RequestSettings.model_fields[name].description
    raise refusal(name, raw[name], f"it must be {meant}")


def _with_changes(server: Settings, request: RequestSettings) -> Settings:
    changed = server.model_dump(exclude_unset=True)
    given = request.model_dump(include={"method", "prune_after"}, exclude_none=True)
    changed |= given if request.enabled else {"method": "none"}
    if request.budget is not None or request.keep_ratio is not None:
        changed |= {"budget": request.budget, "keep_ratio": request.keep_ratio}
    if changed.get("method") not in MERGING:
        changed.pop("pooling", None)
        changed.pop("merge_weighting", None)
    return parse_settings(changed)


def _shown(value: Any) -> str:
    """A value for a sentence: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # Numbers of more than 4,300 digits, for one.
        return f"(a value of type {type(value).__name__})"
    return text if len(text) <= 80 else f"{text[:76]}…"
