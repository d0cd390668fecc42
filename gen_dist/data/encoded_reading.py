"""Images that are packed as they are encoded, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.deep_files import Keeping
from gen_dist.data.fitting import Fitting
from gen_dist.data.on_demand import ImagesOnDemand
from gen_dist.errors import DataError


class PackedBytes:
    """Encoded images of a split; see `gen_dist.data.on_demand.EncodedImages`."""

    waits_for_servers = False

    def __init__(self, path: Path, content: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """
        Args:
            path: the file, for errors.
            content: bytes of all images end to end, memory-mapped.
            offsets: offset of each, and the number of bytes, int64 [N + 1].
        """
        self._path = path
        # Parts of a memory map are maps again, which takes longer than their bytes.
        self._content = content.view(np.ndarray)
        self._offsets = offsets.view(np.ndarray)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, row: int) -> bytes:
        """Encoded image of a row."""
        return self._content[int(self._offsets[row]) : int(self._offsets[row + 1])].tobytes()

    def name(self, row: int) -> str:
        """File and row."""
        return f"image {row} of {self._path}"

    def instead_of(self, row: int, reason: str) -> Iterator[int]:
        """No row: all images were decoded when they were packed."""
        reason = " ".join(reason.split())[:200]
        raise DataError(f"{self.name(row)} is damaged ({reason}); remove {self._path.parent}, and it is packed again")

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Nothing: the bytes are at hand."""

    def interrupt(self, ended: bool) -> None:
        """Nothing: no thread waits for a server."""


def encoded_images(path: Path, content: NDArray[np.uint8], offsets: NDArray[np.int64], facts: dict[str, Any]) -> Any:
    """Images of a split, indexed like an array [N, C, H, W].

    Args:
        path: the file, for errors.
        content: bytes of all images end to end.
        offsets: int64 [N + 1].
        facts: what packing found out about decoding, from JSON.
    """
    fitting = None if facts["fitting"] is None else Fitting(*facts["fitting"])
    packed = PackedBytes(path, content, offsets)
    deep, pages = facts["keeping"]
    keeping, reduces = Keeping(deep, pages), facts["reduces_colour"]
    return ImagesOnDemand(packed, fitting, facts["shape"], facts["dtype"], keeping, reduces_colour=reduces)
