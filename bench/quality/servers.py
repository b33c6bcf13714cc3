"""Which servers an evaluation starts, and what each is asked for."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from bench.quality.plan import Plan
from vllm_kvcompress.methods import MERGING
from vllm_kvcompress.serving.announce import uniform_layers
from vllm_kvcompress.serving.command import build_command, inspect_arguments
from vllm_kvcompress.serving.options import split_arguments
from vllm_kvcompress.shares import ALIKE, Shares

FLAT = "flat"
"""Variant in which all layers of the bundled model are compressed alike."""

FLAT_OPTIONS = ("--kvcompress-skip-heads=",)


@dataclass(frozen=True)
class OwnServer:
    """A server to start.

    Attributes
    ----------
    variant : str
        Of its rows.
    options : tuple of str
        Of ``serve.py``, beside the method.
    method : str
    methods : tuple of str
        What it is asked for.
    shares : Shares
        Of its layers that keep more than the others.
    """

    variant: str
    options: tuple[str, ...]
    method: str
    methods: tuple[str, ...]
    shares: Shares


def own_servers(plan: Plan, model: str, arguments: argparse.Namespace) -> list[OwnServer]:
    """Servers for a plan: of each variant one for all methods that evict, and one per other.

    The bundled model is served with its own default, which keeps heads whole, and then, as the
    variant `FLAT`, with all layers alike. Another model, or options of the user's, are served
    as they are.

    Parameters
    ----------
    plan : Plan
    model : str
        Directory or name.
    arguments : argparse.Namespace
        Of the command.

    Returns
    -------
    list of OwnServer
    """
    given = tuple(shlex.split(arguments.server_options))
    variants = [(plan.variant, given, plan.methods)]
    if not (arguments.model or arguments.variant or given):
        variants.append((FLAT, FLAT_OPTIONS, plan.flat_methods))
    found = []
    for variant, options, methods in variants:
        shares = shares_of(model, options, bundled=not arguments.model)
        for method, asked in _by_server(methods):
            found.append(OwnServer(variant, options, method, asked, shares))
    return found


def _by_server(methods: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    merging = [name for name in methods if name in MERGING]
    evicting = tuple(name for name in methods if name not in MERGING)
    found = [(evicting[0], evicting)] if evicting else []
    return found + [(name, (name,)) for name in merging]


def shares_of(model: str, options: Sequence[str], bundled: bool) -> Shares:
    """Shares of layers that keep more than the others, as ``serve.py`` will have them."""
    ours, rest = split_arguments(options)
    named = [] if bundled else [model]
    settings = build_command(ours, [*named, *rest], inspect_arguments([*named, *rest])).settings
    if not (settings.skip_layers or settings.places_heads):
        return ALIKE
    heads = uniform_layers(model)
    if heads is None:
        return ALIKE
    return Shares.of(settings, heads.layers, heads.kv_heads or 1)
