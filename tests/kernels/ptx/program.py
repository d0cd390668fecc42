"""Parser of PTX text to instructions (NVIDIA, "Parallel Thread Execution ISA")."""

import re
from dataclasses import dataclass

from tests.kernels.ptx.numbers import TYPES


class PtxError(Exception):
    """Error of a program: an operation that a GPU forbids, or that this executor does not implement."""


@dataclass(frozen=True)
class Register:
    """A general-purpose or special register, by name."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An immediate, as a Python integer with its bits."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable in shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Group:
    """{a, b, ...}, or the two results a|b of one instruction."""

    members: tuple["Operand", ...]


Operand = Register | Constant | Symbol | Address | Group


@dataclass(frozen=True)
class Instruction:
    """One instruction: [@[!]guard] name.modifier... operands.

    Attributes:
        name: first part of the opcode.
        modifiers: its other parts, types among them.
        operands: destination first, for those that have one.
        guard: predicate of the threads that run it, or None for all.
        negated: True if the guard must be false instead.
        text: its PTX.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    text: str

    @property
    def type(self) -> str:
        """Type of the operands: in PTX, the last modifier."""
        return self.modifiers[-1]

    @property
    def types(self) -> tuple[str, ...]:
        """Types among the modifiers; of two, the first is that of the result."""
        return tuple(word for word in self.modifiers if word in TYPES)


@dataclass(frozen=True)
class Program:
    """A kernel in PTX.

    Attributes:
        name: name of the entry.
        parameters: names in order.
        threads: threads of a program (PTX: CTA).
        instructions: instructions in order.
        labels: index of the instruction that follows each label.
        shared: address of each variable in shared memory.
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]


_INSTRUCTION = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"\s*(\$?[\w$]+):(?!:)")
_BEFORE = re.compile(r"\s*(?:[{}]|\.(?:loc|file|pragma)\b[^\n]*)")
_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?$")


def parse(ptx: str) -> Program:
    """Parse the single entry of a PTX module, by Triton or hand-written.

    Raises:
        PtxError: a statement is unknown, or the program uses local memory.
    """
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{(.*)", ptx, re.DOTALL)
    if entry is None:
        raise PtxError("no .entry")
    name, parameters, attributes, body = entry.groups()
    body = re.split(r"\n\s*\.section\b", body)[0]
    if re.search(r"\.local\b", body):
        raise PtxError("local memory")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", attributes)
    if threads is None:
        raise PtxError("no .reqntid")
    # Triton's kernels have one symbol of unspecified size, at the start of shared memory.
    shared = dict.fromkeys(re.findall(r"\.extern\s+\.shared[^;]*?(\w+)\s*\[\s*\]", ptx), 0)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        text = _after_labels(statement, labels, len(instructions))
        if text and not text.startswith(".reg"):
            instructions.append(_instruction(text))
    return Program(
        name=name,
        parameters=tuple(re.findall(r"(\w+)\s*(?:,|$)", parameters.strip())),
        threads=int(threads[1]),
        instructions=tuple(instructions),
        labels=labels,
        shared=shared,
    )


def _after_labels(statement: str, labels: dict[str, int], position: int) -> str:
    """Remove labels, braces of scopes and line numbers before the instruction of a statement."""
    while True:
        if label := _LABEL.match(statement):
            labels[label[1]] = position
            statement = statement[label.end() :]
        elif before := _BEFORE.match(statement):
            statement = statement[before.end() :]
        else:
            return statement.strip()


def _instruction(text: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise PtxError(f"not an instruction: {text}")
    negated, guard, opcode, operands = match.groups()
    name, *modifiers = opcode.replace("shared::cta", "shared").split(".")
    return Instruction(
        name=name,
        modifiers=tuple(modifiers),
        operands=tuple(_operand(operand) for operand in _split(operands)),
        guard=Register(guard) if guard else None,
        negated=bool(negated),
        text=" ".join(text.split()),
    )


def _split(operands: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands) if part.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "[":
        base, _, offset = text.strip("[] ").partition("+")
        return Address(_operand(base.strip()), int(offset.strip() or "0", 0))
    if text[0] == "{":
        return Group(tuple(_operand(part) for part in _split(text.strip("{} "))))
    if "|" in text:
        return Group(tuple(_operand(part.strip()) for part in text.split("|")))
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return Constant(int(text[2:], 16))
    if integer := _INTEGER.fullmatch(text):
        return Constant(int(integer[1] + integer[2], 0))
    return Register(text) if text[0] == "%" or text == "_" else Symbol(text)
