"""Cached elements as float32 numbers and back, for every type of cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba.extending import overload

from vllm_kvcompress.worker.cpu.intrinsics import add, compiled, shift_left, shift_right


class Format(NamedTuple):
    """How raw elements lie in the bits of float32 numbers.

    Attributes
    ----------
    sign : int
        Bits of the magnitude of an element; its sign is the one above.
    shift : int
        Bits by which the magnitude is moved up.
    scale, inverse : float
        What the float32 number with these bits has to be multiplied by, and 1 / scale.
    top : int
        Largest magnitude that is written: infinity where there is one, but for fp8.
    nan : int
        Magnitude of no number.
    """

    sign: np.int32
    shift: np.int32
    scale: np.float32
    inverse: np.float32
    top: np.int32
    nan: np.int32

    @classmethod
    def of(cls, bits: int, shift: int, exponent: int, top: int, nan: int) -> Format:
        """The format of elements of so many bits, with a scale of ``2 ** exponent``."""
        scale = np.float32(2.0**exponent)
        whole = np.array([bits - 1, shift, top, nan], np.int32)
        return cls(whole[0], whole[1], scale, np.float32(1 / scale), whole[2], whole[3])


FORMATS = {
    torch.float32: Format.of(32, 0, 0, 0x7F800000, 0x7FC00000),
    torch.bfloat16: Format.of(16, 16, 0, 0x7F80, 0x7FC0),
    torch.float16: Format.of(16, 13, 112, 0x7C00, 0x7E00),
    torch.float8_e4m3fn: Format.of(8, 20, 120, 0x7E, 0x7F),
    torch.float8_e5m2: Format.of(8, 21, 112, 0x7B, 0x7F),
}


def number(element: Any, format: Format) -> Any:
    """A raw element as a float32 number; a float32 number as it is."""


@overload(number, inline="always")
def _typed_number(element: Any, format: Any) -> Any:
    if isinstance(element, numba.types.Float):

        def as_it_is(element: Any, format: Any) -> Any:
            return element

        return as_it_is

    def from_bits(element: Any, format: Any) -> Any:
        whole = np.int32(element)
        magnitude = np.int32(shift_left(1, format.sign) - 1)
        sign = shift_left(shift_right(whole, format.sign), 31)
        bits = np.int32(shift_left(whole & magnitude, format.shift) | sign)
        return bits.view(np.float32) * format.scale

    return from_bits


@compiled
def decode(raw: np.ndarray, format: Format, out: np.ndarray) -> None:
    for index in range(out.shape[0]):
        out[index] = number(raw[index], format)


@compiled
def encode(numbers: np.ndarray, format: Format, out: np.ndarray) -> None:
    """Float32 numbers as raw elements: to the nearest, ties to even."""
    odd = np.int32(1 if format.shift else 0)
    half = np.int32((1 << (format.shift - 1)) - 1 if format.shift else 0)
    for index in range(numbers.shape[0]):
        plain = numbers[index]
        bits = np.float32(plain * format.inverse).view(np.int32)
        magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
        rounded = add(add(magnitude, half), shift_right(magnitude, format.shift) & odd)
        code = min(shift_right(rounded, format.shift), format.top)
        code = format.nan if plain != plain else code
        out[index] = np.int32(code | shift_left(shift_right(bits, 31), format.sign))
