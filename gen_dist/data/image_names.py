"""Names of packed images: the files that they come from, or their rows in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.naming import printable
from gen_dist.data.sources.source import SplitName

_LINE_END = ord("\n")


def names_file(split: SplitName) -> str:
    """Name of the file with the names of the images of a split."""
    return f"{split}_names.npy"


class ImageNames(Sequence[str]):
    """Names in the order of the images, one line of UTF-8 each in one memory-mapped array."""

    def __init__(self, lines: NDArray[np.uint8]) -> None:
        """`lines` is uint8 [bytes]; each name ends with a line feed."""
        self._lines = lines

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        first = self._ends[place - 1] + 1 if place else 0
        return self._lines[first : self._ends[place]].tobytes().decode(errors="replace")

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
