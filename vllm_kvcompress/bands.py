"""Layer bands and their budgets: which layers share a block table, and how long it gets.

A band becomes one or more KV cache groups of vLLM. vLLM makes all groups equally wide
and pads the rest, so a choice of bands is checked against the groups it leads to before
the engine starts. Pure arithmetic, used by every process and by the start-up message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from vllm_kvcompress.heads import heads_as_text, hosts
from vllm_kvcompress.limits import Limits, Merging
from vllm_kvcompress.methods import MERGING
from vllm_kvcompress.settings import Settings, SettingsError

MAX_PADDING = 0.05
"""Most padding that unequal groups may cost, as a share of the cache."""

MOST_KEPT = 1 << 40
"""Largest budget of a band: more than any request has, and small enough for any message."""

AUTO_BANDS = 6
"""Number of bands aimed at when the pyramid is on and ``bands`` is not set."""


POOLED_SHARE = Fraction(1, 4)
"""Share of a band's blocks that pooled tokens get beside unpooled ones (``knorm+merge``)."""


@dataclass(frozen=True)
class Band:
    """Layers that share one budget.

    Attributes
    ----------
    index : int
        Position among the bands, from the first layers to the last, then the layers whose pages
        hold boosted heads; -1 for the layers that keep every token.
    layers : tuple of int
        Layer indices, ascending.
    limits : Limits or None
        ``None`` for the layers that keep every token.
    """

    index: int
    layers: tuple[int, ...]
    limits: Limits | None


def plan_bands(
    settings: Settings,
    num_layers: int,
    block_size: int,
    eligible: Sequence[int] | None = None,
    other_groups: Sequence[int] = (),
    longest: int = 0,
    kv_heads: int = 1,
) -> list[Band]:
    """Split the layers into bands and give each its budget.

    Parameters
    ----------
    settings : Settings
    num_layers : int
        Layers of the model.
    block_size : int
        Tokens per block.
    eligible : sequence of int or None
        Layers that can be compressed at all; every layer if ``None``.
    other_groups : sequence of int
        Layer counts of the model's other kinds of cache (sliding window and so on), which
        vLLM groups at the same width.
    longest : int
        Longest request in tokens, where it is known: merging needs room for it.
    kv_heads : int
        KV heads of a layer; matters to ``skip_heads`` and ``boost_heads`` only.

    Returns
    -------
    list of Band
        Bands from the first layers to the last; then one of boosted heads, if any, and layers whose
        pages keep every token, if any, as a last band with index -1.

    Raises
    ------
    SettingsError
        For a layer that does not exist, limits that do not fit or groups that would waste
        more than 5 % of the pool.
    """
    unknown = [layer for layer in settings.skip_layers if layer >= num_layers]
    if unknown:
        raise SettingsError(
            f"kvcompress: skip_layers={list(settings.skip_layers)} is not allowed: "
            f"the model has layers 0 to {num_layers - 1}."
        )
    candidates = range(num_layers) if eligible is None else eligible
    apart = hosts(settings, num_layers, kv_heads)
    layers = [layer for layer in candidates if layer not in (*apart.whole, *apart.boosted)]
    kept_whole = tuple(layer for layer in candidates if layer in apart.whole)
    boosted = tuple(layer for layer in candidates if layer in apart.boosted)
    if boosted and not layers:
        raise SettingsError(
            f"kvcompress: boost_heads={heads_as_text(settings.boost_heads)} is not allowed: it "
            "leaves no heads with the usual budget; name fewer, or raise budget or keep_ratio."
        )
    if not layers:
        raise SettingsError(
            f"kvcompress: skip_layers={list(settings.skip_layers)} is not allowed: "
            f"{'with skip_heads ' if settings.skip_heads else ''}it names "
            "every layer, so nothing would be compressed; use method=none for stock vLLM."
        )
    skipped = len(kept_whole)
    others = (*other_groups, *([len(boosted)] if boosted else []))
    count = _number_of_bands(settings, len(layers), skipped, others)
    bands = [
        Band(index, part, _limits(settings, part, num_layers, block_size))
        for index, part in enumerate(_split(layers, count))
    ]
    if boosted:
        boost = Fraction(str(settings.boost))
        bands.append(
            Band(count, boosted, _limits(settings, boosted, num_layers, block_size, boost))
        )
    _check_room(settings, bands, block_size, longest)
    if skipped:
        bands.append(Band(-1, kept_whole, None))
    return bands


def largest_limits(
    settings: Settings, num_layers: int, block_size: int, longest: int, kv_heads: int = 1
) -> dict[int, Limits | None]:
    """Limits of the largest budget that a request may ask for, by band; empty if none is set.

    Parameters
    ----------
    settings : Settings
        The server's.
    num_layers, block_size, longest, kv_heads : int
        As for :func:`plan_bands`.

    Raises
    ------
    SettingsError
        If that budget does not leave every band room.
    """
    if settings.max_budget is None:
        return {}
    changed = settings.model_copy(update={"budget": settings.max_budget, "keep_ratio": None})
    try:
        bands = plan_bands(changed, num_layers, block_size, longest=longest, kv_heads=kv_heads)
    except SettingsError as error:
        reason = str(error).removeprefix("kvcompress: ")
        raise SettingsError(
            f"kvcompress: max_budget={settings.max_budget} is not allowed: {reason}"
        ) from None
    return {band.index: band.limits for band in bands}


def group_layout(bucket_sizes: Sequence[int]) -> tuple[int, int, float]:
    """Groups that vLLM makes of buckets of layers with equal specs.

    Its rule (``_get_kv_cache_groups_uniform_page_size``): all groups are as wide as the
    smallest bucket, or as the largest if that is less than 1.5 times the smallest.

    Returns
    -------
    tuple
        Width of a group in layers, number of groups, padding layers per real layer.
    """
    smallest, largest = min(bucket_sizes), max(bucket_sizes)
    width = largest if largest < 1.5 * smallest else smallest
    groups = sum(ceil(size / width) for size in bucket_sizes)
    return width, groups, groups * width / sum(bucket_sizes) - 1


def _buckets(num_layers: int, count: int, skipped: int, other: Sequence[int]) -> list[int]:
    sizes = [len(part) for part in _split(list(range(num_layers)), count)]
    return [*sizes, *([skipped] if skipped else []), *other]


def _good_choices(num_layers: int, skipped: int, other: Sequence[int]) -> list[int]:
    return [
        count
        for count in range(1, num_layers + 1)
        if group_layout(_buckets(num_layers, count, skipped, other))[2] <= MAX_PADDING
    ]


def _number_of_bands(
    settings: Settings, num_layers: int, skipped: int, other: Sequence[int]
) -> int:
    good = _good_choices(num_layers, skipped, other)
    wanted = settings.bands
    if wanted is None:
        wanted = 1 if settings.pyramid_beta == 1 else min(AUTO_BANDS, num_layers)
        return min(good, key=lambda count: (abs(count - wanted), count))
    if wanted in good:
        return wanted
    if wanted > num_layers:
        problem = f"only {num_layers} layers are compressed"
    else:
        _, groups, padding = group_layout(_buckets(num_layers, wanted, skipped, other))
        problem = (
            f"with {skipped} skipped layers it makes {groups} groups and "
            f"wastes {padding:.0%} of the memory"
        )
    nearest = sorted(good, key=lambda count: (abs(count - wanted), count))[:3]
    # There always is one: as many bands as layers need no padding.
    advice = f"the nearest good choices are {', '.join(map(str, sorted(nearest)))}"
    raise SettingsError(f"kvcompress: bands={wanted} is not allowed: {problem}; {advice}.")


def _split(layers: list[int], count: int) -> list[tuple[int, ...]]:
    """``count`` runs as equal as possible, the longer ones first."""
    base, longer = divmod(len(layers), count)
    parts, start = [], 0
    for index in range(count):
        end = start + base + (index < longer)
        parts.append(tuple(layers[start:end]))
        start = end
    return parts


def pyramid_share(beta: float, layers: Sequence[int], num_layers: int) -> Fraction:
    """Budget of some layers on the pyramid, as their mean, relative to that of layer 0."""
    slope = 1 / Fraction(str(beta)) - 1
    return 1 + Fraction(sum(layers), len(layers) * num_layers) * slope


def _limits(
    settings: Settings,
    layers: tuple[int, ...],
    num_layers: int,
    block_size: int,
    boost: Fraction = Fraction(1),
) -> Limits:
    """Limits of one band: the mean of its layers on the pyramid, times ``boost``."""
    height = pyramid_share(settings.pyramid_beta, layers, num_layers) * boost
    budget = settings.token_budget
    ratio = None
    if budget is None:
        ratio = min(Fraction(str(settings.keep_ratio)) * height, Fraction(1))
    else:
        budget = min(ceil(budget * height / block_size), MOST_KEPT // block_size) * block_size
    # The prompt is untouched in the decode phase, and the sinks with it.
    sinks = 0 if settings.phase == "decode" else settings.sink_tokens
    merging = None
    if settings.method in MERGING:
        pooled = None if MERGING[settings.method] is None else POOLED_SHARE
        merging = Merging(pooled, settings.merge_weighting == "count")
    recent, share = settings.recent_tokens, Fraction(str(settings.recent_ratio))
    return Limits(budget, ratio, sinks, recent, block_size, merging, share)


def _check_room(settings: Settings, bands: list[Band], block_size: int, longest: int) -> None:
    if settings.token_budget is None:
        return
    if settings.token_budget < 2 * block_size:
        raise SettingsError(
            f"kvcompress: budget={settings.token_budget} is not allowed: it must hold at "
            f"least two blocks, {2 * block_size} tokens."
        )
    for band in bands:
        assert band.limits is not None and band.limits.budget is not None
        # Only whole blocks move, so up to a block less one token stays beside the window.
        need = band.limits.least(longest) * block_size + settings.recent_tokens + block_size - 1
        if band.limits.budget >= need:
            continue
        if band.limits.merging is not None:
            raise SettingsError(
                f"kvcompress: budget={settings.token_budget} is too small for "
                f"method={settings.method}: sinks, recent window and one block per power of two "
                f"of the longest request ({longest} tokens in blocks of {block_size}) need "
                f"{need} tokens in every band, and band {band.index} (layers {band.layers[0]} to "
                f"{band.layers[-1]}) has {band.limits.budget}; raise budget, lower pyramid_beta "
                "or max_model_len."
            )
        raise SettingsError(
            f"kvcompress: sink_tokens={settings.sink_tokens} and "
            f"recent_tokens={settings.recent_tokens} do not fit the smallest band: with "
            f"blocks of {block_size} they need {need} tokens, and band {band.index} "
            f"(layers {band.layers[0]} to {band.layers[-1]}) has {band.limits.budget}; "
            "raise budget, lower pyramid_beta or protect fewer tokens."
        )
