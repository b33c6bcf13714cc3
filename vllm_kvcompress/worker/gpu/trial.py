"""Trying kernels out at start-up, against torch, on the very pages they are meant for.

A few blocks are filled with numbers, read and moved both ways, and get back what they held
before. That happens before any request is served: nobody else reads or writes pages then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from vllm_kvcompress.methods import Method, ScoreContext
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.kvdiff import KVDiff
from vllm_kvcompress.worker.band import BandPages, tensor_of
from vllm_kvcompress.worker.pages import RunPart

if TYPE_CHECKING:
    from vllm_kvcompress.worker.gpu.band import TritonBandPages

BLOCKS = 4
"""Blocks that are tried, if there are as many; the null block is one of them."""

METHODS: tuple[Method, ...] = (KNorm(), KeyDiff(), KVDiff())


@torch.inference_mode()
def first_difference(pages: TritonBandPages) -> str | None:
    """What kernels do that torch does otherwise, in words; ``None`` if there is nothing.

    Parameters
    ----------
    pages : TritonBandPages
        Whose first blocks are written to, and written back at the end.
    """
    part = cast(RunPart, pages._keys[0])
    count = min(BLOCKS, -(-len(part.runs) // part.page_runs))
    reference = BandPages(pages.layers)
    blocks = tensor_of(range(count), pages.device)
    before = reference.read_keys(blocks), reference.read_values(blocks)
    try:
        return _scores_differ(pages, reference, blocks) or _moves_differ(pages, reference, blocks)
    finally:
        reference.write(blocks, *before)


def _fill(pages: BandPages, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write keys and values, and return them, raw, ``[layers * kv_heads, tokens, head_dim]``."""
    size, heads, dim = pages.shape
    shape = (2, len(pages.layers) * heads, len(blocks) * size, dim)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    # A direction of their own, as keys have one: the mean of none is all rounding.
    keys, values = pages.as_raw((numbers + 1).to(pages.device))
    pages.write(blocks, keys, values)
    return keys, values


def _scores_differ(
    pages: TritonBandPages, reference: BandPages, blocks: torch.Tensor
) -> str | None:
    _fill(reference, blocks)
    order = blocks.flip(0)
    for method in METHODS:
        found, wanted = (
            band.score(method, lambda layer: ScoreContext(layer, 0), order)
            for band in (pages, reference)
        )
        # One step of the methods' own rounding: sums in another order may end beside a step.
        if not torch.allclose(found, wanted, rtol=2.0**-11, atol=2 / 4096):
            return f"scores of {type(method).__name__} differ from those in torch"
    return None


def _moves_differ(pages: TritonBandPages, reference: BandPages, blocks: torch.Tensor) -> str | None:
    """Move tokens within the blocks, backwards, so that each source is also a destination."""
    size, heads, _ = pages.shape
    sources = blocks.flip(0)
    destinations = sources[: max(1, len(blocks) // 2)].flip(0)
    rows, kept = len(pages.layers) * heads, len(destinations) * size
    drawn = torch.rand(
        rows, len(blocks) * size, generator=torch.Generator().manual_seed(1)
    ).argsort(1)
    tokens = drawn[:, :kept].sort(1).values.to(pages.device)
    found = []
    for band in (pages, reference):
        _fill(reference, blocks)
        band.move(sources, tokens, destinations)
        found.append((reference.read_keys(blocks), reference.read_values(blocks)))
    if all(torch.equal(*pair) for pair in zip(*found, strict=True)):
        return None
    return "moved tokens differ from those moved in torch"
