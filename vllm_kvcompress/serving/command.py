"""From the command line of ``serve.py`` to one of ``vllm serve``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress import bundled
from vllm_kvcompress.settings import CONFIG_KEY, Settings, SettingsError, parse_settings

DEMO_KV_CACHE_BYTES = 512 * 2**20
DEMO_BLOCK_SIZE = 32

LAYER_CHOICES = {"skip_layers", "skip_heads", "boost_heads", "bands", "pyramid_beta"}
"""Settings with which a user decides about layers; else those of the bundled model apply."""

_UNSET = object()
"""Default that tells an option the user left out from one given its default value."""


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
    parser = serve_parser()
    watched = ("model", "gpu_memory_utilization", *_demo_defaults())
    defaults = {name: parser.get_default(name) for name in watched}
    parser.set_defaults(**dict.fromkeys(watched, _UNSET))
    values = parser.parse_args(list(rest))
    given = frozenset(name for name in watched if getattr(values, name) is not _UNSET)
    for name in set(watched) - given:
        setattr(values, name, defaults[name])
    return Inspected(values, given)


def serve_parser() -> Any:
    """Parser of ``vllm serve``, with the model left to us."""
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


def _sensitive(values: argparse.Namespace) -> dict[str, Any]:
    """What the bundled model keeps whole: heads where the backend is known to take some of them."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and values.tensor_parallel_size == 1:
        return {"skip_heads": bundled.SKIP_HEADS, "recent_ratio": bundled.RECENT_RATIO}
    return {"skip_layers": list(bundled.SKIP_LAYERS)}


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
    one_group = values.disable_hybrid_kv_cache_manager
    if inspected.model is None and not one_group and not LAYER_CHOICES & merged.keys():
        merged = _sensitive(values) | merged
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
