"""Arithmetic of floating-point numbers, and conversions."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.numbers import (
    FLOATS,
    TYPES,
    Bits,
    bits_of,
    exact_fma,
    flush,
    integers_of,
    signed,
    unsigned,
)
from tests.kernels.ptx.program import Instruction, Operand
from tests.kernels.ptx.table import instruction_named

# Each operation acts on float64 copies of the operands, and its result is rounded once to the type. For sums, products,
# quotients and roots of narrower numbers the first rounding to float64 is harmless (Figueroa 1995).
_FLOAT_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": exact_fma,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
}

_APPROXIMATION = {
    "div": 2.0**-22,
    "sqrt": 2.0**-23,
    "rcp": 2.0**-23,
    "rsqrt": 2.0**-22.9,
    "ex2": 2.0**-22.5,
    "lg2": 2.0**-22,
}
"""Largest relative error of .approx and .full instructions (PTX ISA, floating-point instructions); that of lg2 between
1/2 and 2 is absolute."""


@instruction_named("add", "sub", "mul", "fma", modifiers=["rn", "ftz"], types=FLOATS)
@instruction_named("neg", "abs", modifiers=["ftz"], types=FLOATS)
@instruction_named("min", "max", modifiers=["ftz", "NaN"], types=FLOATS)
@instruction_named("div", "sqrt", "rcp", modifiers=["rn", "full", "approx", "ftz"], types=["f32"])
@instruction_named("rsqrt", "ex2", "lg2", modifiers=["approx", "ftz"], types=["f32"])
def _float_arithmetic(machine: Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    words = instruction.modifiers
    values = [float_inputs(machine, instruction, source) for source in sources]
    result = _FLOAT_ARITHMETIC[instruction.name](*values)
    if "approx" in words or "full" in words:
        scale = np.where(np.isfinite(result), np.abs(result), 0.0)
        if instruction.name == "lg2":
            scale = np.where((values[0] > 0.5) & (values[0] < 2.0), 1.0, scale)
        result = result + machine.approximation * _APPROXIMATION[instruction.name] * scale
    if "NaN" in words:
        result = np.where(np.any([np.isnan(value) for value in values], axis=0), np.nan, result)
    machine.write(destination, FLOATS[instruction.type].pack(flush(result) if "ftz" in words else result))


def float_inputs(machine: Machine, instruction: Instruction, operand: Operand) -> NDArray[np.float64]:
    values = FLOATS[instruction.type].unpack(machine.read(operand, bits_of(instruction.type)))
    return flush(values) if "ftz" in instruction.modifiers else values


@instruction_named("add", "sub", "fma", modifiers=["rn"], types=["f32", "f16", "bf16"], numbers=(2,))
def _mixed_arithmetic(machine: Machine, instruction: Instruction) -> None:
    """Compute float32 results of narrower operands and a last operand in float32."""
    destination, *sources, last = instruction.operands
    wide, narrow = instruction.types
    values = [FLOATS[narrow].unpack(machine.read(source, bits_of(narrow))) for source in sources]
    values.append(FLOATS[wide].unpack(machine.read(last, bits_of(wide))))
    machine.write(destination, FLOATS[wide].pack(_FLOAT_ARITHMETIC[instruction.name](*values)))


_ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction_named("cvt", modifiers=["rn", "ftz", "sat", *_ROUND_TO_INTEGER], types=TYPES, numbers=(2,))
def _convert(machine: Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    target, source = instruction.modifiers[-2:]
    words = instruction.modifiers[:-2]
    if target not in FLOATS and source not in FLOATS:
        if words:
            raise machine.error("unknown instruction or modifier")
        values = integers_of(machine.read(sources[0], bits_of(source)), source)
        machine.write(destination, values.astype(unsigned(bits_of(target))))
        return
    if source in FLOATS:
        # Two operands fill a packed register; the first is its high half.
        values = np.concatenate([FLOATS[source].unpack(machine.read(part, bits_of(source))) for part in sources[::-1]])
        values = flush(values) if "ftz" in words else values
    else:
        # A 64-bit integer has more digits than float64; it is rounded to float32 directly.
        integers = integers_of(machine.read(sources[0], bits_of(source)), source)
        values = (integers if bits_of(source) < 64 else integers.astype(np.float32)).astype(np.float64)[None]
    if target in FLOATS:
        for word in words:
            values = _ROUND_TO_INTEGER[word](values) if word in _ROUND_TO_INTEGER else values
        if "sat" in words:
            values = np.clip(np.where(np.isnan(values), 0.0, values), 0.0, 1.0)
        if len(values) != FLOATS[target].lanes:
            raise machine.error("wrong number of registers")
        machine.write(destination, FLOATS[target].pack(values))
    else:
        machine.write(destination, _saturated_integers(machine, instruction, values[0]))


def _saturated_integers(machine: Machine, instruction: Instruction, values: NDArray[np.float64]) -> Bits:
    """Convert floats to integers: rounded by the modifier, NaN to 0, saturated to the type's range."""
    target = instruction.modifiers[-2]
    rounding = next((_ROUND_TO_INTEGER[word] for word in instruction.modifiers if word in _ROUND_TO_INTEGER), None)
    bits = bits_of(target)
    if rounding is None or bits > 32:
        raise machine.error("unknown instruction or modifier")
    range_ = np.iinfo(signed(bits) if target[0] == "s" else unsigned(bits))
    whole = np.clip(rounding(np.where(np.isnan(values), 0.0, values)), range_.min, range_.max)
    return whole.astype(np.int64).astype(unsigned(bits))
