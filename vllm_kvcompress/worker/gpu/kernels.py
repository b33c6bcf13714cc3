"""Triton kernels over the pages of all layers of a band, at once.

What all kernels take:

``addresses``
    ``[2, layers]``, int64: where the first page of each layer is, of keys (part 0) and of
    values (part 1).
``starts``
    ``[2, HEADS, SIZE]``, int64: bytes from there to the first element of each token's run.
``blocks``
    ``[n]``, int64: block ids, oldest first.
``page``
    Bytes from one page to the next.
``HEADS``, ``SIZE``, ``DIM``
    KV heads of a layer, tokens of a block, elements of a run. ``WIDE`` is the power of two
    that has room for a run, ``TILE`` how many tokens a program works on at once.

A row is a head of a layer: ``layer * HEADS + head``. Addresses are counted in bytes and become
pointers last, so that the same arithmetic serves elements and the words that moves are made
in. Nothing that changes from request to request is specialized on: a request must not wait for
a compiler. Elements are decoded as torch does; fp8 is decoded from its bits, which
needs no support by the GPU.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

SLICES = ["blocks"]
"""Tensors that may be parts of others, and begin anywhere in memory."""

MOVED = ["first", "rows", "kept", "layers"]


@triton.jit
def _addresses_of(
    addresses, starts, blocks, row, tokens, valid, layers, part, page,
    HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Where the runs of some tokens of a row begin, ``[tokens]``, int64."""
    cache = tl.load(addresses + part * layers + row // HEADS)
    block = tl.load(blocks + tokens // SIZE, mask=valid, other=0)
    start = tl.load(starts + (part * HEADS + row % HEADS) * SIZE + tokens % SIZE)
    return cache + block * page + start


@triton.jit
def _numbers_at(
    address, valid, DIM: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """Runs as float32 numbers ``[tokens, WIDE]``, zero where there is no token or element."""
    dims = tl.arange(0, WIDE)
    mask = valid[:, None] & (dims < DIM)[None, :]
    pointers = address.to(tl.pointer_type(TYPE))[:, None] + dims[None, :]
    elements = tl.load(pointers, mask=mask, other=0)
    if FP8 == "e4m3":
        # A half with the same digits is 2**8 times too small, and no subnormal any more.
        bits = elements.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        numbers = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), numbers)
    if FP8 == "e5m2":
        half = elements.to(tl.uint16) << 8
        return half.to(tl.float16, bitcast=True).to(tl.float32)
    return elements.to(tl.float32)


@triton.jit(do_not_specialize=["count", "layers", "part"], do_not_specialize_on_alignment=SLICES)
def squared_norms(
    addresses, starts, blocks, out, count, layers, part, page,
    HEADS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, TYPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Squared L2 norms of keys or values: ``out``, ``[rows, count]``, float32.

    Programs: tiles of tokens, rows.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = tokens < count
    address = _addresses_of(
        addresses, starts, blocks, row, tokens, valid, layers, part, page, HEADS, SIZE
    )
    numbers = _numbers_at(address, valid, DIM, WIDE, TYPE, FP8)
    tl.store(out + row * count + tokens, tl.sum(numbers * numbers, axis=1), mask=valid)


@triton.jit(do_not_specialize=["count", "layers"], do_not_specialize_on_alignment=SLICES)
def add_unit_keys(
    addresses, starts, blocks, inverse, sums, count, layers, page,
    HEADS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, TYPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Inverse lengths of keys, and sums of keys at unit length.

    ``inverse`` is ``[rows, count]``, ``sums`` ``[rows, programs, DIM]``, both float32: one sum
    a program, since adding to memory together would add in another order each time. Programs:
    ``TILES`` tiles of tokens each, rows.
    """
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((WIDE,), dtype=tl.float32)
    for tile in range(TILES):
        tokens = (tl.program_id(0) * TILES + tile) * TILE + tl.arange(0, TILE)
        valid = tokens < count
        address = _addresses_of(
            addresses, starts, blocks, row, tokens, valid, layers, 0, page, HEADS, SIZE
        )
        numbers = _numbers_at(address, valid, DIM, WIDE, TYPE, FP8)
        length = tl.sqrt(tl.sum(numbers * numbers, axis=1))
        own = 1.0 / tl.maximum(length, 1e-12)
        tl.store(inverse + row * count + tokens, own, mask=valid)
        total += tl.sum(numbers * own[:, None], axis=0)
    dims = tl.arange(0, WIDE)
    place = (row * tl.num_programs(0) + tl.program_id(0)) * DIM + dims
    tl.store(sums + place, total, mask=dims < DIM)


@triton.jit(do_not_specialize=["count", "layers"], do_not_specialize_on_alignment=SLICES)
def cosines(
    addresses, starts, blocks, means, out, count, layers, page,
    HEADS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, TYPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Inverse lengths of keys to cosines: ``out``, ``[rows, count]``, float32, in place.

    ``means`` are directions ``[rows, DIM]`` of unit length, float32. Programs: tiles of tokens,
    rows.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = tokens < count
    address = _addresses_of(
        addresses, starts, blocks, row, tokens, valid, layers, 0, page, HEADS, SIZE
    )
    numbers = _numbers_at(address, valid, DIM, WIDE, TYPE, FP8)
    dims = tl.arange(0, WIDE)
    mean = tl.load(means + row * DIM + dims, mask=dims < DIM, other=0.0)
    along = tl.sum(numbers * mean[None, :], axis=1)
    place = out + row * count + tokens
    tl.store(place, along * tl.load(place, mask=valid, other=0.0), mask=valid)


@triton.jit(do_not_specialize=MOVED, do_not_specialize_on_alignment=[*SLICES, "tokens"])
def gather(
    addresses, starts, blocks, tokens, room, first, rows, kept, layers, page,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Copy chosen tokens of ``rows`` rows from ``first`` on to ``room``.

    ``tokens`` is ``[all rows, kept]``, int64, indices into the blocks' tokens; ``room`` is
    ``[2, rows, kept, WORDS]`` of words of ``TYPE``, ``WORDS`` to a run. Programs: tiles of kept
    tokens, rows, keys and values.
    """
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = places < kept
    own = tl.load(tokens + (first + row) * kept + places, mask=valid, other=0)
    address = _addresses_of(
        addresses, starts, blocks, first + row, own, valid, layers, part, page, HEADS, SIZE
    )
    words = tl.arange(0, WIDE)[None, :]
    mask = valid[:, None] & (words < WORDS)
    found = tl.load(address.to(tl.pointer_type(TYPE))[:, None] + words, mask=mask, other=0)
    held = ((part * rows + row) * kept + places) * WORDS
    tl.store(room + held[:, None] + words, found, mask=mask)


@triton.jit(do_not_specialize=MOVED, do_not_specialize_on_alignment=SLICES)
def scatter(
    addresses, starts, blocks, room, first, rows, kept, layers, page,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Fill blocks with what :func:`gather` left in ``room``; arguments and programs as there."""
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = places < kept
    address = _addresses_of(
        addresses, starts, blocks, first + row, places, valid, layers, part, page, HEADS, SIZE
    )
    words = tl.arange(0, WIDE)[None, :]
    mask = valid[:, None] & (words < WORDS)
    held = ((part * rows + row) * kept + places) * WORDS
    found = tl.load(room + held[:, None] + words, mask=mask, other=0)
    tl.store(address.to(tl.pointer_type(TYPE))[:, None] + words, found, mask=mask)
