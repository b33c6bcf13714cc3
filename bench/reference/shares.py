"""How many tokens stay. Standard library only."""

from __future__ import annotations

from fractions import Fraction
from math import ceil


def kept_tokens(tokens: int, removed: float, block_size: int) -> int:
    """Tokens that our server keeps in each layer, for kvpress to keep as many.

    Parameters
    ----------
    tokens : int
        Of what is compressed.
    removed : float
        Share to remove, from 0 to 1.
    block_size : int
        Whole blocks are removed, as few as leave at least the share to keep.

    Returns
    -------
    int
    """
    wanted = ceil((1 - Fraction(str(removed))) * tokens)
    return tokens - (tokens - wanted) // block_size * block_size
