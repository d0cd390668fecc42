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

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx import (  # noqa: F401 (their instructions enter the table)
    comparisons,
    control,
    float_instructions,
    integer_instructions,
    memory_instructions,
)
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.program import Program
from tests.kernels.ptx.table import operation_of
from tests.kernels.ptx.trace import Trace

MOST_THREADS = 2**14
"""Threads that run together, few enough to keep the vectors of a few hundred registers in a processor's cache."""


def execute(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[NDArray[Any] | int | float],
    *,
    shared_bytes: int = 0,
    approximation: float = 0.0,
    poison: int = 0xDEADBEEFDEADBEEF,
    only: Sequence[int] | None = None,
) -> Trace:
    """Launch a kernel.

    Args:
        program: from `parse`.
        grid: programs in x, y and z; missing ones are 1.
        arguments: contiguous arrays, changed in place where the kernel writes, and numbers, in the kernel's order.
        shared_bytes: shared memory of a program.
        approximation: error of approximate instructions, in units of the largest that NVIDIA documents, -1 to 1.
        poison: 64 bits; the lower ones are the value of an unwritten register.
        only: programs that run, by their numbers in the grid, x first; None for all.

    Returns:
        Trace of the memory accesses.

    Raises:
        PtxError: see the docstring of this module.
    """
    x, y, z = (*grid, 1, 1, 1)[:3]
    trace = Trace()
    operations = tuple(map(operation_of, program.instructions))
    at_once = max(1, MOST_THREADS // program.threads)
    numbers = np.arange(x * y * z) if only is None else np.array(only)
    for first in range(0, len(numbers), at_once):
        programs = numbers[first : first + at_once]
        machine = Machine(
            program, operations, programs, (x, y, z), arguments, shared_bytes, approximation, poison, trace
        )
        machine.run()
    return trace
