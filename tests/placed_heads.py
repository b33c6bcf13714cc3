"""Kept tokens where heads change places: from the layers in whose pages they lie to their own."""

from __future__ import annotations

import torch

from vllm_kvcompress.heads import Part, places
from vllm_kvcompress.settings import Settings

Live = dict[tuple[int, int], torch.Tensor]
"""Positions in the cache after a compaction, ``[kv_heads, live]``, by (position, layer)."""


def by_head(live: Live, settings: Settings, num_layers: int, kv_heads: int) -> Live:
    """Rows of each layer's own heads, without those that stay whole; see :mod:`oracle`.

    Parameters
    ----------
    live : dict of (int, int) to torch.Tensor
        By the layer in whose pages the heads lie.
    settings : Settings
    num_layers, kv_heads : int
        Of the model.
    """
    if not settings.places_heads:
        return live
    placed = places(settings, num_layers, kv_heads)
    found: Live = {}
    for position in {position for position, _ in live}:
        for layer in range(num_layers):
            rows: dict[int, torch.Tensor] = {}
            for part in placed.get(layer, [Part(layer, 0, tuple(range(kv_heads)))]):
                if (position, part.layer) in live:
                    pages = live[position, part.layer]
                    rows |= {head: pages[part.first + i] for i, head in enumerate(part.heads)}
            if layer in settings.skip_layers:
                continue
            boosted = [h for h in range(kv_heads) if (layer, h) in settings.boost_heads]
            apart = {*settings.skip_heads, *settings.boost_heads}
            others = [h for h in range(kv_heads) if (layer, h) not in apart]
            assert not rows.keys() - {*boosted, *others}
            for name, heads in ((layer, others), (num_layers + layer, boosted)):
                # All heads of a band are compacted at once, or none.
                if any(head in rows for head in heads):
                    found[position, name] = torch.stack([rows[head] for head in heads])
    return found
