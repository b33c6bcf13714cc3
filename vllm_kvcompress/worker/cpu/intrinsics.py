"""What numba lacks for moving pages, and the one place that imports it first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import llvmlite.binding.ffi
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_kvcompress.worker.cpu.stale import forget_stale_kernels


def _hide_from_vllm() -> None:
    """Let vLLM start another engine in a process that has imported numba.

    Target: ``llvmlite.binding.ffi.lib``. Why: vLLM's CPU platform looks at the ``__dict__``
    of every object in every module when an engine starts
    (``triton_utils.dispatcher._rebind_kernels``), and this one answers with a function for
    any name, so that the second engine of a process fails. Upstream plan: ``patches/``
    proposes that vLLM looks at dictionaries only.
    """
    wrapper = type(llvmlite.binding.ffi.lib)
    original = wrapper.__getattr__

    def without_special_names(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    wrapper.__getattr__ = without_special_names


_hide_from_vllm()
forget_stale_kernels(Path(__file__).parent)


def compiled(
    function: Callable[..., Any] | None = None, *, fastmath: Iterable[str] | bool = False
) -> Any:
    """Compile a kernel when it is first called, and keep the code on disk where possible."""
    if function is None:
        return lambda inner: compiled(inner, fastmath=fastmath)
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep compiled code
        return numba.njit(**options)(function)


LINE = 64
"""Bytes of a cache line, or half of one."""

LANES = 32
"""Tokens that :func:`compress` squeezes at once; block sizes are multiples of it."""


@compiled
def address_of(array: np.ndarray) -> Any:
    """Where an array begins; numba's own has no sign, and mixed with others makes floats."""
    return np.int64(array.ctypes.data)


@intrinsic
def _call_memcpy(typingctx: Any, source: Any, target: Any, size: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = [builder.inttoptr(args[place], cgutils.voidptr_t) for place in (1, 0)]
        cgutils.raw_memcpy(builder, *places, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def copy_line(typingctx: Any, source: Any, target: Any) -> Any:
    """Copy ``LINE`` bytes."""
    return _copying(LINE)


@intrinsic
def copy_half_line(typingctx: Any, source: Any, target: Any) -> Any:
    """Copy half as many."""
    return _copying(LINE // 2)


def _copying(size: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), size).as_pointer()
        read = builder.load(builder.inttoptr(args[0], vector))
        read.align = 1
        builder.store(read, builder.inttoptr(args[1], vector)).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@compiled
def copy(source: int, target: int, size: int) -> None:
    """Copy bytes from one address to another that is not near it."""
    if size % (LINE // 2):
        _call_memcpy(source, target, size)
        return
    whole = size // LINE * LINE
    for at in range(0, whole, LINE):
        copy_line(source + at, target + at)
    if whole < size:
        copy_half_line(source + whole, target + whole)


@intrinsic
def compress(typingctx: Any, source: Any, target: Any, mask: Any, like: Any) -> Any:
    """Copy those of ``LANES`` elements whose bit is set in ``mask``, one beside the other.

    As many elements of the target are overwritten with no matter what. One instruction where
    the processor has it, spelled out by LLVM where not.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width = signature.args[3].dtype.bitwidth
        # Vectors wider than a register are taken apart badly: squeeze half by half.
        lanes = min(LANES, 512 // width)
        vector, bits = ir.VectorType(ir.IntType(width), lanes), ir.IntType(lanes)
        flags = ir.VectorType(ir.IntType(1), lanes)
        squeeze = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector, flags, vector]),
            f"llvm.experimental.vector.compress.v{lanes}i{width}",
        )
        source, target, mask, _ = args
        for first in range(0, LANES, lanes):
            place = builder.add(source, source.type(first * width // 8))
            loaded = builder.load(builder.inttoptr(place, vector.as_pointer()))
            loaded.align = 1
            own = builder.trunc(builder.lshr(mask, mask.type(first)), bits)
            chosen = [loaded, builder.bitcast(own, flags), ir.Constant(vector, ir.Undefined)]
            place = builder.inttoptr(target, vector.as_pointer())
            builder.store(builder.call(squeeze, chosen), place).align = 1
            count = builder.zext(builder.ctpop(own), target.type)
            target = builder.add(target, builder.mul(count, target.type(width // 8)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, like), codegen


@intrinsic
def ones(typingctx: Any, mask: Any) -> Any:
    """How many bits are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen


@intrinsic
def lowest(typingctx: Any, mask: Any) -> Any:
    """The place of the lowest bit that is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.int64(types.int64), codegen


def _comparing(sign: str) -> Any:
    @intrinsic
    def comparing(typingctx: Any, address: Any, limit: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = ir.VectorType(ir.IntType(32), LANES)
            loaded = builder.load(builder.inttoptr(args[0], vector.as_pointer()))
            loaded.align = 1
            one = ir.Constant(vector, ir.Undefined)
            one = builder.insert_element(one, args[1], ir.IntType(32)(0))
            same = builder.shuffle_vector(one, one, ir.Constant(vector, [0] * LANES))
            flags = builder.icmp_signed(sign, loaded, same)
            return builder.zext(builder.bitcast(flags, ir.IntType(LANES)), ir.IntType(64))

        return types.int64(types.int64, types.int32), codegen

    return comparing


above, equal = _comparing(">"), _comparing("==")
"""Bits of those of ``LANES`` int32 numbers from an address on that are above, or equal."""


def _prefetch(builder: Any, address: Any, offset: int) -> None:
    number = ir.IntType(32)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number]),
        "llvm.prefetch.p0",
    )
    place = builder.inttoptr(builder.add(address, address.type(offset)), cgutils.voidptr_t)
    builder.call(function, [place, *(ir.Constant(number, value) for value in (0, 3, 1))])


@intrinsic
def fetch(typingctx: Any, address: Any, like: Any) -> Any:
    """Ask for ``LANES`` elements from an address on: blocks lie anywhere in memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for line in range(0, LANES * signature.args[1].dtype.bitwidth // 8, LINE):
            _prefetch(builder, args[0], line)
        return context.get_dummy_value()

    return types.void(types.int64, like), codegen


@intrinsic
def _fetch_line(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0], 0)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@compiled
def fetch_bytes(address: int, size: int) -> None:
    """Ask for so many bytes from an address on."""
    at = address
    while at < address + size:
        _fetch_line(at)
        at += LINE
