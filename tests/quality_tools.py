"""What the tests of bench.quality share: a tokenizer without a model, texts, a fake server."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

MODEL = "fake/model-1"
SETTINGS = {"method": "knorm", "phase": "after_prefill"}


class WordTokenizer:
    """One id per word, space run, digit or mark, the same for the same text; 0 begins a prompt."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        parts = re.findall(r" ?[A-Za-z]+|\d|\s|[^\w\s]", text)
        return [0] * add_special_tokens + [
            self.ids.setdefault(part, len(self.ids) + 1) for part in parts
        ]

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        (message,) = conversation
        return f"[user] {message['content']} [end] [assistant] "

    def decode(self, ids: list[int]) -> str:
        names = {number: part for part, number in self.ids.items()}
        return "".join(names[one] for one in ids if one)


def write_texts(directory: Path) -> list[Path]:
    """Two texts of sentences, long enough for the haystacks of the tests."""
    words = random.Random(0)
    nouns = ("river", "teacher", "wagon", "meadow", "engine", "letter", "forest", "window")
    verbs = ("carries", "finds", "paints", "follows", "remembers", "hides", "opens")
    files = []
    for number in range(2):
        paragraphs = []
        for _ in range(120):
            sentences = [
                f"The {words.choice(nouns)} {words.choice(verbs)} a {words.choice(nouns)} "
                f"near the {words.choice(nouns)} of text {'ab'[number]}."
                for _ in range(6)
            ]
            paragraphs.append("\n".join(sentences))
        path = directory / f"text{number}.txt"
        path.write_text("\n\n".join(paragraphs))
        files.append(path)
    return files


class FakeServer:
    """An endpoint that answers with ``reply`` and remembers what it was asked.

    Parameters
    ----------
    reply : callable
        Prompt ids and ``vllm_xargs`` to text.
    methods : tuple of str
        Those of the server's plugin; empty for a server without it.
    fail_after : int or None
        Completions after which it answers with an error.
    """

    def __init__(
        self,
        reply: Callable[[list[int], dict[str, Any]], str],
        methods: tuple[str, ...] = ("knorm", "keydiff", "streaming", "random"),
        fail_after: int | None = None,
        settings: dict[str, Any] | None = None,
        bands: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.reply = reply
        self.methods = methods
        self.fail_after = fail_after
        self.settings = settings or SETTINGS
        self.bands = bands
        self.asked: list[dict[str, Any]] = []
        self.transport = httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            models = [{"id": MODEL, "root": "nowhere", "max_model_len": 4096}]
            return httpx.Response(200, json={"data": models})
        if request.url.path == "/v1/kvcompress/config":
            if not self.methods:
                return httpx.Response(404, json={})
            config = {"methods": list(self.methods), "settings": self.settings}
            return httpx.Response(200, json=config | {"bands": list(self.bands)})
        body = json.loads(request.content)
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            return httpx.Response(500, text="out of order")
        self.asked.append(body)
        xargs = body.get("vllm_xargs", {})
        choice: dict[str, Any] = {"text": self.reply(body["prompt"], xargs)}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": -1.0 - 0.5 * (index % 2), "rank": 1 + index % 2}}
                for index, token in enumerate(body["prompt"][1:])
            ]
        found: dict[str, Any] = {"choices": [choice]}
        if xargs.get("kvcompress_report"):
            bands = [
                {"layers": 1, "tokens_removed": 64, "tokens_merged": 0},
                {"layers": 3, "tokens_removed": 0, "tokens_merged": 32},
            ]
            found["kv_transfer_params"] = {"kvcompress": {"bands": bands}}
        return httpx.Response(200, json=found)
