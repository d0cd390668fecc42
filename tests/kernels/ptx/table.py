"""Table of the instructions that are implemented, with the modifiers and types that each allows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.kernels.ptx.machine import Operation
from tests.kernels.ptx.program import Instruction, PtxError


@dataclass(frozen=True)
class Entry:
    """An instruction in the table.

    Attributes:
        run: its implementation.
        modifiers: allowed modifiers, besides types.
        types: allowed types.
        numbers: allowed numbers of types.
    """

    run: Operation
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


_INSTRUCTIONS: dict[str, list[Entry]] = {}


def instruction_named(
    *names: str, modifiers: Iterable[str] = (), types: Iterable[str] = (), numbers: tuple[int, ...] = (1,)
) -> Callable[[Any], Any]:
    """Enter a function into the table; arguments as in `Entry`."""

    def enter(function: Operation) -> Operation:
        for name in names:
            entry = Entry(function, frozenset(modifiers), frozenset(types), numbers)
            _INSTRUCTIONS.setdefault(name, []).append(entry)
        return function

    return enter


def operation_of(instruction: Instruction) -> Operation:
    """Implementation of an instruction, from the table."""
    for entry in _INSTRUCTIONS.get(instruction.name, []):
        if entry.allows(instruction):
            return entry.run
    raise PtxError(f"unknown instruction or modifier: {instruction.text}")
