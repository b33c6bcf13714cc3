"""Which pages each KV head lies in, where some heads keep every token and others do not.

A page holds a block of tokens for all KV heads of a layer, so heads that keep every token would
make their whole layer do so. They change places instead: some layers, the hosts, hold nothing
but such heads, of several layers, and their own other heads lie where those came from. Groups,
block tables and budgets know layers only and stay as they are: a host is a skipped layer.
Pure arithmetic, used by every process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from vllm_kvcompress.settings import Settings, SettingsError


@dataclass(frozen=True)
class Part:
    """KV heads of one layer that lie side by side in the pages of one layer.

    Attributes
    ----------
    layer : int
        Whose pages.
    first : int
        Where the first head lies in them.
    heads : tuple of int
        The heads, ascending.
    """

    layer: int
    first: int
    heads: tuple[int, ...]


def whole_layers(settings: Settings, num_layers: int, kv_heads: int) -> tuple[int, ...]:
    """Layers whose pages keep every token: the skipped ones and the hosts.

    Parameters
    ----------
    settings : Settings
    num_layers : int
        Layers of the model.
    kv_heads : int
        KV heads of a layer; unused where no head is named.

    Returns
    -------
    tuple of int
        Ascending.

    Raises
    ------
    SettingsError
        For heads that cannot be kept whole; see :func:`places`.
    """
    hosts = _hosts(settings, num_layers, kv_heads) if settings.skip_heads else ()
    return tuple(sorted({*settings.skip_layers, *hosts}))


def places(settings: Settings, num_layers: int, kv_heads: int) -> dict[int, tuple[Part, ...]]:
    """Where the heads lie of layers that do not have all of theirs in their own pages.

    Parameters
    ----------
    settings : Settings
    num_layers, kv_heads : int
        As for :func:`whole_layers`.

    Returns
    -------
    dict of int to tuple of Part
        By layer. Heads that stay come first in their layer's pages, whole ones in a host's and
        the others elsewhere; behind them those of other layers, by layer and head.

    Raises
    ------
    SettingsError
        For a head that does not exist or is skipped with its layer, and for a number of heads
        that does not fill pages.
    """
    if not settings.skip_heads:
        return {}
    hosts = _hosts(settings, num_layers, kv_heads)
    whole = set(settings.skip_heads)
    coming = [head for head in settings.skip_heads if head[0] not in hosts]
    going = [
        (host, head) for host in hosts for head in range(kv_heads) if (host, head) not in whole
    ]
    # Each whole head elsewhere leaves a place to a head of a host.
    new = {head: host for head, (host, _) in zip(coming, going, strict=True)}
    new |= {head: layer for (layer, _), head in zip(coming, going, strict=True)}
    affected = sorted({layer for head in new for layer in (head[0], new[head])})
    held: dict[int, list[tuple[int, int]]] = {
        layer: [(layer, head) for head in range(kv_heads) if (layer, head) not in new]
        for layer in affected
    }
    for head in sorted(new):
        held[new[head]].append(head)
    found: dict[int, list[Part]] = {layer: [] for layer in affected}
    for layer, heads in held.items():
        first = 0
        for owner, run in groupby(heads, key=lambda head: head[0]):
            own = tuple(head for _, head in run)
            found[owner].append(Part(layer, first, own))
            first += len(own)
    return {layer: tuple(parts) for layer, parts in found.items()}


def _hosts(settings: Settings, num_layers: int, kv_heads: int) -> tuple[int, ...]:
    """Layers that hold whole heads only: those that have most of them, so that few move."""
    named = settings.skip_heads
    for layer, head in named:
        if layer >= num_layers or head >= kv_heads:
            raise SettingsError(
                f"kvcompress: skip_heads={_text(named)} is not allowed: there is no "
                f"{layer}:{head}; the model has layers 0 to {num_layers - 1} with KV heads 0 to "
                f"{kv_heads - 1}."
            )
        if layer in settings.skip_layers:
            raise SettingsError(
                f"kvcompress: skip_heads={_text(named)} is not allowed: {layer}:{head} is in "
                f"skip_layers={list(settings.skip_layers)} already."
            )
    if len(named) % kv_heads:
        fewer = len(named) // kv_heads * kv_heads
        choices = " or ".join(str(n) for n in (fewer, fewer + kv_heads) if n)
        raise SettingsError(
            f"kvcompress: skip_heads={_text(named)} is not allowed: {len(named)} heads do not fill "
            f"pages of {kv_heads} KV heads; name {choices}."
        )
    counts = Counter(layer for layer, _ in named)
    ranked = sorted(counts, key=lambda layer: (-counts[layer], layer))
    return tuple(sorted(ranked[: len(named) // kv_heads]))


def _text(heads: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{layer}:{head}" for layer, head in heads)
