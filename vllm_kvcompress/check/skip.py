"""Which layers should keep every token. Pure arithmetic.

In some models a few layers alone fetch what is asked for, and compressing these costs most.
``skip_layers`` keeps them whole. vLLM groups layers by equal specs, so only some numbers of skipped
layers are any good: see :mod:`vllm_kvcompress.bands`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from vllm_kvcompress.bands import group_layout, plan_bands
from vllm_kvcompress.settings import parse_settings
from vllm_kvcompress.shares import Shares

SENSITIVE = 0.1
"""Loss from which a layer may count as sensitive, nats per answer token. Of the bundled model's
30 layers, 27 are below 0.05 on twelve facts."""

APART = 5.0
"""How many times the median layer's loss a sensitive layer has to lose."""

OTHERS_KEEP = 0.15
"""Least share that the other layers keep of their tokens. At half removed the bundled model lost
least with twelve whole layers and a sixth for the others; with six whole at three quarters
removed, a sixteenth for the others, it lost passkeys: docs/quality.md has the figures."""

MAX_GROUPS = 10
"""Most KV cache groups that skipping may lead to; each has block tables and metadata of its
own in every step."""

_BLOCK_SIZE = 16  # Tokens; the number of groups does not depend on it.


def sensitive_layers(losses: Sequence[float]) -> list[int]:
    """Layers that lose far more than the others do, the worst first.

    Never more than half of them, as they are above the median. A model all of whose layers lose
    alike has none.

    Parameters
    ----------
    losses : sequence of float
        Loss by layer where it alone is compressed, nats per answer token.
    """
    least = max(SENSITIVE, APART * median(losses))
    return [layer for layer in _worst_first(losses) if losses[layer] > least]


def allowed_sizes(num_layers: int) -> list[int]:
    """How many of a model's layers may be skipped, ascending, from 0.

    Those where the groups that :func:`~vllm_kvcompress.bands.plan_bands` chooses (none wastes
    more than 5 % on padding) are at most ``MAX_GROUPS``.
    """
    sizes = range(1, num_layers)
    return [0, *(size for size in sizes if _groups(num_layers, size) <= MAX_GROUPS)]


def _groups(num_layers: int, skipped: int) -> int:
    settings = parse_settings({"skip_layers": list(range(skipped))})
    bands = plan_bands(settings, num_layers, _BLOCK_SIZE)
    return group_layout([len(band.layers) for band in bands])[1]


def choose_layers(
    losses: Sequence[float], removed: float, least: float = OTHERS_KEEP
) -> tuple[int, ...]:
    """Layers to skip: the worst, as many as leave the others a share of their tokens.

    Parameters
    ----------
    losses : sequence of float
        As for :func:`sensitive_layers`.
    removed : float
        Share of the cache to remove, in the mean over all layers.
    least : float
        Share of their tokens that the others keep at least.

    Returns
    -------
    tuple of int
        Ascending; empty if no layer is sensitive, or none can be skipped.
    """
    if not sensitive_layers(losses):
        return ()
    count = len(losses)
    fitting = [n for n in allowed_sizes(count) if Shares(n / count).keep_ratio(removed) >= least]
    return tuple(sorted(_worst_first(losses)[: max(fitting, default=0)]))


def _worst_first(losses: Sequence[float]) -> list[int]:
    return sorted(range(len(losses)), key=lambda layer: (-losses[layer], layer))


def named(layers: Sequence[int]) -> str:
    """Layers in words: ``layers 7, 18 and 23``."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
