"""Which pages each KV head lies in, where some heads keep more tokens than others.

A page holds a block of tokens for all KV heads of a layer, so heads that keep every token would
make their whole layer do so. They change places instead: some layers, the hosts, hold nothing
but such heads, of several layers, and their own other heads lie where those came from. The same
goes for heads with a larger budget. Groups, block tables and budgets know layers only and stay as
they are: a host of whole heads is a skipped layer, hosts of boosted heads are a band.
Pure arithmetic, used by every process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from vllm_kvcompress.settings import Heads, Settings, SettingsError


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


@dataclass(frozen=True)
class Hosts:
    """Layers whose pages hold heads that keep more than the others.

    Attributes
    ----------
    whole : tuple of int
        Layers whose pages keep every token: the skipped ones and the hosts of whole heads.
    boosted : tuple of int
        Layers whose pages hold nothing but boosted heads.
    """

    whole: tuple[int, ...]
    boosted: tuple[int, ...]


def hosts(settings: Settings, num_layers: int, kv_heads: int) -> Hosts:
    """Choose the layers whose pages hold the heads that settings name.

    Parameters
    ----------
    settings : Settings
    num_layers : int
        Layers of the model.
    kv_heads : int
        KV heads of a layer; unused where no head is named.

    Returns
    -------
    Hosts
        Layers that have most of such heads, so that few move; ascending.

    Raises
    ------
    SettingsError
        For heads that do not exist or are skipped with their layer, and for a number of heads that
        does not fill pages.
    """
    for name, heads in _named(settings).items():
        _check(name, heads, settings, num_layers, kv_heads)
    taken: set[int] = set(settings.skip_layers)
    whole = _with_most(settings.skip_heads, taken, num_layers, kv_heads)
    boosted = _with_most(settings.boost_heads, taken | whole, num_layers, kv_heads)
    return Hosts(tuple(sorted(taken | whole)), tuple(sorted(boosted)))


def places(settings: Settings, num_layers: int, kv_heads: int) -> dict[int, tuple[Part, ...]]:
    """Where the heads lie of layers that do not have all of theirs in their own pages.

    Parameters
    ----------
    settings : Settings
    num_layers, kv_heads : int
        As for :func:`hosts`.

    Returns
    -------
    dict of int to tuple of Part
        By layer. Heads that stay come first in their layer's pages, and behind them those of other
        layers, by layer and head.

    Raises
    ------
    SettingsError
        As :func:`hosts`.
    """
    if not settings.places_heads:
        return {}
    chosen = hosts(settings, num_layers, kv_heads)
    kind_of_layer = dict.fromkeys(chosen.whole, "skip_heads")
    kind_of_layer |= dict.fromkeys(chosen.boosted, "boost_heads")
    kind_of_head = {head: name for name, heads in _named(settings).items() for head in heads}
    moving = [
        (layer, head)
        for layer in range(num_layers)
        for head in range(kv_heads)
        if layer not in settings.skip_layers
        and kind_of_head.get((layer, head)) != kind_of_layer.get(layer)
    ]
    # Each leaves a place to a head of the kind that its layer's pages hold.
    new: dict[tuple[int, int], int] = {}
    for kind in {kind_of_head.get(head) for head in moving}:
        coming = [head for head in moving if kind_of_head.get(head) == kind]
        free = [layer for layer, _ in moving if kind_of_layer.get(layer) == kind]
        new |= dict(zip(coming, free, strict=True))
    held: dict[int, list[tuple[int, int]]] = {
        layer: [(layer, head) for head in range(kv_heads) if (layer, head) not in new]
        for layer in sorted({layer for layer, _ in moving})
    }
    for head in sorted(new):
        held[new[head]].append(head)
    found: dict[int, list[Part]] = {layer: [] for layer in held}
    for layer, heads in held.items():
        first = 0
        for owner, run in groupby(heads, key=lambda head: head[0]):
            own = tuple(head for _, head in run)
            found[owner].append(Part(layer, first, own))
            first += len(own)
    return {layer: tuple(parts) for layer, parts in found.items()}


def heads_as_text(heads: Heads) -> str:
    """Heads as settings name them, ``"7:2,8:0"``."""
    return ",".join(f"{layer}:{head}" for layer, head in heads)


def _named(settings: Settings) -> dict[str, Heads]:
    return {"skip_heads": settings.skip_heads, "boost_heads": settings.boost_heads}


def _check(name: str, heads: Heads, settings: Settings, num_layers: int, kv_heads: int) -> None:
    refused = f"kvcompress: {name}={heads_as_text(heads)} is not allowed:"
    for layer, head in heads:
        if layer >= num_layers or head >= kv_heads:
            raise SettingsError(
                f"{refused} there is no {layer}:{head}; the model has layers 0 to "
                f"{num_layers - 1} with KV heads 0 to {kv_heads - 1}."
            )
        if layer in settings.skip_layers:
            raise SettingsError(
                f"{refused} {layer}:{head} is in skip_layers={list(settings.skip_layers)} already."
            )
    if heads and len(heads) % kv_heads:
        fewer = len(heads) // kv_heads * kv_heads
        choices = " or ".join(str(n) for n in (fewer, fewer + kv_heads) if n)
        raise SettingsError(
            f"{refused} {len(heads)} heads do not fill pages of {kv_heads} KV heads; "
            f"name {choices}."
        )


def _with_most(heads: Heads, taken: set[int], num_layers: int, kv_heads: int) -> set[int]:
    """As many layers as the heads fill pages of, those that have most of them."""
    if not heads:
        return set()
    counts = Counter(layer for layer, _ in heads)
    free = [layer for layer in range(num_layers) if layer not in taken]
    ranked = sorted(free, key=lambda layer: (-counts[layer], layer))
    return set(ranked[: len(heads) // kv_heads])
