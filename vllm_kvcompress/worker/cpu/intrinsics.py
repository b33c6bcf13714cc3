"""What numba lacks for moving pages, and the one place that imports it first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import llvmlite.binding.ffi
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic


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


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@compiled
def elements_at(address: int, like: np.ndarray) -> np.ndarray:
    """All memory from an address on, as elements of ``like``'s type."""
    return numba.carray(_pointer(address), (1 << 62,), dtype=like.dtype)


def _in_32_bits(instruction: str) -> Any:
    """Arithmetic of int32 that stays int32: numba's own makes 64 bits of it, half as fast."""

    @intrinsic
    def operation(typingctx: Any, one: Any, other: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args)

        return types.int32(types.int32, types.int32), codegen

    return operation


add, shift_left, shift_right = map(_in_32_bits, ("add", "shl", "ashr"))


@intrinsic
def copy(typingctx: Any, source: Any, start: Any, target: Any, at: Any, count: Any) -> Any:
    """``target[at : at + count] = source[start : start + count]``, without looking for overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = _data(context, builder, signature, args)
        size = signature.args[0].dtype.bitwidth // 8
        places = builder.gep(arrays[1], [args[3]]), builder.gep(arrays[0], [args[1]])
        cgutils.raw_memcpy(builder, *places, args[4], size)
        return context.get_dummy_value()

    return types.void(source, start, target, at, count), codegen


@intrinsic
def compress(typingctx: Any, source: Any, start: Any, target: Any, at: Any, mask: Any) -> Any:
    """Copy those of ``LANES`` elements whose bit is set in ``mask``, one beside the other.

    Elements of ``target`` up to ``at + LANES`` are overwritten with no matter what. One
    instruction where the processor has it, spelled out by LLVM where not.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = _data(context, builder, signature, args)
        width = signature.args[0].dtype.bitwidth
        # Vectors wider than a register are taken apart badly: squeeze half by half.
        lanes = min(LANES, 512 // width)
        vector, bits = ir.VectorType(ir.IntType(width), lanes), ir.IntType(lanes)
        flags = ir.VectorType(ir.IntType(1), lanes)
        squeeze = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector, flags, vector]),
            f"llvm.experimental.vector.compress.v{lanes}i{width}",
        )
        count = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(bits, [bits]), f"llvm.ctpop.i{lanes}"
        )
        at = args[3]
        for first in range(0, LANES, lanes):
            place = builder.gep(arrays[0], [builder.add(args[1], args[1].type(first))])
            loaded = builder.load(builder.bitcast(place, vector.as_pointer()))
            loaded.align = width // 8
            own = builder.trunc(builder.lshr(args[4], args[4].type(first)), bits)
            chosen = [loaded, builder.bitcast(own, flags), ir.Constant(vector, ir.Undefined)]
            place = builder.bitcast(builder.gep(arrays[1], [at]), vector.as_pointer())
            builder.store(builder.call(squeeze, chosen), place).align = width // 8
            at = builder.add(at, builder.zext(builder.call(count, [own]), at.type))
        return context.get_dummy_value()

    return types.void(source, start, target, at, types.int64), codegen


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        fetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number]),
            "llvm.prefetch.p0",
        )
        place = builder.inttoptr(args[0], cgutils.voidptr_t)
        builder.call(fetch, [place, *(ir.Constant(number, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@compiled
def fetch(address: int, size: int) -> None:
    """Ask for so many bytes from an address on: blocks lie anywhere in memory."""
    for line in range(0, size, LINE):
        _prefetch(address + line)


def _data(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Pointers to the elements of an intrinsic's source and target."""
    places = (0, 2)
    return [
        context.make_array(signature.args[place])(context, builder, args[place]).data
        for place in places
    ]
