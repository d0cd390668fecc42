"""Number formats of PTX in NumPy: float32 and narrower floats, each operation rounded once, and integers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]
"""Content of a register: unsigned integers [threads], bool for predicates."""


def exact_fma(x: NDArray[Any], y: NDArray[Any], z: NDArray[Any]) -> NDArray[np.float64]:
    """x y + z of float32 or narrower values, as float64 that rounds to narrower formats as the exact value would.

    The product is exact in float64. The sum is rounded to odd, which makes a second rounding to at least two bits less
    harmless (Boldo & Melquiond 2008, theorem 1).
    """
    product = x.astype(np.float64) * y
    total = product + z
    # The error of the sum is itself a float64 (Knuth's TwoSum).
    shadow = total - product
    error = (product - (total - shadow)) + (z - shadow)
    return _to_odd(total, error)


def _to_odd(rounded: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.float64]:
    """`rounded` + `error` rounded to odd, where `rounded` is that sum rounded to nearest."""
    bits = rounded.view(np.int64)
    inexact = np.isfinite(rounded) & (error != 0) & ~np.isnan(error) & ((bits & 1) == 0)
    step = np.where((error > 0) == (rounded > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(np.float64)


def _bfloat16_bits(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Convert float64 to bfloat16 in one rounding to nearest, ties to even."""
    single = values.astype(np.float32)
    error = values - single
    # To float32, rounded to odd, then to bfloat16 by adding a half less an ulp of the last bit kept.
    bits = single.view(np.uint32).astype(np.int64)
    away = (error > 0) == (single > 0)
    inexact = np.isfinite(single) & (error != 0) & ((bits & 1) == 0)
    bits = np.where(inexact, bits + np.where(away, 1, -1), bits)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _float32_bits(values: NDArray[np.float64]) -> NDArray[np.uint32]:
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), values.astype(np.float32).view(np.uint32))


def _float16_bits(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))


def _float32_values(bits: Bits) -> NDArray[np.float64]:
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _float16_values(bits: Bits) -> NDArray[np.float64]:
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def _bfloat16_values(bits: Bits) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Float:
    """A floating-point type; a packed one has two values in a register.

    Attributes:
        bits: bits of one value.
        lanes: values in a register.
        values: conversion of bits to float64, exact.
        encode: conversion of float64 to bits, in one rounding to nearest, ties to even.
    """

    bits: int
    lanes: int
    values: Callable[[Bits], NDArray[np.float64]]
    encode: Callable[[NDArray[np.float64]], Bits]

    def unpack(self, register: Bits) -> NDArray[np.float64]:
        """Convert registers [N] to float64 [lanes, N], low half first."""
        if self.lanes == 1:
            return self.values(register)[None]
        whole = register.astype(np.uint64)
        mask = np.uint64((1 << self.bits) - 1)
        return np.stack([self.values((whole >> np.uint64(self.bits * lane)) & mask) for lane in range(self.lanes)])

    def pack(self, values: NDArray[np.float64]) -> Bits:
        """Convert float64 [lanes, N] to registers [N]."""
        parts = [self.encode(lane) for lane in values]
        if self.lanes == 1:
            return parts[0]
        low, high = (part.astype(np.uint64) for part in parts)
        return (low | (high << np.uint64(self.bits))).astype(unsigned(2 * self.bits))


FLOATS = {
    "f32": Float(32, 1, _float32_values, _float32_bits),
    "f32x2": Float(32, 2, _float32_values, _float32_bits),
    "f16": Float(16, 1, _float16_values, _float16_bits),
    "f16x2": Float(16, 2, _float16_values, _float16_bits),
    "bf16": Float(16, 1, _bfloat16_values, _bfloat16_bits),
    "bf16x2": Float(16, 2, _bfloat16_values, _bfloat16_bits),
}


def flush(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace subnormal float32 numbers by zero of their sign (PTX: .ftz)."""
    return np.where(np.abs(values) < 2.0**-126, np.copysign(0.0, values), values)


def unsigned(bits: int) -> Any:
    """NumPy type of unsigned integers with this number of bits."""
    return {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]


def signed(bits: int) -> Any:
    """NumPy type of signed integers with this number of bits."""
    return {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}[bits]


def bits_of(kind: str) -> int:
    """Number of bits in a register of a type."""
    if kind in FLOATS:
        return FLOATS[kind].bits * FLOATS[kind].lanes
    if kind == "pred":
        return 1
    return int(kind[1:])


def integers_of(register: Bits, kind: str) -> NDArray[Any]:
    """Convert a register to numbers of a signed, unsigned or untyped integer type."""
    numbers = register.astype(unsigned(bits_of(kind)))
    return numbers.view(signed(bits_of(kind))) if kind[0] == "s" else numbers


UNTYPED = ("b8", "b16", "b32", "b64")
INTEGERS = tuple(f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64))
TYPES = (*UNTYPED, *INTEGERS, *FLOATS, "pred")
"""Types by their names in PTX."""
