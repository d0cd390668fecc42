"""Branches, barriers and shuffles."""

import numpy as np

from tests.kernels.ptx.machine import WARP, Machine
from tests.kernels.ptx.program import Group, Instruction, Symbol
from tests.kernels.ptx.table import instruction_named


@instruction_named("bra", modifiers=["uni"], numbers=(0,))
def _branch(machine: Machine, instruction: Instruction) -> None:
    (target,) = instruction.operands
    if not isinstance(target, Symbol) or target.name not in machine.program.labels:
        raise machine.error("unknown label")
    machine.position = np.where(machine.active, machine.program.labels[target.name], machine.position)


@instruction_named("ret", "exit", numbers=(0,))
def _return(machine: Machine, instruction: Instruction) -> None:
    machine.position = np.where(machine.active, len(machine.program.instructions), machine.position)


@instruction_named("bar", modifiers=["sync", "warp"], numbers=(0,))
def _barrier(machine: Machine, instruction: Instruction) -> None:
    group = WARP if "warp" in instruction.modifiers else machine.width
    arrived = machine.active.reshape(-1, group)
    if (arrived.any(1) != arrived.all(1)).any():
        raise machine.error("barrier that not all threads reach")
    if group == machine.width:
        machine.shared.barrier(np.flatnonzero(arrived.any(1)))


@instruction_named("shfl", modifiers=["sync", "bfly", "idx", "up", "down"], types=["b32"])
def _shuffle(machine: Machine, instruction: Instruction) -> None:
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
