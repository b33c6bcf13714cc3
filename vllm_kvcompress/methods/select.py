"""From scores to the tokens that stay. Pure torch, shared by every method."""

from __future__ import annotations

import torch


def select_tokens(scores: torch.Tensor, keep: int, sinks: int) -> torch.Tensor:
    """Choose the tokens that stay, per KV head.

    Parameters
    ----------
    scores : torch.Tensor
        ``[..., tokens]``, float32, in age order; the highest are kept. Equal scores keep
        the older token, so that the choice is the same on every device and batch.
    keep : int
        Tokens to keep, at least ``sinks``.
    sinks : int
        First tokens that always stay.

    Returns
    -------
    torch.Tensor
        ``[..., keep]``, int64, ascending indices: the age order is preserved.
    """
    head = torch.arange(sinks, device=scores.device).expand(*scores.shape[:-1], sinks)
    ranked = torch.sort(scores[..., sinks:], dim=-1, descending=True, stable=True).indices
    chosen = ranked[..., : keep - sinks] + sinks
    return torch.cat([head, chosen.sort(dim=-1).values], dim=-1)


def others(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens that were not chosen.

    Parameters
    ----------
    kept : torch.Tensor
        ``[..., keep]``, int64, what :func:`select_tokens` chose.
    tokens : int
        How many there were to choose from.

    Returns
    -------
    torch.Tensor
        ``[..., tokens - keep]``, int64, ascending indices.
    """
    left = torch.ones(*kept.shape[:-1], tokens, dtype=torch.bool, device=kept.device)
    left.scatter_(-1, kept, False)
    # A stable sort puts the chosen ones last without asking the device how many are left.
    order = torch.sort(left, dim=-1, descending=True, stable=True).indices
    return order[..., : tokens - kept.shape[-1]]
