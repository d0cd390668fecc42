"""Loads, stores, and moves between registers."""

import numpy as np

from tests.kernels.ptx.machine import WARP, Machine
from tests.kernels.ptx.numbers import TYPES, bits_of, unsigned
from tests.kernels.ptx.program import Address, Group, Instruction, Operand, Symbol
from tests.kernels.ptx.table import instruction_named

_CACHE_HINTS = ("nc", "ca", "cg", "cs", "L1::evict_last", "L1::evict_first", "L1::no_allocate")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


@instruction_named("ld", modifiers=["param", "global", "shared", *_VECTORS, *_CACHE_HINTS], types=TYPES)
def _load(machine: Machine, instruction: Instruction) -> None:
    destination, source = instruction.operands
    space = instruction.modifiers[0]
    width = bits_of(instruction.type) // 8
    if space == "param":
        if not isinstance(source, Address) or not isinstance(source.base, Symbol):
            raise machine.error("not a parameter")
        bits = machine.parameters[source.base.name] & ((1 << 8 * width) - 1)
        machine.write(destination, np.full(machine.threads, bits, unsigned(8 * width)))
        return
    targets = _elements(machine, instruction, destination)
    loaded = machine.load(machine.addresses(source), width * len(targets), space)
    for target, values in zip(targets, np.split(loaded, len(targets), axis=1), strict=True):
        machine.write(target, np.ascontiguousarray(values).view(unsigned(8 * width)).reshape(-1))


@instruction_named("st", modifiers=["global", "shared", *_VECTORS, *_CACHE_HINTS], types=TYPES)
def _store(machine: Machine, instruction: Instruction) -> None:
    destination, source = instruction.operands
    bits = bits_of(instruction.type)
    elements = [
        machine.read(element, bits).astype(unsigned(bits)) for element in _elements(machine, instruction, source)
    ]
    values = np.stack(elements, axis=1).view(np.uint8)
    machine.store(machine.addresses(destination), values, instruction.modifiers[0])


def _elements(machine: Machine, instruction: Instruction, operand: Operand) -> tuple[Operand, ...]:
    """Registers of a load or store, as many as in its vector modifier."""
    elements = operand.members if isinstance(operand, Group) else (operand,)
    if len(elements) != next((_VECTORS[word] for word in instruction.modifiers if word in _VECTORS), 1):
        raise machine.error("wrong number of registers")
    return elements


@instruction_named(
    "ldmatrix", "stmatrix", modifiers=["sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared"], types=["b16"]
)
def _matrices(machine: Machine, instruction: Instruction) -> None:
    """Load matrices of 8 x 8 halves, one row per address; lanes 8 m to 8 m + 7 have the addresses of matrix m.

    A lane holds two neighbours of a row, or of a column with .trans: those of row lane // 4, from column lane % 4 * 2.
    """
    loads = instruction.name == "ldmatrix"
    group, address = instruction.operands if loads else instruction.operands[::-1]
    registers = group.members if isinstance(group, Group) else (group,)
    if len(registers) != int(next(word for word in instruction.modifiers if word in ("x1", "x2", "x4"))[1:]):
        raise machine.error("wrong number of registers")
    rows = machine.addresses(address)
    major, minor = machine.lane // 4, machine.lane % 4 * 2
    for matrix, register in enumerate(registers):
        first = machine.warp * WARP + 8 * matrix
        if "trans" in instruction.modifiers:
            halves = [rows[first + minor + half] + 2 * major for half in (0, 1)]
        else:
            halves = [rows[first + major] + 2 * (minor + half) for half in (0, 1)]
        if loads:
            parts = [machine.load(half, 2, "shared") for half in halves]
            machine.write(register, np.concatenate(parts, axis=1).view(np.uint32).reshape(-1))
        else:
            bytes_ = machine.read(register, 32).astype(np.uint32)[:, None].view(np.uint8)
            for half, address_of_half in enumerate(halves):
                machine.store(address_of_half, bytes_[:, 2 * half : 2 * half + 2], "shared")


@instruction_named("mov", types=TYPES)
def _move(machine: Machine, instruction: Instruction) -> None:
    destination, source = instruction.operands
    bits = bits_of(instruction.type)
    if isinstance(destination, Group):
        part = bits // len(destination.members)
        whole = machine.read(source, bits).astype(np.uint64)
        for index, member in enumerate(destination.members):
            machine.write(member, (whole >> np.uint64(part * index)).astype(unsigned(part)))
    elif isinstance(source, Group):
        part = bits // len(source.members)
        whole = np.zeros(machine.threads, np.uint64)
        for index, member in enumerate(source.members):
            value = machine.read(member, part).astype(unsigned(part)).astype(np.uint64)
            whole |= value << np.uint64(part * index)
        machine.write(destination, whole.astype(unsigned(bits)))
    else:
        value = machine.read(source, bits)
        machine.write(destination, value if bits == 1 else value.astype(unsigned(bits)))


@instruction_named("cvta", modifiers=["to", "global", "shared"], types=["u64"])
def _convert_address(machine: Machine, instruction: Instruction) -> None:
    machine.write(instruction.operands[0], machine.read(instruction.operands[1], 64))


@instruction_named("createpolicy", modifiers=["fractional", "L2::evict_last", "L2::evict_first"], types=["b64"])
def _cache_policy(machine: Machine, instruction: Instruction) -> None:
    machine.write(instruction.operands[0], np.zeros(machine.threads, np.uint64))
