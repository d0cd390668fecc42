"""Execution of Triton's PTX on a CPU, to check compiled kernels without a GPU.

It runs the compiled program: its layouts, vector accesses, shuffles, shared memory, predicates and contracted
multiply-adds. All threads of all programs (PTX: CTAs) of a grid advance together, with one NumPy vector per register;
after a divergence, those furthest behind go first. An instruction that is not in the table, or has a modifier that the
table does not allow, is an error: nothing is skipped. Semantics: NVIDIA, "Parallel Thread Execution ISA".

Other errors: an access out of bounds or misaligned, a store to a read-only array, a barrier that not all threads of a
program reach, and a shared byte that is read before it is written, or by another warp without a barrier in between.
Reads of unwritten registers are counted in the trace and return a poison: compilers leave halves of packed registers
undefined, and a result that depends on them changes with the poison.

Approximate instructions (ex2, lg2, sqrt, rcp, ...) give the exact result rounded once, or have their documented error
on request: see `execute`.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx_numbers import (
    FLOATS,
    INTEGERS,
    TYPES,
    UNTYPED,
    Bits,
    bits_of,
    exact_fma,
    flush,
    integers_of,
    signed,
    unsigned,
)
from tests.kernels.ptx_program import (
    Address,
    Constant,
    Group,
    Instruction,
    Operand,
    Program,
    PtxError,
    Register,
    Symbol,
)

WARP = 32
MOST_THREADS = 2**14
"""Threads that run together, few enough to keep the vectors of a few hundred registers in a processor's cache."""

Mask = NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------------------- trace


@dataclass(frozen=True)
class Access:
    """Accesses of one instruction to one buffer.

    Attributes:
        kind: load or store.
        width: bytes per thread.
        offsets: int64, the first byte of each thread that took part.
    """

    kind: Literal["load", "store"]
    width: int
    offsets: NDArray[np.int64]


@dataclass
class Trace:
    """Accesses of a launch to global memory, and its reads of undefined registers.

    Attributes:
        accesses: accesses to each array argument, by its index, in order.
        undefined: number of reads of each register before its first value, by threads that needed it.
        executed: number of instructions, counted once per thread.
    """

    accesses: dict[int, list[Access]] = field(default_factory=dict)
    undefined: Counter[str] = field(default_factory=Counter)
    executed: int = 0

    def counts(self, argument: int, kind: Literal["load", "store"], size: int) -> NDArray[np.int64]:
        """Number of reads or writes of each byte of an argument of `size` bytes."""
        counts = np.zeros(size, np.int64)
        for access in self.accesses.get(argument, []):
            if access.kind == kind:
                starts = np.bincount(access.offsets, minlength=size)
                for byte in range(access.width):
                    counts[byte:] += starts[: size - byte]
        return counts

    def widths(self, argument: int, kind: Literal["load", "store"]) -> Counter[int]:
        """Number of accesses per thread by width in bytes."""
        widths: Counter[int] = Counter()
        for access in self.accesses.get(argument, []):
            if access.kind == kind:
                widths[access.width] += len(access.offsets)
        return widths


# ------------------------------------------------------------------------------------------------------------ machine


@dataclass
class _Value:
    """Value of a register: its bits [threads], and the threads in which it is defined; None means all."""

    bits: Bits
    defined: Mask | None


class _Machine:
    """State of some programs of a grid, with all their threads running together."""

    def __init__(
        self,
        program: Program,
        programs: NDArray[np.int64],
        grid: tuple[int, int, int],
        arguments: Sequence[NDArray[Any] | int | float],
        shared_bytes: int,
        approximation: float,
        poison: int,
        trace: Trace,
    ) -> None:
        self.program, self.trace, self.approximation, self.poison = program, trace, approximation, poison
        self.width = program.threads
        self.threads = len(programs) * program.threads
        self.slot = np.repeat(np.arange(len(programs)), program.threads)
        thread = np.tile(np.arange(program.threads, dtype=np.uint32), len(programs))
        self.lane = np.arange(self.threads) % WARP
        self.warp = np.arange(self.threads) // WARP
        self.special = _special_registers(thread, np.repeat(programs, program.threads), program.threads, grid)
        self.registers: dict[str, _Value] = {}
        self.shared = _SharedMemory(len(programs), shared_bytes)
        self.parameters, self.buffers = _parameters(program, arguments)
        self.position = np.zeros(self.threads, np.int64)
        self.active = np.ones(self.threads, bool)
        self.instruction = program.instructions[0]
        self.operations = tuple(map(_operation, program.instructions))

    def run(self) -> None:
        """Run until every thread has returned."""
        instructions = self.program.instructions
        with np.errstate(all="ignore"):
            while (at := int(self.position.min())) < len(instructions):
                self.instruction = instruction = instructions[at]
                here = self.position == at
                self.active = here
                if instruction.guard is not None:
                    self.active = here & (self.read(instruction.guard, 1) != instruction.negated)
                self.trace.executed += int(self.active.sum())
                self.position = np.where(here, at + 1, self.position)
                self.operations[at](self, instruction)

    def error(self, what: str) -> PtxError:
        """Error at the current instruction."""
        return PtxError(f"{what}: {self.instruction.text}")

    def read(self, operand: Operand, bits: int) -> Bits:
        """Value of an operand in every thread, unsigned [threads] (bool for predicates: bits = 1)."""
        if isinstance(operand, Constant):
            value = operand.bits & ((1 << bits) - 1)
            return np.full(self.threads, value, bool if bits == 1 else unsigned(bits))
        if isinstance(operand, Symbol):
            if operand.name not in self.program.shared:
                raise self.error(f"unknown symbol {operand.name}")
            return np.full(self.threads, self.program.shared[operand.name], unsigned(bits))
        if not isinstance(operand, Register):
            raise self.error("not a value")
        if operand.name in self.special:
            return self.special[operand.name]
        held = self.registers.get(operand.name)
        if held is None:
            self.trace.undefined[operand.name] += int(self.active.sum())
            return np.full(self.threads, self.poison & ((1 << bits) - 1), bool if bits == 1 else unsigned(bits))
        if held.defined is not None and (missing := int((self.active & ~held.defined).sum())):
            self.trace.undefined[operand.name] += missing
        return held.bits

    def write(self, operand: Operand, bits: Bits) -> None:
        """Write a register in the active threads."""
        if not isinstance(operand, Register):
            raise self.error("not a register")
        if operand.name == "_":
            return
        if self.active.all():
            self.registers[operand.name] = _Value(bits, None)
            return
        old = self.registers.get(operand.name)
        if old is None or old.bits.dtype != bits.dtype:
            poison = self.poison & ((1 << 8 * bits.dtype.itemsize) - 1)
            old = _Value(np.full(self.threads, poison).astype(bits.dtype), np.zeros(self.threads, bool))
        defined = None if old.defined is None else old.defined | self.active
        self.registers[operand.name] = _Value(np.where(self.active, bits, old.bits), defined)

    def addresses(self, operand: Operand) -> NDArray[np.int64]:
        """Addresses of a memory operand."""
        if not isinstance(operand, Address):
            raise self.error("not an address")
        return self.read(operand.base, 64).astype(np.int64) + operand.offset

    def load(self, addresses: NDArray[np.int64], width: int, space: str) -> NDArray[np.uint8]:
        """Load uint8 [threads, width]; zeros in inactive threads."""
        loaded = np.zeros((self.threads, width), np.uint8)
        threads = self._aligned(addresses, width)
        if len(threads):
            if space == "shared":
                where = self._shared_bytes(threads, addresses, width)
                if problem := self.shared.read(where, self.warp[threads]):
                    raise self.error(problem)
                loaded[threads] = self.shared.bytes[where]
            else:
                index, offsets = self._global_bytes(threads, addresses, width, "load")
                loaded[threads] = self.buffers[index][offsets[:, None] + np.arange(width)]
        return loaded

    def store(self, addresses: NDArray[np.int64], values: NDArray[np.uint8], space: str) -> None:
        """Store uint8 [threads, width] from the active threads."""
        width = values.shape[1]
        threads = self._aligned(addresses, width)
        if not len(threads):
            return
        if space == "shared":
            where = self._shared_bytes(threads, addresses, width)
            if problem := self.shared.write(where, self.warp[threads]):
                raise self.error(problem)
            self.shared.bytes[where] = values[threads]
        else:
            index, offsets = self._global_bytes(threads, addresses, width, "store")
            if not self.buffers[index].flags.writeable:
                raise self.error("store to a read-only array")
            self.buffers[index][offsets[:, None] + np.arange(width)] = values[threads]

    def _aligned(self, addresses: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """Active threads of an access of `width` bytes; raise PtxError if one is misaligned."""
        threads = np.flatnonzero(self.active)
        if (addresses[threads] % width).any():
            raise self.error(f"access of {width} bytes off its alignment")
        return threads

    def _shared_bytes(
        self, threads: NDArray[np.int64], addresses: NDArray[np.int64], width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Index of each byte in shared memory, [threads, width]."""
        starts = addresses[threads]
        size = self.shared.bytes.shape[1]
        if starts.min() < 0 or starts.max() + width > size:
            raise self.error(f"shared memory of {size} bytes accessed out of bounds, up to byte {starts.max() + width}")
        return self.slot[threads][:, None], starts[:, None] + np.arange(width)

    def _global_bytes(
        self, threads: NDArray[np.int64], addresses: NDArray[np.int64], width: int, kind: Literal["load", "store"]
    ) -> tuple[int, NDArray[np.int64]]:
        """Argument that the threads access, which must be one, and the offset of each thread in it."""
        starts = addresses[threads]
        index = int(starts[0] >> _ARGUMENT_SHIFT) - 1
        if index not in self.buffers or (starts >> _ARGUMENT_SHIFT != index + 1).any():
            raise self.error("pointer to no argument, or to several")
        offsets = starts - _address_of(index, self.buffers[index])
        size = self.buffers[index].size
        if offsets.min() < 0 or offsets.max() + width > size:
            raise self.error(
                f"argument {index} of {size} bytes accessed out of bounds, "
                f"bytes {offsets.min()} to {offsets.max() + width}"
            )
        self.trace.accesses.setdefault(index, []).append(Access(kind, width, offsets))
        return index, offsets


class _SharedMemory:
    """Shared memory of some programs, and the warp that has accessed each byte since the last barrier."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, programs: int, size: int) -> None:
        self.bytes = np.zeros((programs, size), np.uint8)
        self._written = np.zeros((programs, size), bool)
        self._writer = np.full((programs, size), self.NOBODY)
        self._reader = np.full((programs, size), self.NOBODY)

    def read(self, where: Any, warps: NDArray[np.int64]) -> str | None:
        """Record a read; return its error, if any."""
        if not self._written[where].all():
            return "shared memory read before it was written"
        if _others(self._writer[where], warps):
            return "shared memory read with no barrier since another warp wrote it"
        self._reader[where] = np.where(_is_other(self._reader[where], warps), self.SEVERAL, warps[:, None])
        return None

    def write(self, where: Any, warps: NDArray[np.int64]) -> str | None:
        """Record a write; return its error, if any."""
        if _others(self._writer[where], warps) or _others(self._reader[where], warps):
            return "shared memory written with no barrier since another warp touched it"
        self._written[where] = True
        self._writer[where] = warps[:, None]
        return None

    def barrier(self, programs: NDArray[np.int64]) -> None:
        """Record a barrier of all warps of these programs."""
        self._writer[programs] = self.NOBODY
        self._reader[programs] = self.NOBODY


def _is_other(touched: NDArray[np.int64], warps: NDArray[np.int64]) -> Mask:
    return (touched != _SharedMemory.NOBODY) & (touched != warps[:, None])


def _others(touched: NDArray[np.int64], warps: NDArray[np.int64]) -> bool:
    return bool(_is_other(touched, warps).any())


def _special_registers(
    thread: NDArray[np.uint32], program: NDArray[np.int64], width: int, grid: tuple[int, int, int]
) -> dict[str, Bits]:
    """Thread, lane and program numbers; the x coordinate of a grid changes fastest."""
    zeros = np.zeros_like(thread)
    x, y, z = program % grid[0], program // grid[0] % grid[1], program // (grid[0] * grid[1])
    ids = {"%tid.x": thread, "%tid.y": zeros, "%tid.z": zeros, "%laneid": thread % WARP}
    ids |= {"%ntid.x": zeros + np.uint32(width), "%ntid.y": zeros + np.uint32(1), "%ntid.z": zeros + np.uint32(1)}
    ids |= {f"%ctaid.{axis}": at.astype(np.uint32) for axis, at in zip("xyz", (x, y, z), strict=True)}
    return ids | {f"%nctaid.{axis}": zeros + np.uint32(size) for axis, size in zip("xyz", grid, strict=True)}


_ARGUMENT_SHIFT = 36
"""Argument i is in the middle of the addresses from (i + 1) << 36 on, so a stray pointer hits no other argument."""


def _address_of(index: int, buffer: NDArray[np.uint8]) -> int:
    """Address of an argument, with the alignment of the array itself."""
    middle = 1 << (_ARGUMENT_SHIFT - 1)
    return ((index + 1) << _ARGUMENT_SHIFT) + middle + buffer.ctypes.data % 128


def _parameters(
    program: Program, arguments: Sequence[NDArray[Any] | int | float]
) -> tuple[dict[str, int], dict[int, NDArray[np.uint8]]]:
    """Bits of each parameter, and bytes of each array argument.

    Triton adds pointers to scratch memory, which these kernels do not use: null.
    """
    if len(arguments) > len(program.parameters):
        raise PtxError(f"{len(arguments)} arguments for {len(program.parameters)} parameters")
    buffers = {}
    bits = dict.fromkeys(program.parameters, 0)
    for index, (name, argument) in enumerate(zip(program.parameters, arguments, strict=False)):
        if isinstance(argument, np.ndarray):
            buffers[index] = argument.view(np.uint8).reshape(-1)
            if not np.may_share_memory(buffers[index], argument):
                raise PtxError(f"argument {index} is not contiguous")
            bits[name] = _address_of(index, buffers[index])
        elif isinstance(argument, float):
            bits[name] = int(np.float32(argument).view(np.uint32))
        else:
            bits[name] = int(argument)
    return bits, buffers


def execute(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[NDArray[Any] | int | float],
    *,
    shared_bytes: int = 0,
    approximation: float = 0.0,
    poison: int = 0xDEADBEEFDEADBEEF,
) -> Trace:
    """Launch a kernel.

    Args:
        program: from `parse`.
        grid: programs in x, y and z; missing ones are 1.
        arguments: contiguous arrays, changed in place where the kernel writes, and numbers, in the kernel's order.
        shared_bytes: shared memory of a program.
        approximation: error of approximate instructions, in units of the largest that NVIDIA documents, -1 to 1.
        poison: 64 bits; the lower ones are the value of an unwritten register.

    Returns:
        Trace of the memory accesses.

    Raises:
        PtxError: see the docstring of this module.
    """
    x, y, z = (*grid, 1, 1, 1)[:3]
    trace = Trace()
    at_once = max(1, MOST_THREADS // program.threads)
    for first in range(0, x * y * z, at_once):
        programs = np.arange(first, min(first + at_once, x * y * z))
        _Machine(program, programs, (x, y, z), arguments, shared_bytes, approximation, poison, trace).run()
    return trace


# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True)
class _Entry:
    """An instruction in the table.

    Attributes:
        run: its implementation.
        modifiers: allowed modifiers, besides types.
        types: allowed types.
        numbers: allowed numbers of types.
    """

    run: Callable[[_Machine, Instruction], None]
    modifiers: frozenset[str]
    types: frozenset[str]
    numbers: tuple[int, ...]

    def allows(self, instruction: Instruction) -> bool:
        types = instruction.types
        return (
            len(types) in self.numbers
            and self.types.issuperset(types)
            and types == instruction.modifiers[len(instruction.modifiers) - len(types) :]
            and self.modifiers.issuperset(instruction.modifiers[: len(instruction.modifiers) - len(types)])
        )


_INSTRUCTIONS: dict[str, list[_Entry]] = {}


def _instruction_named(
    *names: str, modifiers: Iterable[str] = (), types: Iterable[str] = (), numbers: tuple[int, ...] = (1,)
) -> Callable[[Any], Any]:
    """Enter a function into the table; arguments as in `_Entry`."""

    def enter(function: Callable[[_Machine, Instruction], None]) -> Callable[[_Machine, Instruction], None]:
        for name in names:
            entry = _Entry(function, frozenset(modifiers), frozenset(types), numbers)
            _INSTRUCTIONS.setdefault(name, []).append(entry)
        return function

    return enter


def _operation(instruction: Instruction) -> Callable[["_Machine", Instruction], None]:
    """Implementation of an instruction, from the table."""
    for entry in _INSTRUCTIONS.get(instruction.name, []):
        if entry.allows(instruction):
            return entry.run
    raise PtxError(f"unknown instruction or modifier: {instruction.text}")


@_instruction_named("bra", modifiers=["uni"], numbers=(0,))
def _branch(machine: _Machine, instruction: Instruction) -> None:
    (target,) = instruction.operands
    if not isinstance(target, Symbol) or target.name not in machine.program.labels:
        raise machine.error("unknown label")
    machine.position = np.where(machine.active, machine.program.labels[target.name], machine.position)


@_instruction_named("ret", "exit", numbers=(0,))
def _return(machine: _Machine, instruction: Instruction) -> None:
    machine.position = np.where(machine.active, len(machine.program.instructions), machine.position)


@_instruction_named("bar", modifiers=["sync", "warp"], numbers=(0,))
def _barrier(machine: _Machine, instruction: Instruction) -> None:
    group = WARP if "warp" in instruction.modifiers else machine.width
    arrived = machine.active.reshape(-1, group)
    if (arrived.any(1) != arrived.all(1)).any():
        raise machine.error("barrier that not all threads reach")
    if group == machine.width:
        machine.shared.barrier(np.flatnonzero(arrived.any(1)))


_CACHE_HINTS = ("nc", "ca", "cg", "cs", "L1::evict_last", "L1::evict_first", "L1::no_allocate")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


@_instruction_named("ld", modifiers=["param", "global", "shared", *_VECTORS, *_CACHE_HINTS], types=TYPES)
def _load(machine: _Machine, instruction: Instruction) -> None:
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


@_instruction_named("st", modifiers=["global", "shared", *_VECTORS, *_CACHE_HINTS], types=TYPES)
def _store(machine: _Machine, instruction: Instruction) -> None:
    destination, source = instruction.operands
    bits = bits_of(instruction.type)
    elements = [
        machine.read(element, bits).astype(unsigned(bits)) for element in _elements(machine, instruction, source)
    ]
    values = np.stack(elements, axis=1).view(np.uint8)
    machine.store(machine.addresses(destination), values, instruction.modifiers[0])


def _elements(machine: _Machine, instruction: Instruction, operand: Operand) -> tuple[Operand, ...]:
    """Registers of a load or store, as many as in its vector modifier."""
    elements = operand.members if isinstance(operand, Group) else (operand,)
    if len(elements) != next((_VECTORS[word] for word in instruction.modifiers if word in _VECTORS), 1):
        raise machine.error("wrong number of registers")
    return elements


@_instruction_named(
    "ldmatrix", "stmatrix", modifiers=["sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared"], types=["b16"]
)
def _matrices(machine: _Machine, instruction: Instruction) -> None:
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


@_instruction_named("mov", types=TYPES)
def _move(machine: _Machine, instruction: Instruction) -> None:
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


@_instruction_named("cvta", modifiers=["to", "global", "shared"], types=["u64"])
def _convert_address(machine: _Machine, instruction: Instruction) -> None:
    machine.write(instruction.operands[0], machine.read(instruction.operands[1], 64))


@_instruction_named("createpolicy", modifiers=["fractional", "L2::evict_last", "L2::evict_first"], types=["b64"])
def _cache_policy(machine: _Machine, instruction: Instruction) -> None:
    machine.write(instruction.operands[0], np.zeros(machine.threads, np.uint64))


@_instruction_named("selp", types=TYPES)
def _select(machine: _Machine, instruction: Instruction) -> None:
    destination, if_true, if_false, predicate = instruction.operands
    bits = bits_of(instruction.type)
    chosen = np.where(machine.read(predicate, 1), machine.read(if_true, bits), machine.read(if_false, bits))
    machine.write(destination, chosen.astype(unsigned(bits)))


@_instruction_named("shfl", modifiers=["sync", "bfly", "idx", "up", "down"], types=["b32"])
def _shuffle(machine: _Machine, instruction: Instruction) -> None:
    destination, value, operand, clamp, _ = instruction.operands
    mode = instruction.modifiers[1]
    distance = machine.read(operand, 32).astype(np.int64) & 31
    limits = machine.read(clamp, 32).astype(np.int64)
    bound, segment = limits & 31, (limits >> 8) & 31
    lowest = machine.lane & segment
    highest = lowest | (bound & ~segment)
    source = {
        "bfly": machine.lane ^ distance,
        "idx": lowest | (distance & ~segment),
        "up": machine.lane - distance,
        "down": machine.lane + distance,
    }[mode]
    valid = source >= highest if mode == "up" else source <= highest
    thread = machine.warp * WARP + np.where(valid, source, machine.lane)
    if not machine.active[thread[machine.active]].all():
        raise machine.error("shuffle from a thread that does not take part")
    results = destination.members if isinstance(destination, Group) else (destination,)
    machine.write(results[0], machine.read(value, 32)[thread])
    for predicate in results[1:]:
        machine.write(predicate, valid)


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


@_instruction_named("setp", modifiers=[*_COMPARISONS, "ftz", "and", "or", "xor"], types=TYPES)
def _compare(machine: _Machine, instruction: Instruction) -> None:
    destination, *operands = instruction.operands
    kind, comparison = instruction.type, _COMPARISONS[instruction.modifiers[0]]
    if kind in FLOATS:
        x, y = (_float_inputs(machine, instruction, operand) for operand in operands[:2])
    else:
        x, y = (integers_of(machine.read(operand, bits_of(kind)), kind)[None] for operand in operands[:2])
    results = comparison(x, y)
    if len(operands) == 3:
        combine = next(_LOGIC[word] for word in instruction.modifiers if word in _LOGIC)
        results = combine(results, machine.read(operands[2], 1))
    if kind in FLOATS and FLOATS[kind].lanes == 2 and isinstance(destination, Group):
        for predicate, result in zip(destination.members, results, strict=True):
            machine.write(predicate, result)
    elif len(results) == 1 and isinstance(destination, Register):
        machine.write(destination, results[0])
    else:
        raise machine.error("unknown form")


_LOGIC: dict[str, Callable[..., Any]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
}


@_instruction_named(*_LOGIC, types=["pred", *UNTYPED])
def _logic(machine: _Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    bits = bits_of(instruction.type)
    values = [machine.read(source, bits).astype(bool if bits == 1 else unsigned(bits)) for source in sources]
    machine.write(destination, _LOGIC[instruction.name](*values))


@_instruction_named("lop3", types=["b32"])
def _three_way_logic(machine: _Machine, instruction: Instruction) -> None:
    destination, *sources, table = instruction.operands
    a, b, c = (machine.read(source, 32).astype(np.uint32) for source in sources)
    if not isinstance(table, Constant):
        raise machine.error("table that is not a constant")
    result = np.zeros(machine.threads, np.uint32)
    for row in range(8):
        if table.bits >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    machine.write(destination, result)


@_instruction_named("shl", "shr", types=[*UNTYPED, *INTEGERS])
def _shift(machine: _Machine, instruction: Instruction) -> None:
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


@_instruction_named("shf", modifiers=["l", "r", "wrap", "clamp"], types=["b32"])
def _funnel_shift(machine: _Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    low, high, amount = (machine.read(source, 32).astype(np.uint64) for source in sources)
    distance = amount & np.uint64(31) if "wrap" in instruction.modifiers else np.minimum(amount, np.uint64(32))
    both = (high << np.uint64(32)) | low
    shifted = (both << distance) >> np.uint64(32) if instruction.modifiers[0] == "l" else both >> distance
    machine.write(destination, shifted.astype(np.uint32))


@_instruction_named("bfe", types=["u32", "s32", "u64", "s64"])
def _extract_bits(machine: _Machine, instruction: Instruction) -> None:
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


@_instruction_named("prmt", types=["b32"])
def _permute_bytes(machine: _Machine, instruction: Instruction) -> None:
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


@_instruction_named("add", "sub", "mul", "fma", modifiers=["rn", "ftz"], types=FLOATS)
@_instruction_named("neg", "abs", modifiers=["ftz"], types=FLOATS)
@_instruction_named("min", "max", modifiers=["ftz", "NaN"], types=FLOATS)
@_instruction_named("div", "sqrt", "rcp", modifiers=["rn", "full", "approx", "ftz"], types=["f32"])
@_instruction_named("rsqrt", "ex2", "lg2", modifiers=["approx", "ftz"], types=["f32"])
def _float_arithmetic(machine: _Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    words = instruction.modifiers
    values = [_float_inputs(machine, instruction, source) for source in sources]
    result = _FLOAT_ARITHMETIC[instruction.name](*values)
    if "approx" in words or "full" in words:
        scale = np.where(np.isfinite(result), np.abs(result), 0.0)
        if instruction.name == "lg2":
            scale = np.where((values[0] > 0.5) & (values[0] < 2.0), 1.0, scale)
        result = result + machine.approximation * _APPROXIMATION[instruction.name] * scale
    if "NaN" in words:
        result = np.where(np.any([np.isnan(value) for value in values], axis=0), np.nan, result)
    machine.write(destination, FLOATS[instruction.type].pack(flush(result) if "ftz" in words else result))


def _float_inputs(machine: _Machine, instruction: Instruction, operand: Operand) -> NDArray[np.float64]:
    values = FLOATS[instruction.type].unpack(machine.read(operand, bits_of(instruction.type)))
    return flush(values) if "ftz" in instruction.modifiers else values


@_instruction_named("add", "sub", "fma", modifiers=["rn"], types=["f32", "f16", "bf16"], numbers=(2,))
def _mixed_arithmetic(machine: _Machine, instruction: Instruction) -> None:
    """Compute float32 results of narrower operands and a last operand in float32."""
    destination, *sources, last = instruction.operands
    wide, narrow = instruction.types
    values = [FLOATS[narrow].unpack(machine.read(source, bits_of(narrow))) for source in sources]
    values.append(FLOATS[wide].unpack(machine.read(last, bits_of(wide))))
    machine.write(destination, FLOATS[wide].pack(_FLOAT_ARITHMETIC[instruction.name](*values)))


_INTEGER_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
}


@_instruction_named(*_INTEGER_ARITHMETIC, types=INTEGERS)
def _integer_arithmetic(machine: _Machine, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    bits, kind = bits_of(instruction.type), instruction.type
    values = [integers_of(machine.read(source, bits), kind) for source in sources]
    machine.write(destination, _INTEGER_ARITHMETIC[instruction.name](*values).view(unsigned(bits)))


@_instruction_named("mul", "mad", modifiers=["lo", "hi", "wide"], types=INTEGERS)
def _multiply(machine: _Machine, instruction: Instruction) -> None:
    """Compute the low half, the high half or all of the product; mad adds to that."""
    destination, *sources = instruction.operands
    kind, part = instruction.type, instruction.modifiers[0]
    bits = bits_of(kind)
    x, y = (integers_of(machine.read(source, bits), kind) for source in sources[:2])
    if part == "lo":
        result = x * y
    elif bits == 64:
        raise machine.error("product of 128 bits")
    else:
        wide = (signed if kind[0] == "s" else unsigned)(2 * bits)
        result = x.astype(wide) * y.astype(wide)
        if part == "hi":
            result = (result >> wide(bits)).astype(x.dtype)
    result = result.view(unsigned(8 * result.dtype.itemsize))
    if instruction.name == "mad":
        result = result + machine.read(sources[2], 8 * result.dtype.itemsize).astype(result.dtype)
    machine.write(destination, result)


_ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@_instruction_named("cvt", modifiers=["rn", "ftz", "sat", *_ROUND_TO_INTEGER], types=TYPES, numbers=(2,))
def _convert(machine: _Machine, instruction: Instruction) -> None:
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


def _saturated_integers(machine: _Machine, instruction: Instruction, values: NDArray[np.float64]) -> Bits:
    """Convert floats to integers: rounded by the modifier, NaN to 0, saturated to the type's range."""
    target = instruction.modifiers[-2]
    rounding = next((_ROUND_TO_INTEGER[word] for word in instruction.modifiers if word in _ROUND_TO_INTEGER), None)
    bits = bits_of(target)
    if rounding is None or bits > 32:
        raise machine.error("unknown instruction or modifier")
    range_ = np.iinfo(signed(bits) if target[0] == "s" else unsigned(bits))
    whole = np.clip(rounding(np.where(np.isnan(values), 0.0, values)), range_.min, range_.max)
    return whole.astype(np.int64).astype(unsigned(bits))
