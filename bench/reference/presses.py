"""kvpress's presses by name."""

from __future__ import annotations

from collections.abc import Callable

from kvpress import (
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    RandomPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)

PRESSES: dict[str, Callable[..., ScorerPress]] = {
    press.__name__: press
    for press in (
        KnormPress,
        KeyDiffPress,
        StreamingLLMPress,
        RandomPress,
        ExpectedAttentionPress,
        SnapKVPress,
        TOVAPress,
    )
}
"""All with their own defaults, but for the share."""


def make_press(name: str, tokens: int, kept: int) -> ScorerPress:
    """A press that keeps this many of so many tokens.

    kvpress keeps ``int(tokens * (1 - compression_ratio))``; half a token more makes sure that
    rounding does not make it one less.

    Parameters
    ----------
    name : str
        Of `PRESSES`.
    tokens, kept : int
    """
    return PRESSES[name](compression_ratio=1 - (kept + 0.5) / tokens)
