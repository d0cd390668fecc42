"""Files of packed images: their values, or their encoded bytes end to end and where each begins."""

from __future__ import annotations

import contextlib
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Images moved at once when some are taken out of a packed file: rows, fewer of large images.
_ROWS_PER_MOVE = 1024
_MOST_BYTES_MOVED = 2**26


class ArrayFile:
    """A .npy file of images [N, C, H, W] that grows. Plain writes, because a full disk kills a process that
    writes through a memory map."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path
        self._file = path.open("w+b")
        self._start = 0
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.uint8)

    def append(self, images: NDArray[Any]) -> None:
        """Write images [n, C, H, W] behind those of before."""
        if not self._shape:
            self._shape, self._dtype = images.shape[1:], images.dtype
            self._write_header()
            self._start = self._file.tell()
        self._file.write(np.ascontiguousarray(images).data)
        self.count += len(images)

    def some_rows(self, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Rows written so far, [n, C, H, W]: copies of a few of the given ones at a time, in their order."""
        self._file.flush()
        images = np.memmap(self._path, self._dtype, "r", offset=self._start, shape=(self.count, *self._shape))
        at_once = max(1, min(_ROWS_PER_MOVE, _MOST_BYTES_MOVED // (math.prod(self._shape) * self._dtype.itemsize)))
        for first in range(0, len(rows), at_once):
            yield images[rows[first : first + at_once]]

    def keep(self, rows: NDArray[np.int64], channels: int) -> None:
        """Keep only the given rows (ascending) and the first channels, in place.

        No row moves towards the end, so a block that has been read can be overwritten.
        """
        self._file.seek(self._start)
        for some in self.some_rows(rows):
            self._file.write(np.ascontiguousarray(some[:, :channels]).data)
        self._file.truncate()
        self.count, self._shape = len(rows), (channels, *self._shape[1:])

    def finish(self) -> None:
        """Write the number of images, and all to the disk."""
        self._file.seek(0)
        self._write_header()
        # NumPy pads headers so that the number of rows can grow without moving the data.
        assert self._file.tell() == self._start
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, finished or not."""
        # After a failed write, close tries to flush again and fails again; the first error is the one to show.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_header(self) -> None:
        shape = (self.count, *self._shape)
        header: dict[str, Any] = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class EncodedFile:
    """A .npy file of bytes, uint8 [all bytes], that grows, and beside it the offsets of its images, int64 [N + 1]."""

    def __init__(self, path: Path, offsets_path: Path) -> None:
        self._path = path
        self._offsets_path = offsets_path
        self._offsets = array("q", [0])
        self._file = path.open("w+b")
        self._write_header()
        self._start = self._file.tell()

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self._offsets) - 1

    def append(self, images: Sequence[bytes]) -> None:
        """Write encoded images behind those of before."""
        for image in images:
            self._file.write(image)
            self._offsets.append(self._offsets[-1] + len(image))

    def some_rows(self, rows: NDArray[np.int64]) -> Iterator[list[bytes]]:
        """Images written so far: a few of the given ones at a time, in their order."""
        self._file.flush()
        some: list[bytes] = []
        size = 0
        with self._path.open("rb") as file:
            for row in rows.tolist():
                first, end = self._offsets[row], self._offsets[row + 1]
                if some and size + end - first > _MOST_BYTES_MOVED:
                    yield some
                    some, size = [], 0
                file.seek(self._start + first)
                some.append(file.read(end - first))
                size += end - first
        if some:
            yield some

    def keep(self, rows: NDArray[np.int64], channels: int) -> None:
        """Keep only the given rows (ascending), in place. Their channels are a matter of decoding.

        No image moves towards the end, so one that has been read can be overwritten.
        """
        moved = array("q", [0])
        place = self._start
        for some in self.some_rows(rows):
            self._file.seek(place)
            for image in some:
                self._file.write(image)
                moved.append(moved[-1] + len(image))
            place = self._file.tell()
            self._file.flush()
        self._file.seek(place)
        self._file.truncate()
        self._offsets = moved

    def finish(self) -> None:
        """Write the number of bytes and the offsets, and all to the disk."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start  # NumPy pads headers so that the number can grow
        self._file.flush()
        os.fsync(self._file.fileno())
        with self._offsets_path.open("wb") as file:
            np.lib.format.write_array(file, np.array(self._offsets, np.int64), version=(1, 0), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the file, finished or not."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_header(self) -> None:
        header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (self._offsets[-1],)}
        np.lib.format.write_array_header_1_0(self._file, header)
