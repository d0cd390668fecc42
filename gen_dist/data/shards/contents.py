"""Images of one shard: where each lies, its label, and digests of what was read."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.shards.fetching import Facts

BLOCK_BYTES = 2**20
"""Bytes of a tar file that are fetched and kept together. A block of a parquet file is a row group."""


@dataclass
class Contents:
    """Images of a shard, in its order.

    Offsets count in the bytes of the tar file, or in the images of the parquet file laid end to end.
    """

    offsets: NDArray[np.uint64]
    """uint64 [n]."""
    sizes: NDArray[np.uint32]
    """Bytes of each encoded image, uint32 [n]."""
    labels: NDArray[np.str_]
    """Labels as texts, [n]; `MISSING` where there are none."""
    block_starts: NDArray[np.int64]
    """Offset of each block."""
    block_crcs: NDArray[np.uint32]
    """CRC-32 of each block."""
    sha256: str
    """Digest of all blocks."""
    end: int
    """Offset behind the last block."""
    class_names: tuple[str, ...] = ()
    """Names of the labels in their order, where the shard says them."""
    facts: Facts = field(default_factory=lambda: Facts(0, ""))
    """State of the file when it was read."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Entries that are no images, by what they are."""

    def to_bytes(self) -> bytes:
        """The contents as a file for `contents_of`."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {
            "offsets": self.offsets,
            "sizes": self.sizes,
            "labels": self.labels,
            "block_starts": self.block_starts,
            "block_crcs": self.block_crcs,
            "sha256": np.array(self.sha256),
            "class_names": np.array(self.class_names, dtype=np.str_),
            "end": np.array(self.end),
            "size": np.array(self.facts.size),
            "tag": np.array(self.facts.tag),
            "left_out": np.array(list(self.left_out), dtype=np.str_),
            "left_out_counts": np.array(list(self.left_out.values()), np.int64),
        }
        np.savez(stream, **arrays)
        return stream.getvalue()


MISSING = "\0none"
"""Label of an image without one."""
MOST_LABEL_CHARACTERS = 200
"""Longest label. Those of a shard are an array, each of whose rows has the length of the longest."""


def contents_of(content: bytes) -> Contents:
    """Contents from what `to_bytes` made.

    Raises:
        ValueError, KeyError, OSError: it is something else.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as found:
        left_out = dict(zip(found["left_out"].tolist(), found["left_out_counts"].tolist(), strict=True))
        return Contents(
            offsets=found["offsets"],
            sizes=found["sizes"],
            labels=found["labels"],
            block_starts=found["block_starts"],
            block_crcs=found["block_crcs"],
            sha256=str(found["sha256"]),
            end=int(found["end"]),
            class_names=tuple(found["class_names"].tolist()),
            facts=Facts(int(found["size"]), str(found["tag"])),
            left_out=left_out,
        )
