"""A plug-in to copy: a source of images that reads a binary format of its own.

    gen-dist train vae-mnist --plugin toy_source.py --data toy:digits.toy

A `.toy` file is `TOY1`, then count, height, width and number of classes as little-endian uint32, then for each image
one byte for its label and height x width bytes of grey levels. `write_toy` makes one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.identity import content_sample, stamp
from gen_dist.data.sources.source import Block, Request, register
from gen_dist.errors import DataError

_HEADER = struct.Struct("<4s4I")
_IMAGES_AT_ONCE = 1024


def write_toy(path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int) -> None:
    """Write images uint8 [N, H, W] with labels int64 [N]."""
    rows = np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1)
    path.write_bytes(_HEADER.pack(b"TOY1", *images.shape, classes) + rows.tobytes())


@dataclass(frozen=True)
class ToySource:
    """One file; a part of its images is held out for testing."""

    path: Path
    has_test_split: bool = False
    default_size: int | None = None

    @property
    def name(self) -> str:
        """The source as the user wrote it."""
        return f"toy:{self.path}"

    @property
    def slug(self) -> str:
        """Start of the name of the packed cache."""
        return f"toy-{self.path.stem}"

    def fingerprint(self) -> object | None:
        """The packed cache belongs to this path, these times and this content."""
        if not self.path.exists():
            return None
        status = self.path.stat()
        content = content_sample([(str(self.path), status.st_size)])
        return [os.fsencode(self.path.resolve()).hex(), stamp(status), content]

    def remarks(self) -> list[str]:
        """Nothing of the file is left out."""
        return []

    def fetch(self) -> None:
        """Nothing can be downloaded.

        Raises:
            DataError: the file is missing.
        """
        if not self.path.exists():
            raise DataError(f"{self.name}: there is no such file")

    def class_names(self) -> tuple[str, ...]:
        """Numbers, since the format has no names."""
        return tuple(str(label) for label in range(self._header()[3]))

    def image_count(self) -> int | None:
        """Number of images, for the progress bar."""
        return self._header()[0]

    def blocks(self) -> Iterator[Block]:
        """About a thousand images at a time, so that memory stays small.

        Raises:
            DataError: the file is shorter than its header says, or a label is not below the number of classes.
        """
        count, height, width, classes = self._header()
        with self.path.open("rb") as file:
            file.seek(_HEADER.size)
            for first in range(0, count, _IMAGES_AT_ONCE):
                rows = min(_IMAGES_AT_ONCE, count - first)
                content = file.read(rows * (1 + height * width))
                if len(content) < rows * (1 + height * width):
                    raise DataError(f"{self.name}: it ends within image {first + len(content) // (1 + height * width)}")
                table = np.frombuffer(content, np.uint8).reshape(rows, -1)
                labels = table[:, 0].astype(np.int64)
                if labels.max(initial=0) >= classes:
                    raise DataError(f"{self.name}: label {labels.max()} is not below its {classes} classes")
                yield Block("train", table[:, 1:].reshape(rows, 1, height, width), labels, self.name)

    def _header(self) -> tuple[int, int, int, int]:
        with self.path.open("rb") as file:
            content = file.read(_HEADER.size)
        if len(content) < _HEADER.size or not content.startswith(b"TOY1"):
            raise DataError(f"{self.name}: it does not begin as a .toy file")
        _, count, height, width, classes = _HEADER.unpack(content)
        return count, height, width, classes


def open_toy(request: Request) -> ToySource:
    """Open `--data toy:PATH`."""
    return ToySource(request.path)


register("toy", open_toy, takes_path=True)
