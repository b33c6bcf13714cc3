"""The command behind ``serve.py``: ``vllm serve`` with ``--kvcompress-*`` options.

The options are made from the fields of :class:`~vllm_kvcompress.settings.Settings` and passed
on inside ``--additional-config``; every other argument reaches vLLM's own serve parser as it
was given. Without a model the bundled one is served, with defaults fit for a demo.

vLLM is imported inside functions only: some of its modules look at ``sys.argv`` when imported.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from vllm_kvcompress import bundled, cli
from vllm_kvcompress.allow import allow_endpoints
from vllm_kvcompress.settings import CONFIG_KEY, Settings, SettingsError, parse_settings

PREFIX = "--kvcompress-"
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "kvcompress"

DEMO_KV_CACHE_BYTES = 512 * 2**20
DEMO_BLOCK_SIZE = 32

_UNSET = object()
"""Default that tells an option the user left out from one given its default value."""


def main(argv: Sequence[str]) -> int:
    """Run ``serve.py``.

    Parameters
    ----------
    argv : sequence of str
        The arguments without the program name.

    Returns
    -------
    int
        Exit code: 2 for arguments that cannot be used.
    """
    try:
        raw, rest = split_arguments(argv)
        if wanted := _help_request(rest):
            return _show_help(wanted)
        parse_settings(raw)  # the quick check, before vLLM is imported
        inspected = inspect_arguments(rest)
        command = build_command(raw, rest, inspected)
        words = announcement(command)
        if command.settings.enabled:
            require_plugin()
            words += announce_accounts(command, allow_endpoints())
        print(words, flush=True)
    except (SettingsError, bundled.BundledModelError) as error:
        print(error, file=sys.stderr)
        return 2
    sys.argv = ["vllm", *command.argv]
    return cli.main()


# Our options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the ``--kvcompress-*`` options to a parser, one per settings field.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    """
    group = parser.add_argument_group("kvcompress", "KV cache compression.")
    for name, field in Settings.model_fields.items():
        group.add_argument(
            PREFIX + name.replace("_", "-"),
            dest=name,
            metavar=_metavar(name, field.annotation),
            type=_converter(field.annotation),
            help=_help_text(field.description or "", field.default).replace("%", "%%"),
            default=argparse.SUPPRESS,
        )


def split_arguments(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take our options out of a command line.

    Parameters
    ----------
    argv : sequence of str

    Returns
    -------
    tuple of dict and list of str
        The settings that were given, not validated yet, and all other arguments in order.

    Raises
    ------
    SettingsError
        For an option of ours that does not exist or lacks its value.
    """
    # vLLM accepts underscores for dashes in any option; so do we.
    dashed = [_dashed(arg) if arg.replace("_", "-").startswith(PREFIX) else arg for arg in argv]
    parser = _OneSentenceParser(prog="serve.py", add_help=False, allow_abbrev=False)
    add_options(parser)
    namespace, rest = parser.parse_known_args(dashed)
    for arg in rest:
        if arg.startswith(PREFIX):
            allowed = [PREFIX + name.replace("_", "-") for name in Settings.model_fields]
            raise SettingsError(
                f"kvcompress: unknown option {arg.split('=')[0]}; allowed are {', '.join(allowed)}."
            )
    return vars(namespace), rest


class _OneSentenceParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"kvcompress: {message}.")


def _dashed(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def _converter(annotation: Any) -> Callable[[str], Any]:
    """How to read an option of this type; text that does not fit is left to the settings.

    So there is one place, and one sentence, that says what a setting must look like.
    """
    origin = get_origin(annotation)
    if origin is tuple:
        return lambda text: [_read(int, part) for part in text.split(",") if part.strip()]
    if origin is Literal:
        return str
    kinds = get_args(annotation) if origin in (Union, UnionType) else (annotation,)
    if bool in kinds:
        return lambda text: {"true": True, "false": False}.get(text.lower(), text)
    for kind in (int, float, str):
        if kind in kinds:
            return functools.partial(_read, kind)
    raise TypeError(f"no command-line form for a setting of type {annotation}")


def _read(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def _metavar(name: str, annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    return "N,N,..." if get_origin(annotation) is tuple else name.upper()


def _help_text(description: str, default: Any) -> str:
    if default in (None, ()) or "default" in description:
        return description
    return f"{description} (default: {default})"


def _help_request(rest: Sequence[str]) -> str | None:
    for arg in rest:
        if arg in ("-h", "--help"):
            return "--help"
        if arg.startswith("--help="):
            return arg
    return None


def _show_help(wanted: str) -> int:
    # vLLM builds the texts only if it finds --help in sys.argv, and leaves out the deprecated
    # --model if it finds serve.
    sys.argv = ["serve.py", "serve", "--help"]
    parser = _serve_parser()
    if wanted == "--help":  # vLLM's short form names groups of options, without the options
        ours = argparse.ArgumentParser(add_help=False, usage=parser.usage)
        ours.description = (
            f"Serve MODEL (default: the bundled {bundled.MODEL_NAME}) through vLLM's "
            "OpenAI-compatible server with a compressed KV cache."
        )
        add_options(ours)
        print(ours.format_help())
        print("Every other option is vLLM's own:\n")
        parser.usage = argparse.SUPPRESS
    else:
        add_options(parser)
    parser.parse_args([wanted])
    return 0


# What the rest of the command line says to vLLM


@dataclass(frozen=True)
class Inspected:
    """vLLM's reading of the arguments that are not ours.

    Attributes
    ----------
    values : argparse.Namespace
        What vLLM's serve parser makes of them, a ``--config`` file included.
    given : frozenset of str
        Names of the values that the user chose, as far as we have defaults for them.
    """

    values: argparse.Namespace
    given: frozenset[str]

    @property
    def model(self) -> str | None:
        """Model the user named, as an argument or in a ``--config`` file."""
        return self.values.model_tag or (self.values.model if "model" in self.given else None)


def inspect_arguments(rest: Sequence[str]) -> Inspected:
    """Read arguments with vLLM's serve parser, which exits on those it does not know.

    Parameters
    ----------
    rest : sequence of str

    Returns
    -------
    Inspected
    """
    parser = _serve_parser()
    watched = ("model", "gpu_memory_utilization", *_demo_defaults())
    defaults = {name: parser.get_default(name) for name in watched}
    parser.set_defaults(**dict.fromkeys(watched, _UNSET))
    values = parser.parse_args(list(rest))
    given = frozenset(name for name in watched if getattr(values, name) is not _UNSET)
    for name in set(watched) - given:
        setattr(values, name, defaults[name])
    return Inspected(values, given)


def _serve_parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import VLLM_SUBCMD_PARSER_EPILOG
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Without vLLM's "serve" in front, so that a missing model is ours to fill in.
    return make_arg_parser(
        FlexibleArgumentParser(
            prog="serve.py",
            usage="serve.py [MODEL] [options]",
            epilog=VLLM_SUBCMD_PARSER_EPILOG.replace("vllm {subcmd}", "serve.py"),
        )
    )


def _demo_defaults() -> dict[str, Any]:
    from vllm.platforms import current_platform

    return {
        "host": "127.0.0.1",
        "served_model_name": [bundled.MODEL_NAME],
        "block_size": DEMO_BLOCK_SIZE,
        "kv_cache_memory_bytes": DEMO_KV_CACHE_BYTES,
        # On CPU, compiling takes minutes at every new setting, gains no speed on this model and,
        # in bfloat16 with vLLM 0.32.0, makes it answer wrongly, with or without compression.
        "enforce_eager": current_platform.is_cpu(),
    }


# The command for vLLM


@dataclass(frozen=True)
class Command:
    """A ``vllm serve`` command line and what to say about it.

    Attributes
    ----------
    argv : list of str
        Arguments of the ``vllm`` command, from ``serve`` on.
    values : argparse.Namespace
        The values that vLLM will read from them.
    settings : Settings
    model : str
    """

    argv: list[str]
    values: argparse.Namespace
    settings: Settings
    model: str


def build_command(raw: dict[str, Any], rest: Sequence[str], inspected: Inspected) -> Command:
    """Turn the two halves of the command line into one ``vllm serve`` command.

    Parameters
    ----------
    raw : dict
        Settings given as options; they win over those in the user's ``--additional-config``.
    rest : sequence of str
        All other arguments.
    inspected : Inspected
        vLLM's reading of ``rest``.

    Returns
    -------
    Command

    Raises
    ------
    SettingsError
        If the settings cannot be used.
    BundledModelError
        If no model is named and the bundled one cannot be prepared.
    """
    values = argparse.Namespace(**vars(inspected.values))
    given_config = values.additional_config
    if not isinstance(given_config, dict):
        raise SettingsError(
            f"kvcompress: --additional-config must be a JSON object, not {given_config!r}."
        )
    given_settings = given_config.get(CONFIG_KEY, {})
    if not isinstance(given_settings, dict):
        parse_settings(given_settings)  # raises, and says why
    merged = {**given_settings, **raw}
    settings = parse_settings(merged)

    argv = list(rest)
    config = {key: value for key, value in given_config.items() if key != CONFIG_KEY}
    if settings.enabled:
        config[CONFIG_KEY] = merged
    if config != given_config:
        argv = [
            *_without_option(argv, "--additional-config"),
            *_option("additional_config", config),
        ]
        values.additional_config = config

    model = inspected.model
    if model is None:
        model = str(bundled.model_directory())
        argv.insert(0, model)
        for name, value in _demo_defaults().items():
            if name in inspected.given or value is False:
                continue
            if name == "kv_cache_memory_bytes" and "gpu_memory_utilization" in inspected.given:
                continue
            argv += _option(name, value)
            setattr(values, name, value)
    return Command(["serve", *argv], values, settings, model)


def _option(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    return [flag, *map(str, value if isinstance(value, list) else [value])]


def _without_option(argv: Sequence[str], flag: str) -> list[str]:
    """Drop an option and its dotted parts, which vLLM would let win over what we add."""
    kept: list[str] = []
    rest = iter(argv)
    for arg in rest:
        name, equals, _ = arg.partition("=")
        name = name.replace("_", "-")
        if name != flag and not name.startswith(flag + "."):
            kept.append(arg)
        elif not equals:
            next(rest, None)
    return kept


def require_plugin() -> None:
    """Refuse to serve when vLLM will not load this package: it would serve uncompressed.

    Raises
    ------
    SettingsError
        If the entry point is missing or ``VLLM_PLUGINS`` leaves it out.
    """
    if not entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME):
        raise SettingsError(
            "kvcompress: the package is not installed in this environment, so vLLM would not "
            "load it; run `make setup` or `pip install -e .`."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise SettingsError(
            f"kvcompress: VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin; "
            f"add {PLUGIN_NAME} to it, or use --kvcompress-method none."
        )


# What the user reads before the server starts


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
    num_layers = uniform_layer_count(command.model)
    if num_layers is None:
        return "What is compressed depends on the model's layers; vLLM's start-up log will say."
    from vllm.config import CacheConfig

    from vllm_kvcompress.config import default_block_size
    from vllm_kvcompress.summary import describe

    block_size = default_block_size(command.values.block_size) or CacheConfig.DEFAULT_BLOCK_SIZE
    return describe(command.settings, num_layers, block_size)


def uniform_layer_count(model: str) -> int | None:
    """Return the number of layers of a model on this machine.

    Parameters
    ----------
    model : str
        Directory or hub name.

    Returns
    -------
    int or None
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
    return getattr(text, "num_hidden_layers", None)


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
