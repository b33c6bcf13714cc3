"""``serve.py``: ``vllm serve`` with ``--kvcompress-*`` options.

The options are made from the fields of :class:`~vllm_kvcompress.settings.Settings` and passed
on inside ``--additional-config``; every other argument reaches vLLM's own serve parser as it
was given. Without a model the bundled one is served, with defaults fit for a demo.

In this package vLLM is imported inside functions only: some of its modules look at ``sys.argv``
when imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from vllm_kvcompress import bundled, cli
from vllm_kvcompress.serving.allow import allow_endpoints
from vllm_kvcompress.serving.announce import announce_accounts, announcement
from vllm_kvcompress.serving.command import build_command, inspect_arguments, serve_parser
from vllm_kvcompress.serving.options import add_options, split_arguments
from vllm_kvcompress.settings import SettingsError, parse_settings

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "kvcompress"


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
    parser = serve_parser()
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
