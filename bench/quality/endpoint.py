"""An OpenAI-compatible completions endpoint: what the evaluation asks of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from vllm_kvcompress.shares import ALIKE, Shares

TIMEOUT_SECONDS = 600.0
RETRIES = 3


class EndpointError(RuntimeError):
    """The server cannot be asked this; the message says why."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself.

    Attributes
    ----------
    model : str
        Name under which requests ask for it.
    root : str
        Where the server loaded it from: a directory or a name of a hub.
    max_tokens : int or None
        Longest request.
    methods : tuple of str
        Compression methods that a request may ask for; empty for a server without ours.
    settings : dict
        The server's compression settings.
    shares : Shares
        Of its layers that keep more than the others.
    """

    model: str
    root: str
    max_tokens: int | None
    methods: tuple[str, ...]
    settings: Mapping[str, Any]
    shares: Shares = ALIKE

    @property
    def label(self) -> str:
        """The model's name without directories, as results carry it."""
        return self.model.rstrip("/").split("/")[-1]


@dataclass(frozen=True)
class Answer:
    """Generated text and, if the server accounts for it, the slots that its prompt lost.

    Attributes
    ----------
    text : str
    removed_tokens : float or None
        Slots removed or pooled away, mean over the layers; None without an account.
    """

    text: str
    removed_tokens: float | None


@dataclass(frozen=True)
class TokenScores:
    """How well the model predicted given tokens.

    Attributes
    ----------
    logprobs : list of float
        Natural logarithms of the probabilities of the prompt's tokens, without the first.
    ranks : list of int
        Rank of each among all tokens; 1 is what greedy decoding would have chosen.
    removed_tokens : float or None
        As in `Answer`.
    """

    logprobs: list[float]
    ranks: list[int]
    removed_tokens: float | None


class Endpoint:
    """Client of one server.

    Parameters
    ----------
    url : str
        With or without ``/v1``.
    api_key : str or None
        By default ``VLLM_API_KEY`` or ``OPENAI_API_KEY`` of the environment.
    transport : httpx.AsyncBaseTransport or None
        For tests.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        key = api_key or os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=TIMEOUT_SECONDS,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            transport=transport,
            # A proxy of the environment may not know what 127.0.0.1 is here.
            trust_env=httpx.URL(self.url).host not in ("127.0.0.1", "localhost", "::1"),
        )
        self.model = ""

    async def __aenter__(self) -> Endpoint:
        """Itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def info(self, model: str | None = None) -> ServerInfo:
        """Ask for the model and, if it is one of our servers, for its settings.

        Parameters
        ----------
        model : str or None
            Name of one of the server's models; by default its first.

        Returns
        -------
        ServerInfo
        """
        listed = (await self._get("/v1/models")).get("data", [])
        found = [entry for entry in listed if model in (None, entry["id"])]
        if not found:
            names = ", ".join(entry["id"] for entry in listed)
            raise EndpointError(f"{self.url} does not serve {model}; it serves {names}.")
        self.model = found[0]["id"]
        try:
            ours = await self._get("/v1/kvcompress/config")
        except EndpointError:
            ours = {}
        return ServerInfo(
            model=self.model,
            root=str(found[0].get("root") or self.model),
            max_tokens=found[0].get("max_model_len"),
            methods=tuple(ours.get("methods", ())),
            settings=ours.get("settings", {}),
            shares=_shares(ours),
        )

    async def generate(
        self, prompt: Sequence[int], max_tokens: int, xargs: Mapping[str, Any] | None = None
    ) -> Answer:
        """Greedy continuation of a prompt.

        Parameters
        ----------
        prompt : sequence of int
        max_tokens : int
        xargs : mapping or None
            ``vllm_xargs`` of the request.

        Returns
        -------
        Answer
        """
        body = await self._complete(prompt, max_tokens, xargs)
        return Answer(body["choices"][0]["text"], _removed(body))

    async def token_scores(
        self, prompt: Sequence[int], xargs: Mapping[str, Any] | None = None
    ) -> TokenScores:
        """Log-probabilities of a prompt's own tokens.

        vLLM computes such a prompt whole, without the prefix cache.

        Parameters
        ----------
        prompt : sequence of int
        xargs : mapping or None

        Returns
        -------
        TokenScores
            One entry for each token but the first.
        """
        body = await self._complete(prompt, 1, xargs, prompt_logprobs=0)
        found = body["choices"][0].get("prompt_logprobs")
        if not found or len(found) != len(prompt):
            raise EndpointError(f"{self.url} returns no prompt_logprobs, which lm needs.")
        entries = [entry[str(token)] for entry, token in zip(found[1:], prompt[1:], strict=True)]
        return TokenScores(
            [entry["logprob"] for entry in entries],
            [entry["rank"] for entry in entries],
            _removed(body),
        )

    async def _complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        xargs: Mapping[str, Any] | None,
        **more: Any,
    ) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 0,
            **more,
        }
        if xargs:
            body["vllm_xargs"] = dict(xargs)
        return await self._call("POST", "/v1/completions", body)

    async def _get(self, path: str) -> dict[str, Any]:
        return await self._call("GET", path)

    async def _call(self, verb: str, path: str, body: Any = None) -> dict[str, Any]:
        for attempt in range(RETRIES):
            try:
                answer = await self._http.request(verb, path, json=body)
                break
            except httpx.TransportError as error:
                if attempt == RETRIES - 1:
                    raise EndpointError(f"{self.url} does not answer ({error!r}).") from error
                await asyncio.sleep(2**attempt)
        if answer.status_code != 200:
            raise EndpointError(f"{self.url}{path} answered {answer.status_code}: {answer.text}")
        found: dict[str, Any] = answer.json()
        return found


def _shares(ours: Mapping[str, Any]) -> Shares:
    """Shares of layers that keep more than the others, by a server's configuration."""
    sizes = {band["band"]: len(band["layers"]) for band in ours.get("bands", ())}
    if not sizes:
        return ALIKE
    layers, settings = sum(sizes.values()), ours["settings"]
    whole = sizes.get(-1, 0) / layers
    if not settings.get("boost_heads"):
        return Shares(whole)
    return Shares(whole, sizes[max(sizes)] / layers, settings["boost"])


def _removed(body: Mapping[str, Any]) -> float | None:
    """Slots that a request lost, mean over its layers, from the account in its answer."""
    account = (body.get("kv_transfer_params") or {}).get("kvcompress")
    if not account or not account["bands"]:
        return None
    bands = account["bands"]
    lost = sum((band["tokens_removed"] + band["tokens_merged"]) * band["layers"] for band in bands)
    return float(lost / sum(band["layers"] for band in bands))
