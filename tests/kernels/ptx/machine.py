"""State of running programs: registers, positions and memories of all their threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.numbers import Bits, unsigned
from tests.kernels.ptx.program import Address, Constant, Instruction, Operand, Program, PtxError, Register, Symbol
from tests.kernels.ptx.shared_memory import Mask, SharedMemory
from tests.kernels.ptx.trace import Access, Trace

WARP = 32


@dataclass
class _Value:
    """Value of a register: its bits [threads], and the threads in which it is defined; None means all."""

    bits: Bits
    defined: Mask | None


Operation = Callable[["Machine", Instruction], None]
"""Implementation of an instruction."""


class Machine:
    """State of some programs of a grid, with all their threads running together."""

    def __init__(
        self,
        program: Program,
        operations: Sequence[Operation],
        programs: NDArray[np.int64],
        grid: tuple[int, int, int],
        arguments: Sequence[NDArray[Any] | int | float],
        shared_bytes: int,
        approximation: float,
        poison: int,
        trace: Trace,
    ) -> None:
        self.program, self.operations, self.trace = program, operations, trace
        self.approximation, self.poison = approximation, poison
        self.width = program.threads
        self.threads = len(programs) * program.threads
        self.numbers = programs
        self.slot = np.repeat(np.arange(len(programs)), program.threads)
        thread = np.tile(np.arange(program.threads, dtype=np.uint32), len(programs))
        self.lane = np.arange(self.threads) % WARP
        self.warp = np.arange(self.threads) // WARP
        self.special = _special_registers(thread, np.repeat(programs, program.threads), program.threads, grid)
        self.registers: dict[str, _Value] = {}
        self.shared = SharedMemory(len(programs), shared_bytes)
        self.parameters, self.buffers = _bind(program, arguments)
        self.position = np.zeros(self.threads, np.int64)
        self.active = np.ones(self.threads, bool)
        self.instruction = program.instructions[0]

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
        self.trace.accesses.setdefault(index, []).append(Access(kind, width, offsets, self.numbers[self.slot[threads]]))
        return index, offsets


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


def _bind(
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
