"""Sixteen float32 numbers as one value, read from and written to elements of a cache.

numba knows no vectors, and LLVM finds few of those that conversions of 8 and 16 bits need.
What is here are the operations that kernels use, each some instructions of LLVM, which
spells them out for processors that do not have them.

An array ``like`` tells elements apart by its type, see
:data:`~vllm_kvcompress.worker.cpu.numbers.TAGS`. Vectors of ``float8_e4m3fn`` hold numbers
times 2**-8, so that they are halves whose bits lie alike; what is written is multiplied back.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

from vllm_kvcompress.worker.cpu.numbers import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32

WIDTH = 16
"""Numbers in a vector."""


class Floats(types.Type):
    """The type of a vector."""


floats = Floats("float32x16")
pair_of_floats = types.UniTuple(floats, 2)


def _vector(element: ir.Type, count: int = WIDTH) -> ir.VectorType:
    return ir.VectorType(element, count)


FLOAT, HALF = ir.FloatType(), ir.HalfType()
BITS, SHORTS, BYTES = (_vector(ir.IntType(bits)) for bits in (32, 16, 8))
FLOATS, HALVES = _vector(FLOAT), _vector(HALF)


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, FLOATS)


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """The same number in all places."""
    if isinstance(vector.element, ir.IntType):
        width = vector.element.width
        value = ((int(value) + (1 << (width - 1))) % (1 << width)) - (1 << (width - 1))
    return ir.Constant(vector, [value] * vector.count)


class Code:
    """Writes instructions; constants are numbers."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def do(self, instruction: str, one: Any, other: Any) -> Any:
        """An instruction on a vector and another or a number."""
        if not isinstance(other, ir.Value):
            other = constant(one.type, other)
        return getattr(self.builder, instruction)(one, other)

    def bits(self, value: Any) -> Any:
        """Floats, or halves, as integers."""
        return self.builder.bitcast(value, SHORTS if value.type == HALVES else BITS)

    def floats(self, bits: Any) -> Any:
        """The floats with these bits, of 32 or 16."""
        if bits.type == SHORTS:
            return self.builder.fpext(self.builder.bitcast(bits, HALVES), FLOATS)
        return self.builder.bitcast(bits, FLOATS)

    def call(self, name: str, *args: Any) -> Any:
        """An intrinsic function of LLVM whose type is that of its arguments."""
        kind = args[0].type
        short = {FLOAT: "f32"}.get(kind.element) or f"i{kind.element.width}"
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(kind, [arg.type for arg in args]),
            f"llvm.{name}.v{kind.count}{short}",
        )
        return self.builder.call(function, args)

    def choose(self, flags: Any, one: Any, other: Any) -> Any:
        """``one`` where a flag is set."""
        if not isinstance(one, ir.Value):
            one = constant(other.type, one)
        return self.builder.select(flags, one, other)

    def load(self, address: Any, vector: ir.VectorType) -> Any:
        """A vector from memory."""
        place = self.builder.inttoptr(address, vector.as_pointer())
        loaded = self.builder.load(place)
        loaded.align = 1
        return loaded

    def store(self, address: Any, value: Any) -> None:
        """A vector to memory."""
        place = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, place).align = 1


def _decoded(code: Code, address: Any, tag: Any) -> Any:
    """Sixteen elements."""
    if tag == FLOAT32:
        return code.load(address, FLOATS)
    if tag == BFLOAT16:
        wide = code.builder.zext(code.load(address, SHORTS), BITS)
        return code.floats(code.do("shl", wide, 16))
    if tag == FLOAT16:
        return code.floats(code.load(address, SHORTS))
    if tag == E4M3:
        wide = code.builder.sext(code.load(address, BYTES), SHORTS)
        return code.floats(code.do("and_", code.do("shl", wide, 7), 0xBFFF))
    assert tag == E5M2
    wide = code.builder.zext(code.load(address, BYTES), SHORTS)
    return code.floats(code.do("shl", wide, 8))


def _decoded_pairs(code: Code, address: Any, tag: Any) -> tuple[Any, Any]:
    """Of 32 elements those in even and those in odd places."""
    if tag == FLOAT32:
        both = code.load(address, _vector(FLOAT, 2 * WIDTH))
        return _every_other(code, both, 0), _every_other(code, both, 1)
    if tag in (BFLOAT16, FLOAT16):
        both = code.load(address, BITS)
        if tag == BFLOAT16:
            return code.floats(code.do("shl", both, 16)), code.floats(
                code.do("and_", both, 0xFFFF0000)
            )
        low = code.builder.trunc(both, SHORTS)
        high = code.builder.trunc(code.do("lshr", both, 16), SHORTS)
        return code.floats(low), code.floats(high)
    both = code.load(address, SHORTS)
    low = code.do("shl", both, 8)
    if tag == E4M3:
        one, other = (code.do("and_", code.do("ashr", part, 1), 0xBF80) for part in (low, both))
        return code.floats(one), code.floats(other)
    assert tag == E5M2
    return code.floats(low), code.floats(code.do("and_", both, 0xFF00))


def _every_other(code: Code, both: Any, first: int) -> Any:
    places = ir.Constant(BITS, list(range(first, 2 * WIDTH, 2)))
    return code.builder.shuffle_vector(both, ir.Constant(both.type, ir.Undefined), places)


def _encoded(code: Code, value: Any, tag: Any) -> Any:
    """Sixteen numbers, to the nearest, ties to even."""
    if tag == FLOAT32:
        return value
    if tag == FLOAT16:
        return code.builder.fptrunc(value, HALVES)
    bits = code.bits(value)
    wrong = code.builder.fcmp_unordered("uno", value, value)
    if tag == BFLOAT16:
        odd = code.do("and_", code.do("lshr", bits, 16), 1)
        rounded = code.do("lshr", code.do("add", code.do("add", bits, 0x7FFF), odd), 16)
        return code.builder.trunc(code.choose(wrong, 0x7FC0, rounded), SHORTS)
    assert tag in (E4M3, E5M2)
    fraction, top = (3, 0x7E) if tag == E4M3 else (2, 0x7B)
    # The smallest normal number of both types is 2**-14 here.
    smallest = (127 - 14) << 23
    magnitude = code.do("and_", bits, 0x7FFFFFFF)
    if tag == E5M2:  # where there may be infinities
        magnitude = code.call("umin", magnitude, constant(BITS, 143 << 23))
    power = code.do("and_", code.call("umax", magnitude, constant(BITS, smallest)), 0x7F800000)
    # Added to this, a number keeps no more places than the type has.
    magic = code.do("add", power, (23 - fraction) << 23)
    total = code.builder.fadd(code.floats(magnitude), code.floats(magic))
    steps = code.do("sub", code.bits(total), magic)
    exponent = code.do("lshr", power, 23 - fraction)
    element = code.do("add", code.do("add", steps, exponent), -(smallest >> (23 - fraction)))
    element = code.call("umin", element, constant(BITS, top))
    if tag == E5M2:  # whose infinities and what is no number come through
        element = code.choose(wrong, 0x7F, element)
    sign = code.do("and_", code.do("lshr", bits, 24), 0x80)
    return code.builder.trunc(code.do("or_", element, sign), BYTES)


def _encoded_mean(code: Code, value: Any, tag: Any, source: Any) -> Any:
    """Sixteen means of two elements of a type.

    Of ``float8_e4m3fn`` they are first rounded to halves, which takes nothing away: where the
    sum of two elements has more than eleven places, one is too small to matter.
    """
    if tag != E4M3 or source != E4M3:
        return _encoded(code, value, tag)
    bits = code.bits(code.builder.fptrunc(value, HALVES))
    magnitude = code.do("and_", bits, 0x7FFF)
    odd = code.do("and_", code.do("lshr", magnitude, 7), 1)
    rounded = code.do("lshr", code.do("add", code.do("add", magnitude, 0x3F), odd), 7)
    element = code.call("umin", rounded, constant(SHORTS, 0x7E))
    sign = code.do("and_", code.do("lshr", bits, 8), 0x80)
    return code.builder.trunc(code.do("or_", element, sign), BYTES)


def _encoded_exactly(code: Code, value: Any, tag: Any) -> Any:
    """Sixteen numbers that the type has."""
    if tag == FLOAT32:
        return value
    if tag == BFLOAT16:
        return code.builder.trunc(code.do("lshr", code.bits(value), 16), SHORTS)
    half = code.builder.fptrunc(value, HALVES)
    if tag == FLOAT16:
        return half
    bits = code.bits(half)
    high = code.do("lshr", bits, 8)
    if tag == E4M3:
        magnitude = code.do("and_", code.do("lshr", bits, 7), 0x7F)
        high = code.do("or_", code.do("and_", high, 0x80), magnitude)
    return code.builder.trunc(high, BYTES)


@intrinsic
def load(typingctx: Any, address: Any, like: Any) -> Any:
    """Elements from an address on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _decoded(Code(builder), args[0], signature.args[1].dtype)

    return floats(types.int64, like), codegen


@intrinsic
def load_pairs(typingctx: Any, address: Any, like: Any) -> Any:
    """Of twice as many elements the first and the second of each pair."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = _decoded_pairs(Code(builder), args[0], signature.args[1].dtype)
        return context.make_tuple(builder, signature.return_type, pair)

    return pair_of_floats(types.int64, like), codegen


def _storing(encoded: Any) -> Any:
    @intrinsic
    def storing(typingctx: Any, address: Any, like: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code = Code(builder)
            code.store(args[0], encoded(code, args[2], signature.args[1].dtype))
            return context.get_dummy_value()

        return types.void(types.int64, like, floats), codegen

    return storing


@intrinsic
def store_mean(typingctx: Any, address: Any, like: Any, value: Any, source: Any) -> Any:
    """Write the means of pairs of elements like ``source``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, tags = Code(builder), [signature.args[place].dtype for place in (1, 3)]
        code.store(args[0], _encoded_mean(code, args[2], *tags))
        return context.get_dummy_value()

    return types.void(types.int64, like, floats, source), codegen


store, store_exactly = _storing(_encoded), _storing(_encoded_exactly)


@intrinsic
def splat(typingctx: Any, number: Any) -> Any:
    """One number in all places."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = ir.Constant(FLOATS, ir.Undefined)
        one = builder.insert_element(one, args[0], ir.IntType(32)(0))
        return builder.shuffle_vector(one, one, constant(BITS, 0))

    return floats(types.float32), codegen


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum of the numbers, by halves."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, width = args[0], WIDTH
        while width > 1:
            width //= 2
            parts = [_part(builder, left, first, width) for first in (0, width)]
            left = builder.fadd(*parts)
        return builder.extract_element(left, ir.IntType(32)(0))

    return types.float32(floats), codegen


def _part(builder: Any, value: Any, first: int, count: int) -> Any:
    places = ir.Constant(_vector(ir.IntType(32), count), list(range(first, first + count)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)


def _lanewise(count: int, write: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return write(Code(builder), *args)

    if count == 1:

        @intrinsic
        def unary(typingctx: Any, one: Any) -> Any:
            return floats(floats), codegen

        return unary
    if count == 2:

        @intrinsic
        def binary(typingctx: Any, one: Any, other: Any) -> Any:
            return floats(floats, floats), codegen

        return binary

    @intrinsic
    def ternary(typingctx: Any, one: Any, other: Any, third: Any) -> Any:
        return floats(floats, floats, floats), codegen

    return ternary


def _largest(code: Code, one: Any, other: Any) -> Any:
    return code.choose(code.builder.fcmp_ordered(">", one, other), one, other)


add, subtract, multiply, divide = (
    _lanewise(2, lambda code, one, other, name=name: code.do(name, one, other))
    for name in ("fadd", "fsub", "fmul", "fdiv")
)
largest = _lanewise(2, _largest)
square_root, nearest = (
    _lanewise(1, lambda code, one, name=name: code.call(name, one)) for name in ("sqrt", "rint")
)
fma = _lanewise(3, lambda code, one, other, third: code.call("fma", one, other, third))
"""``one * other + third``, rounded once."""


def _overload(sign: Any, function: Any) -> None:
    @overload(sign)
    def typed(one: Any, other: Any) -> Any:
        def vectors(one: Any, other: Any) -> Any:
            return function(one, other)

        return vectors if isinstance(one, Floats) and isinstance(other, Floats) else None


for _sign, _function in {
    operator.add: add,
    operator.sub: subtract,
    operator.mul: multiply,
    operator.truediv: divide,
}.items():
    _overload(_sign, _function)


@intrinsic
def sine_and_cosine(typingctx: Any, angle: Any) -> Any:
    """Sines and cosines of angles up to some 100,000 radians, within 2**-22 or so."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (angle,) = Code(builder), args
        quarters = code.call("rint", code.do("fmul", angle, 0.6366197723675814))
        left = angle
        # pi / 2 in three parts.
        for part in (1.5707963705062866, -4.371138828673793e-08, -1.7151245100059555e-15):
            left = code.call("fma", quarters, constant(FLOATS, -part), left)
        square = code.do("fmul", left, left)
        sine = _polynomial(code, square, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
        sine = code.call("fma", code.do("fmul", sine, square), left, left)
        cosine = _polynomial(
            code, square, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
        )
        half = code.call("fma", square, constant(FLOATS, -0.5), constant(FLOATS, 1.0))
        cosine = code.call("fma", code.do("fmul", square, square), cosine, half)
        turn = builder.fptosi(quarters, BITS)
        odd = builder.trunc(turn, _vector(ir.IntType(1)))
        found = []
        for one, other, further in ((sine, cosine, 0), (cosine, sine, 1)):
            chosen = code.bits(code.choose(odd, other, one))
            sign = code.do("shl", code.do("and_", code.do("add", turn, further), 2), 30)
            found.append(code.floats(code.do("xor", chosen, sign)))
        return context.make_tuple(builder, signature.return_type, found)

    return pair_of_floats(floats), codegen


def _polynomial(code: Code, at: Any, factors: Sequence[float]) -> Any:
    found = constant(FLOATS, factors[0])
    for factor in factors[1:]:
        found = code.call("fma", found, at, constant(FLOATS, factor))
    return found
