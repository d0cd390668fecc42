"""Accesses of a launch to global memory, byte by byte."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Access:
    """Accesses of one instruction to one buffer.

    Attributes:
        kind: load or store.
        width: bytes per thread.
        offsets: int64, the first byte of each thread that took part.
        programs: int64, the program of each of these threads.
    """

    kind: Literal["load", "store"]
    width: int
    offsets: NDArray[np.int64]
    programs: NDArray[np.int64]


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

    def bytes_of_programs(self, argument: int, kind: Literal["load", "store"]) -> int:
        """Bytes of an argument that programs load or store, each counted once per program.

        All threads of a program may read one number: it moves from memory at most once, then from the nearest cache.
        """
        touched = [
            (access.programs << np.int64(40)) + access.offsets + byte
            for access in self.accesses.get(argument, [])
            if access.kind == kind
            for byte in range(access.width)
        ]
        return len(np.unique(np.concatenate(touched))) if touched else 0

    def widths(self, argument: int, kind: Literal["load", "store"]) -> Counter[int]:
        """Number of accesses per thread by width in bytes."""
        widths: Counter[int] = Counter()
        for access in self.accesses.get(argument, []):
            if access.kind == kind:
                widths[access.width] += len(access.offsets)
        return widths
