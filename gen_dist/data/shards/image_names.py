"""Names of the images of shards: that of the file in a tar, or the row of a parquet file. Read where images lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gen_dist.config.addresses import shown
from gen_dist.data.naming import Names, printable
from gen_dist.data.shards.contents import Contents
from gen_dist.data.shards.places import kind_of
from gen_dist.data.shards.reading import ShardImages
from gen_dist.data.shards.tar_contents import name_before
from gen_dist.errors import DataError

BYTES_BEFORE = 2**13
"""Bytes of a tar file before an image in which its name is looked for."""


def image_name(place: str, offset: int, before: bytes, row: int | None) -> str:
    """Name of an image, `0017.tar/cats/000123.jpg` or `0017.parquet row 123`.

    Args:
        place: its shard.
        offset: where it begins.
        before: bytes of a tar file that end there, `BYTES_BEFORE` of them if there are as many.
        row: its row in a parquet file; None if it is not known.
    """
    shard = printable(shown(place)).partition("?")[0].rpartition("/")[2]
    if kind_of("", place) == "tar":
        name = name_before(before)
        return f"{shard}/{printable(name)}" if name else f"{shard} byte {offset}"
    return f"{shard} byte {offset}" if row is None else f"{shard} row {row}"


class ShardNames(Names):
    """Names read from the shards: a table would hold gigabytes for large sets."""

    def __init__(self, images: ShardImages, contents: Callable[[str], Contents]) -> None:
        """
        Args:
            images: the images.
            contents: function that gives what a shard holds, which counts the rows of parquet files.
        """
        self._images = images
        self._contents = contents

    def __len__(self) -> int:
        return len(self._images)

    def name_of(self, row: int) -> str:
        """See Names."""
        shard, offset = self._images.place_of(row)
        if kind_of("", shard) == "tar":
            return image_name(shard, offset, self._images.read_before(row, BYTES_BEFORE), None)
        return image_name(shard, offset, b"", self._row(shard, offset))

    def _row(self, shard: str, offset: int) -> int | None:
        try:
            return int(np.searchsorted(self._contents(shard).offsets, offset))
        except DataError:  # the index is there, and what it was made of has gone
            return None
