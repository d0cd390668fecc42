"""Predicates, and the choice between two values."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.float_instructions import float_inputs
from tests.kernels.ptx.integer_instructions import LOGIC
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.numbers import FLOATS, TYPES, bits_of, integers_of, unsigned
from tests.kernels.ptx.program import Group, Instruction, Register
from tests.kernels.ptx.table import instruction_named


@instruction_named("selp", types=TYPES)
def _select(machine: Machine, instruction: Instruction) -> None:
    destination, if_true, if_false, predicate = instruction.operands
    bits = bits_of(instruction.type)
    chosen = np.where(machine.read(predicate, 1), machine.read(if_true, bits), machine.read(if_false, bits))
    machine.write(destination, chosen.astype(unsigned(bits)))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": lambda x, y: (x < y) | (x > y),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    # With u, true where either is NaN.
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": operator.ne,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: (x == x) & (y == y),
    "nan": lambda x, y: (x != x) | (y != y),
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


@instruction_named("setp", modifiers=[*_COMPARISONS, "ftz", "and", "or", "xor"], types=TYPES)
def _compare(machine: Machine, instruction: Instruction) -> None:
    destination, *operands = instruction.operands
    kind, comparison = instruction.type, _COMPARISONS[instruction.modifiers[0]]
    if kind in FLOATS:
        x, y = (float_inputs(machine, instruction, operand) for operand in operands[:2])
    else:
        x, y = (integers_of(machine.read(operand, bits_of(kind)), kind)[None] for operand in operands[:2])
    results = comparison(x, y)
    if len(operands) == 3:
        combine = next(LOGIC[word] for word in instruction.modifiers if word in LOGIC)
        results = combine(results, machine.read(operands[2], 1))
    if kind in FLOATS and FLOATS[kind].lanes == 2 and isinstance(destination, Group):
        for predicate, result in zip(destination.members, results, strict=True):
            machine.write(predicate, result)
    elif len(results) == 1 and isinstance(destination, Register):
        machine.write(destination, results[0])
    else:
        raise machine.error("unknown form")
