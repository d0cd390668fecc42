"""Logic, shifts and arithmetic of integers."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.numbers import INTEGERS, UNTYPED, bits_of, integers_of, signed, unsigned
from tests.kernels.ptx.program import Constant, Instruction
from tests.kernels.ptx.table import instruction_named

LOGIC: dict[str, Callable[..., Any]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
}


@instruction_named(*LOGIC, types=["pred", *UNTYPED])
def _logic(machine: Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    bits = bits_of(instruction.type)
    values = [machine.read(source, bits).astype(bool if bits == 1 else unsigned(bits)) for source in sources]
    machine.write(destination, LOGIC[instruction.name](*values))


@instruction_named("lop3", types=["b32"])
def _three_way_logic(machine: Machine, instruction: Instruction) -> None:
    destination, *sources, table = instruction.operands
    a, b, c = (machine.read(source, 32).astype(np.uint32) for source in sources)
    if not isinstance(table, Constant):
        raise machine.error("table that is not a constant")
    result = np.zeros(machine.threads, np.uint32)
    for row in range(8):
        if table.bits >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    machine.write(destination, result)


@instruction_named("shl", "shr", types=[*UNTYPED, *INTEGERS])
def _shift(machine: Machine, instruction: Instruction) -> None:
    destination, source, amount = instruction.operands
    bits = bits_of(instruction.type)
    values = integers_of(machine.read(source, bits), instruction.type)
    distance = machine.read(amount, 32).astype(np.uint32)
    # PTX clamps the distance to the width; NumPy leaves it undefined beyond.
    within = np.minimum(distance, bits - 1).astype(values.dtype)
    shifted = values << within if instruction.name == "shl" else values >> within
    if not (instruction.name == "shr" and instruction.type[0] == "s"):
        shifted = np.where(distance >= bits, 0, shifted)
    machine.write(destination, shifted.astype(values.dtype).view(unsigned(bits)))


@instruction_named("shf", modifiers=["l", "r", "wrap", "clamp"], types=["b32"])
def _funnel_shift(machine: Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    low, high, amount = (machine.read(source, 32).astype(np.uint64) for source in sources)
    distance = amount & np.uint64(31) if "wrap" in instruction.modifiers else np.minimum(amount, np.uint64(32))
    both = (high << np.uint64(32)) | low
    shifted = (both << distance) >> np.uint64(32) if instruction.modifiers[0] == "l" else both >> distance
    machine.write(destination, shifted.astype(np.uint32))


@instruction_named("bfe", types=["u32", "s32", "u64", "s64"])
def _extract_bits(machine: Machine, instruction: Instruction) -> None:
    destination, source, start, length = instruction.operands
    if not isinstance(start, Constant) or not isinstance(length, Constant):
        raise machine.error("field that is not a constant")
    bits = bits_of(instruction.type)
    if length.bits == 0 or start.bits + length.bits > bits:
        raise machine.error("field beyond the register")
    values = machine.read(source, bits).astype(unsigned(bits))
    # Shift to the top of the register and down again, which extends the sign of signed types.
    top = integers_of(values << values.dtype.type(bits - start.bits - length.bits), instruction.type)
    machine.write(destination, (top >> top.dtype.type(bits - length.bits)).view(unsigned(bits)))


@instruction_named("prmt", types=["b32"])
def _permute_bytes(machine: Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    low, high, selector = (machine.read(source, 32).astype(np.uint64) for source in sources)
    both = (high << np.uint64(32)) | low
    result = np.zeros(machine.threads, np.uint64)
    for index in range(4):
        choice = (selector >> np.uint64(4 * index)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result |= np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * index)
    machine.write(destination, result.astype(np.uint32))


_INTEGER_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
}


@instruction_named(*_INTEGER_ARITHMETIC, types=INTEGERS)
def _integer_arithmetic(machine: Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    bits, kind = bits_of(instruction.type), instruction.type
    values = [integers_of(machine.read(source, bits), kind) for source in sources]
    machine.write(destination, _INTEGER_ARITHMETIC[instruction.name](*values).view(unsigned(bits)))


@instruction_named("mul", "mad", modifiers=["lo", "hi", "wide"], types=INTEGERS)
def _multiply(machine: Machine, instruction: Instruction) -> None:
    """Compute the low half, the high half or all of the product; mad adds to that."""
    destination, *sources = instruction.operands
    kind, part = instruction.type, instruction.modifiers[0]
    bits = bits_of(kind)
    x, y = (integers_of(machine.read(source, bits), kind) for source in sources[:2])
    if part == "lo":
        result = x * y
    elif bits == 64:
        if part == "wide":
            raise machine.error("product of 128 bits")
        result = _high_half(x, y)
    else:
        wide = (signed if kind[0] == "s" else unsigned)(2 * bits)
        result = x.astype(wide) * y.astype(wide)
        if part == "hi":
            result = (result >> wide(bits)).astype(x.dtype)
    result = result.view(unsigned(8 * result.dtype.itemsize))
    if instruction.name == "mad":
        result = result + machine.read(sources[2], 8 * result.dtype.itemsize).astype(result.dtype)
    machine.write(destination, result)


def _high_half(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Upper 64 bits of the products of int64 or uint64 numbers, by the four products of their halves."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a, b = x.view(np.uint64), y.view(np.uint64)
    middle = (a >> half) * (b & low) + ((a & low) * (b & low) >> half)
    other = (a & low) * (b >> half) + (middle & low)
    high = (a >> half) * (b >> half) + (middle >> half) + (other >> half)
    if x.dtype == np.int64:
        # A negative number is its bits less 2^64.
        high -= np.where(x < 0, b, np.uint64(0)) + np.where(y < 0, a, np.uint64(0))
    return high.view(x.dtype)
