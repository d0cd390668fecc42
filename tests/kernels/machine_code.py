"""Resources and instructions of compiled kernels, by their machine code."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import pytest

from tests.kernels.calls import Call
from tests.kernels.kernel_compiler import Compiled


@dataclass(frozen=True)
class Usage:
    """Resources of a compiled kernel.

    Attributes:
        registers: registers per thread.
        stack: bytes per thread, including local memory and spilled registers.
        operations: number of each instruction in the machine code, with modifiers; empty if no disassembler is
            installed.
    """

    registers: int
    stack: int
    operations: Counter[str]

    def count(self, *names: str) -> int:
        """Number of instructions with one of these opcodes, without modifiers."""
        return sum(count for opcode, count in self.operations.items() if opcode.split(".")[0] in names)


_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def cuda_usage(compiled: Compiled) -> Usage:
    """Usage by cuobjdump if Triton includes it, else by ptxas, which reports registers and memory alone."""
    from triton import knobs

    try:
        cuobjdump = knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return ptxas_usage(compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.binary)
        cubin.flush()
        resources, sass = (_output(cuobjdump, what, cubin.name) for what in ("-res-usage", "-sass"))
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resources)
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    return Usage(registers, stack + local, Counter(name for name in _SASS.findall(sass) if not name.startswith("NOP")))


def ptxas_usage(compiled: Compiled) -> Usage:
    """Usage by the assembler's report on the kernel's PTX."""
    from triton import knobs

    architecture = re.search(r"\.target (sm_(\d+)\w*)", compiled.assembly)
    assert architecture is not None
    ptxas = knobs.nvidia.ptxas_blackwell if int(architecture[2]) >= 100 else knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.assembly)
        ptx.flush()
        words = _output(ptxas.path, "-v", f"-arch={architecture[1]}", "-o", os.devnull, ptx.name)
    registers = re.search(r"Used (\d+) registers", words)
    assert registers is not None
    # The stack frame includes the spilled registers; their stores and loads are reported separately.
    return Usage(int(registers[1]), sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", words))), Counter())


def _output(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return finished.stdout + finished.stderr


def amd_usage(compiled: Compiled) -> Usage:
    """Usage by the notes and instructions of AMD's assembly."""

    def note(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", compiled.assembly)[-1])

    spilled = note("vgpr_spill_count") + note("sgpr_spill_count")
    operations = Counter(
        re.findall(r"^\s+([vs]_\w+|(?:global|buffer|flat|scratch|ds)_\w+)", compiled.assembly, re.MULTILINE)
    )
    return Usage(note("vgpr_count"), note("private_segment_fixed_size") + 4 * spilled, operations)


def usage_of(call: Call, target: str) -> Usage:
    compiled = call.compile(target)
    return cuda_usage(compiled) if target.startswith("sm_") else amd_usage(compiled)


def check_memory(usage: Usage, target: str, narrow_loads: int, narrow_stores: int, *, wide_stores: bool = True) -> None:
    """Check that memory is global or shared, without atomics, and limit the number of narrow accesses.

    Args:
        usage: of the kernel.
        target: its GPU.
        narrow_loads: most instructions that load less than 16 bytes.
        narrow_stores: most instructions that store less.
        wide_stores: there have to be stores of 16 bytes.
    """
    assert usage.stack == 0
    if not usage.operations:
        pytest.skip("Triton came without cuobjdump: registers and stack are checked, instructions are not")
    if target.startswith("sm_"):
        wide: tuple[str, ...] = (".128", ".256")
        loads: tuple[str, ...] = ("LDG",)
        stores: tuple[str, ...] = ("STG",)
        forbidden = usage.count("LDL", "STL", "LD", "ST", "ATOM", "ATOMG", "ATOMS", "RED", "REDG")
    else:
        wide = ("dwordx4",)
        # Buffers are global memory with bounds; the stack, which they could be as well, is empty.
        loads, stores = ("global_load", "buffer_load"), ("global_store", "buffer_store")
        forbidden = sum(
            count
            for name, count in usage.operations.items()
            if name.startswith(("scratch_", "flat_")) or "atomic" in name
        )
    assert forbidden == 0

    def narrow(kind: tuple[str, ...]) -> int:
        return sum(n for name, n in usage.operations.items() if name.startswith(kind) and not name.endswith(wide))

    if wide_stores:
        assert any(name.startswith(stores) and name.endswith(wide) for name in usage.operations)
    assert narrow(loads) <= narrow_loads and narrow(stores) <= narrow_stores
