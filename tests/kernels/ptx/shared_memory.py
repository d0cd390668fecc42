"""Shared memory of a program, which detects races between its warps."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


class SharedMemory:
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
        self._reader[where] = np.where(is_other(self._reader[where], warps), self.SEVERAL, warps[:, None])
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


def is_other(touched: NDArray[np.int64], warps: NDArray[np.int64]) -> Mask:
    return (touched != SharedMemory.NOBODY) & (touched != warps[:, None])


def _others(touched: NDArray[np.int64], warps: NDArray[np.int64]) -> bool:
    return bool(is_other(touched, warps).any())
