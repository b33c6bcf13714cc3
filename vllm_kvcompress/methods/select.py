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
