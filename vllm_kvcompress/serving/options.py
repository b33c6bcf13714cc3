"""The ``--kvcompress-*`` options, made from the settings."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from vllm_kvcompress.settings import Settings, SettingsError

PREFIX = "--kvcompress-"


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
    if origin is tuple and get_origin(get_args(annotation)[0]) is tuple:
        return str  # "LAYER:HEAD,...", read where the settings are.
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
    if get_origin(annotation) is tuple:
        return "L:H,L:H,..." if get_origin(get_args(annotation)[0]) is tuple else "N,N,..."
    return name.upper()


def _help_text(description: str, default: Any) -> str:
    if default in (None, ()) or "default" in description:
        return description
    return f"{description} (default: {default})"
