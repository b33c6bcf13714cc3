"""Learning where keys and values lie in a page, and reading and writing them there.

Every backend writes its own layout; what it writes must be what we read, and what we write
must be what it would have written, byte by byte.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_path.harness import V2_TRITON
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvcompress.methods import take_tokens
from vllm_kvcompress.worker.layout import RAW_DTYPES, PageLayoutError
from vllm_kvcompress.worker.pages import LayerPages, Packed, TokenMajor, TokenMinor

BLOCKS = 7
LAYERS = 2
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def make_cache(
    layout: KVCacheLayout, shape: tuple[int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The last layer's cache ``[blocks, heads, block_size, 2 * head_dim]`` in a physical layout.

    The allocation holds two layers, as in vLLM, and is filled with one byte.
    """
    block_size, heads, dim = shape
    logical = (LAYERS, BLOCKS, heads, block_size, 2 * dim)
    physical = torch.empty([logical[axis] for axis in layout.stride_order], dtype=dtype)
    physical.view(torch.uint8).fill_(0x11)
    inverse = [layout.stride_order.index(axis) for axis in range(5)]
    return physical.permute(inverse)[-1]


def all_bytes(cache: torch.Tensor) -> torch.Tensor:
    """The whole allocation that a cache is a view of, ``[bytes]``, uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())


def cpu_layer(dtype: torch.dtype, cache_dtype: str, block_size: int, dim: int) -> Any:
    """A layer of the CPU attention backend, as far as writing its cache goes."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type = AttentionType.DECODER
    impl.kv_cache_dtype = cache_dtype
    isa = _get_attn_isa(dtype, block_size, dim, cache_dtype)
    return SimpleNamespace(impl=impl, isa=isa, dtype=dtype, _k_scale_float=0.5, _v_scale_float=0.25)


def triton_layer(dtype: torch.dtype, cache_dtype: str, dim: int) -> Any:
    """A layer of the Triton attention backend, as far as writing its cache goes."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    impl = object.__new__(TritonAttentionImpl)
    impl.attn_type = AttentionType.DECODER
    impl.kv_cache_dtype = cache_dtype
    impl.head_size = dim
    impl.fp8_dtype = torch.float8_e4m3fn
    impl._is_per_token_head_quant = False
    return SimpleNamespace(
        impl=impl,
        dtype=dtype,
        _k_scale=torch.tensor(0.5),
        _v_scale=torch.tensor(0.25),
        _k_scale_float=0.5,
        _v_scale_float=0.25,
    )


def check(
    layer: Any,
    layout: KVCacheLayout,
    shape: tuple[int, int, int],
    cache_dtype: str,
    dtype: torch.dtype,
) -> LayerPages:
    """Learn a layout and hold it against what the backend writes."""
    block_size, heads, dim = shape
    storage = kv_cache_dtype_str_to_dtype(cache_dtype, SimpleNamespace(dtype=dtype))
    cache = make_cache(layout, shape, storage)
    everything = all_bytes(cache)
    before = everything.clone()
    pages = LayerPages(layer, cache, block_size, heads, dim, cache_dtype)
    assert everything.equal(before), "learning touched the cache"

    # What the backend writes is what we read.
    torch.manual_seed(0)
    blocks = torch.tensor([5, 1, 4])
    tokens = len(blocks) * block_size
    written = [
        # Small whole numbers: exact in every type, also after the scale.
        torch.randint(-8, 9, (tokens, heads, dim)).to(dtype)
        for _ in range(2)
    ]
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
    factors = (0.5, 0.25) if cache_dtype.startswith("fp8") else (1, 1)
    layer.impl.do_kv_cache_update(
        layer, written[0] * factors[0], written[1] * factors[1], cache, slots
    )
    read = [part.read(blocks) for part in (pages.keys, pages.values)]
    for raw, tensor in zip(read, written, strict=True):
        assert raw.shape == (heads, tokens, dim)
        assert pages.as_float(raw).equal(tensor.float().transpose(0, 1))
    kept = torch.rand(heads, tokens).argsort()[:, : block_size + 5].sort().values
    for part, raw in zip((pages.keys, pages.values), read, strict=True):
        taken = raw.gather(1, kept.unsqueeze(-1).expand(-1, -1, dim))
        assert part.take(blocks, kept).equal(taken)
        assert take_tokens(raw, kept).equal(taken)

    # What we write is what the backend would have written.
    as_backend = make_cache(layout, shape, storage)
    all_bytes(as_backend).copy_(everything)
    others = torch.tensor([2, 3, 6])
    layer.impl.do_kv_cache_update(
        layer,
        written[0] * factors[0],
        written[1] * factors[1],
        as_backend,
        (others[:, None] * block_size + torch.arange(block_size)).flatten(),
    )
    pages.keys.write(others, read[0])
    pages.values.write(others, read[1])
    assert everything.equal(all_bytes(as_backend))

    # Any bits survive, block order counts, and the rest of the cache is left alone.
    raw_dtype = RAW_DTYPES[cache.element_size()]
    for part, other in ((pages.keys, pages.values), (pages.values, pages.keys)):
        noise = torch.randint(-100, 100, (heads, 2 * block_size, dim)).to(raw_dtype)
        rest = [part.read(others), other.read(torch.arange(BLOCKS))]
        part.write(torch.tensor([4, 0]), noise)
        assert part.read(torch.tensor([4, 0])).equal(noise)
        swapped = noise.unflatten(1, (2, block_size)).flip(1).flatten(1, 2)
        assert part.read(torch.tensor([0, 4])).equal(swapped)
        assert part.read(others).equal(rest[0])
        assert other.read(torch.arange(BLOCKS)).equal(rest[1])
    return pages


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float32, "auto"),
        (torch.bfloat16, "auto"),
        (torch.bfloat16, "fp8"),
        (torch.bfloat16, "fp8_e5m2"),
    ],
    ids=["float32", "bfloat16", "fp8", "fp8_e5m2"],
)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (1, 128), (2, 32)])
def test_cpu_layout(
    dtype: torch.dtype, cache_dtype: str, block_size: int, heads: int, dim: int
) -> None:
    layer = cpu_layer(dtype, cache_dtype, block_size, dim)
    check(layer, KVCacheLayout.LBHNC, (block_size, heads, dim), cache_dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_layout_of_odd_head_sizes(dtype: torch.dtype) -> None:
    """80 is no multiple of 32: another instruction set and another packing."""
    layer = cpu_layer(dtype, "auto", 32, 80)
    assert layer.isa == "vec16"
    check(layer, KVCacheLayout.LBHNC, (32, 3, 80), "auto", dtype)


TRITON_LAYOUTS = [
    KVCacheLayout.LBNHC,
    KVCacheLayout.LBHNC,
    KVCacheLayout.BLNHC,
    KVCacheLayout.BLHNC,
]


@pytest.mark.skipif(not IN_INTERPRETER, reason="run by test_triton_layouts")
@pytest.mark.parametrize("layout", TRITON_LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "fp8")],
    ids=["float32", "bfloat16", "fp8"],
)
@pytest.mark.parametrize(("block_size", "heads", "dim"), [(16, 2, 32), (32, 3, 64)])
def test_in_interpreter(
    layout: KVCacheLayout,
    dtype: torch.dtype,
    cache_dtype: str,
    block_size: int,
    heads: int,
    dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.attention.ops import triton_reshape_and_cache_flash as op

    monkeypatch.setattr(op, "_is_supported_kv_cache_dtype", lambda name: True)
    layer = triton_layer(dtype, cache_dtype, dim)
    pages = check(layer, layout, (block_size, heads, dim), cache_dtype, dtype)
    assert isinstance(pages.keys, TokenMajor)
    assert isinstance(pages.values, TokenMajor)


@pytest.mark.skipif(IN_INTERPRETER, reason="starts the interpreter")
def test_triton_layouts() -> None:
    """The cases of :func:`test_in_interpreter`, in a process with Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_in_interpreter"],
        env=V2_TRITON.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "24 passed" in done.stdout


class Impl:
    """A backend of our own, whose pages hold keys before values, token by token."""

    def __init__(self, order: torch.Tensor | None = None, values: bool = True) -> None:
        self.order = order
        self.values = values

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        block_size = cache.shape[2]
        both = torch.cat([key, value], dim=-1)
        for token, slot in enumerate(slots.tolist()):
            page = cache[slot // block_size, :, slot % block_size]
            half = key.shape[-1]
            page[:, :half] = both[token, :, :half]
            if self.values:
                page[:, half:] = both[token, :, half:]
        if self.order is not None:
            flat = cache[1].flatten()
            cache[1] = flat[self.order].view_as(cache[1])


def learn(impl: Any, cache: torch.Tensor, dim: int = 4) -> LayerPages:
    """Learn the pages of a layer with this ``impl``."""
    layer = SimpleNamespace(impl=impl, dtype=torch.float32)
    return LayerPages(layer, cache, cache.shape[2], cache.shape[1], dim, "auto")


def test_refuses_what_it_cannot_read() -> None:
    cache = torch.zeros(3, 2, 8, 8)
    assert learn(Impl(), cache).shape == (8, 2, 4)
    with pytest.raises(PageLayoutError, match=r"stores 64 elements .* where 128 were written"):
        learn(Impl(values=False), cache)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PageLayoutError, match="not regular"):
        learn(Impl(order=order), cache)
    with pytest.raises(PageLayoutError, match="SimpleNamespace writes its pages inside"):
        learn(SimpleNamespace(), cache)
    # Head-outermost: pages of one layer interleave.
    with pytest.raises(PageLayoutError, match="VLLM_KV_CACHE_LAYOUT"):
        learn(Impl(), torch.zeros(2, 3, 8, 8).transpose(0, 1))


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        # From heads, token pairs, tokens, dimension pairs, dimensions.
        ((0, 1, 2, 3, 4), TokenMajor),
        ((1, 2, 0, 3, 4), TokenMajor),
        ((0, 3, 4, 1, 2), TokenMinor),
        ((0, 1, 3, 4, 2), Packed),
        ((0, 3, 1, 2, 4), Packed),
        ((1, 3, 0, 4, 2), Packed),
    ],
)
def test_packed_orders(axes: tuple[int, ...], kind: type) -> None:
    """Tokens and dimensions split in two and interleaved in every way a backend may choose."""
    heads, block_size, dim = 2, 8, 4
    part = torch.arange(heads * block_size * dim).view(heads, 2, 4, 2, 2).permute(axes).flatten()
    # Page bytes of Impl are [H, N, (key, value), D]; sort them into key and value parts first.
    plain = torch.arange(2 * part.numel()).view(heads, block_size, 2, dim)
    order = torch.cat([plain[:, :, half].flatten()[part] for half in range(2)])
    cache = torch.randn(5, heads, block_size, 2 * dim)
    pages = learn(Impl(order=order), cache)
    assert type(pages.keys) is type(pages.values) is kind

    keys, values = torch.randn(2, 2 * block_size, heads, dim)
    blocks = torch.tensor([3, 1])
    for block, rows in zip(blocks.tolist(), (slice(0, 8), slice(8, 16)), strict=True):
        page = torch.cat([keys[rows], values[rows]], dim=-1).transpose(0, 1).flatten()
        cache[block] = page[order].view_as(cache[block])
    for half, written in ((pages.keys, keys), (pages.values, values)):
        read = half.read(blocks)
        assert pages.as_float(read).equal(written.transpose(0, 1))
        half.write(torch.tensor([0, 4]), read)
    assert cache[[0, 4]].equal(cache[[3, 1]])
