"""Where keys and values lie inside a page, learned from the backend.

The interior of a page differs by attention backend and instruction set (token-major,
transposed, packed in pairs), so it is not written down anywhere here: it is learned at
start-up from where the layer's own cache update puts known numbers.
"""

from __future__ import annotations

from typing import Any

import torch

RAW_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integer types in which elements are moved, by element size: bits stay as they are."""

FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class PageLayoutError(RuntimeError):
    """The backend's page layout is not one we can read."""


def learn_offsets(
    layer: Any, cache: torch.Tensor, element: torch.dtype, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset of every key and value element in its page, in elements, ``[N, H, D]`` each.

    Every element gets a number of its own, written digit by digit: a digit must be exact
    in the cache's type.
    """
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise PageLayoutError(
            f"kvcompress: {type(layer.impl).__name__} writes its pages inside of attention; "
            "such a backend is not supported, choose another with --attention-backend."
        )
    block_size, heads, dim = shape
    base = 8 if element in FP8_DTYPES.values() else 64
    count = 2 * block_size * heads * dim
    interior = cache.stride()[1:]
    size = 1 + sum((n - 1) * step for n, step in zip(cache.shape[1:], interior, strict=True))
    if size > cache.stride(0):
        raise PageLayoutError(
            "kvcompress: pages of this KV cache layout interleave in memory; choose another "
            "one with VLLM_KV_CACHE_LAYOUT, for example LBNHC."
        )
    scratch = torch.empty_strided(
        (2, *cache.shape[1:]), (size, *interior), dtype=cache.dtype, device=cache.device
    )
    page = torch.as_strided(scratch, (2, size), (size, 1))
    slots = torch.arange(block_size, 2 * block_size, dtype=torch.int64, device=cache.device)
    numbers = torch.arange(count, device=cache.device).view(2, block_size, heads, dim)
    model_dtype = layer.dtype if isinstance(getattr(layer, "dtype", None), torch.dtype) else None
    model_dtype = model_dtype or (cache.dtype if cache.dtype.is_floating_point else torch.bfloat16)
    scales = (getattr(layer, "_k_scale_float", 1.0), getattr(layer, "_v_scale_float", 1.0))
    quantized = element in FP8_DTYPES.values()

    found = torch.zeros(size, dtype=torch.int64, device=cache.device)
    missing = torch.zeros(size, dtype=torch.bool, device=cache.device)
    place = 1
    while place < count:
        digits = numbers // place % base
        written = [(digits[i] * (scales[i] if quantized else 1)).to(model_dtype) for i in range(2)]
        page.view(RAW_DTYPES[cache.element_size()]).fill_(-1 if cache.element_size() > 1 else 255)
        layer.impl.do_kv_cache_update(layer, written[0], written[1], scratch, slots)
        # The filler is NaN in every floating type in use, or at least no digit.
        digit = page[1].view(element).float()
        missing |= ~((digit >= 0) & (digit < base))
        found += digit.nan_to_num(0).long() * place
        place *= base
    offsets = torch.full((count,), -1, dtype=torch.int64, device=cache.device)
    where = torch.nonzero(~missing).flatten()
    if len(where) != count:
        raise PageLayoutError(
            f"kvcompress: {type(layer.impl).__name__} stores {len(where)} elements in a page "
            f"where {count} were written; its page layout is not supported."
        )
    offsets[found[where].clamp(0, count - 1)] = where
    if bool((offsets < 0).any()):
        raise PageLayoutError(
            f"kvcompress: the page layout of {type(layer.impl).__name__} could not be learned."
        )
    keys, values = offsets.view(2, block_size, heads, dim).cpu()
    return keys, values
