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
    if left.device.type == "cpu":
        return left.nonzero()[:, -1].view(*kept.shape[:-1], -1)
    # A stable sort puts the chosen ones last without asking the device how many are left.
    order = torch.sort(left, dim=-1, descending=True, stable=True).indices
    return order[..., : tokens - kept.shape[-1]]


def take_tokens(elements: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Pick tokens per head: ``[heads, n, dim]`` by ``[heads, kept]`` to ``[heads, kept, dim]``."""
    if elements.stride(-1) != 1:
        # Token-minor: gather along the minor axis.
        index = tokens.unsqueeze(1).expand(-1, elements.shape[-1], -1)
        return elements.transpose(1, 2).gather(2, index).transpose(1, 2)
    heads, length, dim = elements.shape
    first = torch.arange(0, heads * length, length, device=tokens.device)
    rows = (tokens + first[:, None]).flatten()
    return elements.reshape(heads * length, dim).index_select(0, rows).view(heads, -1, dim)
