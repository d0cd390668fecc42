"""Names of packed images: the files that they come from, or their rows in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.naming import Names, printable
from gen_dist.data.sources.source import SplitName

_LINE_END = ord("\n")


def names_file(split: SplitName) -> str:
    """Name of the file with the names of the images of a split."""
    return f"{split}_names.npy"


class ImageNames(Names):
    """Names in the order of the images, one line of UTF-8 each in one memory-mapped array."""

    def __init__(self, lines: NDArray[np.uint8]) -> None:
        """`lines` is uint8 [bytes]; each name ends with a line feed."""
        self._lines = lines

    def __len__(self) -> int:
        return len(self._ends)

    def name_of(self, row: int) -> str:
        """See Names."""
        first = self._ends[row - 1] + 1 if row else 0
        return self._lines[first : self._ends[row]].tobytes().decode(errors="replace")

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._lines == _LINE_END)


def write_names(path: Path, names: Sequence[str]) -> None:
    """Write names for `ImageNames`. Control characters become escapes, so that a name stays on its line.

    Raises:
        OSError: the file cannot be written.
    """
    lines = "".join(f"{name if name.isprintable() else printable(name)}\n" for name in names)
    with path.open("wb") as file:
        array = np.frombuffer(lines.encode(errors="backslashreplace"), np.uint8)
        np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
