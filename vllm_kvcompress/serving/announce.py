"""What the user reads before the server starts."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from typing import Any, NamedTuple

from vllm_kvcompress import bundled
from vllm_kvcompress.serving.command import Command


def announcement(command: Command) -> str:
    """Return the URL, an example request and what compression will do.

    Parameters
    ----------
    command : Command

    Returns
    -------
    str

    Raises
    ------
    SettingsError
        If the settings do not fit the model.
    """
    description = describe_compression(command)
    if command.values.headless:
        return description
    url = _url(command.values)
    name = (command.values.served_model_name or [command.model])[0]
    return (
        f"Serving {name} at {url} (once the log says 'Application startup complete'). Try:\n\n"
        f"{example_request(command, url, name)}\n\n{description}\n"
    )


def announce_accounts(command: Command, problem: str | None) -> str:
    """Return where to see what requests hold.

    Parameters
    ----------
    command : Command
    problem : str or None
        Why it cannot be seen.

    Returns
    -------
    str
    """
    if command.values.headless:
        return ""
    if problem is not None:
        return f"There will be no dashboard and no /v1/kvcompress: {problem}.\n"
    return f"Dashboard: {_url(command.values)}/kvcompress\n"


def describe_compression(command: Command) -> str:
    """Return what will be compressed, as far as the model's configuration is at hand.

    Parameters
    ----------
    command : Command

    Returns
    -------
    str

    Raises
    ------
    SettingsError
        If the settings do not fit the model.
    """
    if not command.settings.enabled:
        return "Compression is off: stock vLLM."
    heads = uniform_layers(command.model)
    if heads is None or (command.settings.places_heads and heads.kv_heads is None):
        return "What is compressed depends on the model's layers; vLLM's start-up log will say."
    from vllm.config import CacheConfig

    from vllm_kvcompress.config import default_block_size
    from vllm_kvcompress.serving.summary import describe

    block_size = default_block_size(command.values.block_size) or CacheConfig.DEFAULT_BLOCK_SIZE
    return describe(command.settings, heads.layers, block_size, heads.kv_heads or 1)


class Heads(NamedTuple):
    """Layers of a model and the KV heads of each, where its configuration says how many."""

    layers: int
    kv_heads: int | None


def uniform_layers(model: str) -> Heads | None:
    """Return the number of layers and KV heads of a model on this machine.

    Parameters
    ----------
    model : str
        Directory or hub name.

    Returns
    -------
    Heads or None
        ``None`` when its configuration is not here or its layers are not all plain full
        attention, so that only the running engine knows which can be compressed.
    """
    from transformers import AutoConfig

    try:
        # Neither the network nor the model's own code: vLLM decides about both.
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
        return None
    count = getattr(text, "num_hidden_layers", None)
    heads = getattr(text, "num_key_value_heads", None)
    return Heads(count, heads) if isinstance(count, int) else None


def example_request(command: Command, url: str, name: str) -> str:
    """Return a ``curl`` command that tries the server.

    Parameters
    ----------
    command : Command
    url : str
        Address of the server.
    name : str
        Name it serves the model under.

    Returns
    -------
    str
    """
    body: dict[str, Any] = {"model": name, "max_tokens": 64}
    if name == bundled.MODEL_NAME:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:  # not every model has a chat template
        path = "completions"
        body["prompt"] = "The capital of France is"
    lines = [f"curl {shlex.quote(f'{url}/v1/{path}')}", "-H 'Content-Type: application/json'"]
    if command.values.uds:
        lines.insert(1, f"--unix-socket {shlex.quote(command.values.uds)}")
    if command.values.api_key or os.environ.get("VLLM_API_KEY"):
        lines.append('-H "Authorization: Bearer $VLLM_API_KEY"')
    lines.append(f"-d {shlex.quote(json.dumps(body))}")
    return "  " + " \\\n    ".join(lines)


def _url(values: argparse.Namespace) -> str:
    scheme = "https" if values.ssl_certfile else "http"
    if values.uds:
        return f"{scheme}://localhost"
    host = values.host
    if host in (None, "", "0.0.0.0", "::"):
        host = "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}:{values.port}"
