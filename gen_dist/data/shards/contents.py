"""Images of one shard: where each lies, its label, and digests of what was read."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config.addresses import shown
from gen_dist.data.array_bytes import DAMAGES, MOST_HEADER_BYTES, has_plain_header, is_array, loaded_array
from gen_dist.data.labelling import joined_columns, raw_labels
from gen_dist.data.naming import printable, some
from gen_dist.data.shards.fetching import Facts
from gen_dist.errors import DataError, number_of

_FORMAT = 2
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
    """Number of entries that are no images, by what they are; and 1 for an end by which images may be missing, by its
    kind in `ENDS`."""
    table: NDArray[Any] | None = None
    """Attributes or numbers of each image, [n, A], as `gen_dist.data.labelling.raw_labels` gives them. None if `labels`
    are classes."""
    columns: tuple[str, ...] = ()
    """Names of the columns of the table."""

    def to_bytes(self) -> bytes:
        """The contents as a file for `contents_of`."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {
            "format": np.array(_FORMAT),
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
        if self.table is not None:
            arrays |= {"table": self.table, "columns": np.array(self.columns, dtype=np.str_)}
        np.savez(stream, **arrays)
        return stream.getvalue()


def table_of(rows: Sequence[Sequence[Any] | None], asked: Sequence[str]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Attributes or numbers of images, and the names of their columns.

    Args:
        rows: values of each image, as JSON or parquet files have them; None for an image without any.
        asked: names that were asked for; else columns are counted, and a single one is `label`.

    Raises:
        DataError: images have different numbers of labels, or labels that cannot be learned.
    """
    widths = {len(row) for row in rows if row is not None}
    if len(widths) != 1 or 0 in widths:
        raise DataError(f"images have {min(widths)} to {max(widths)} labels; each needs as many, and one at least")
    (width,) = widths
    found = np.empty((len(rows), width), object)
    for number, row in enumerate(rows):
        found[number] = [None] * width if row is None else list(row)
    longest = max((len(one) for one in found.ravel().tolist() if isinstance(one, str)), default=0)
    if longest > MOST_LABEL_CHARACTERS:
        raise DataError(f"a label has {longest:,} characters, more than {MOST_LABEL_CHARACTERS}")
    names: tuple[str, ...]
    if width == 1:
        names = (asked[0] if asked else "label",)
    else:
        names = tuple(asked) if len(asked) == width else tuple(f"label_{i}" for i in range(width))
    columns = [raw_labels(column, len(rows)) for column in found.T]
    return joined_columns(columns, len(rows)), names


NO_FILES, NO_IMAGE = "archives without files", "samples without an image"
"""Kinds of what is left out that are no endings of names."""
_ONE = {NO_IMAGE: "sample without an image"}
NO_MARK = "without the mark of a shard's end, which may be cut off"
LONG_ZEROS = "with long zeros behind its files, which may be cut off"
"""Kinds of ends of archives whose images are used, as they stand in the contents of shards."""
ENDS = {
    NO_FILES: "{} without files {} left out: empty, or {} of which nothing has come",
    NO_MARK: "{} without the two records of zeros that mark the end {} used: written so, or {} cut off",
    LONG_ZEROS: "{} with more zeros behind the files than tar's usual blocks have {} used: written so, or {} cut off",
}
"""Kinds of ends of archives by which images may be missing, with their lines."""


class LeftOut:
    """Counts of what is left out of shards, and of ends of shards by which images may be missing."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._ends: dict[str, list[str]] = {}
        """Names of the shards with each kind of end."""

    def add(self, place: str, counts: Mapping[str, int]) -> None:
        """Count what is left out of a shard, from `Contents.left_out`."""
        for kind, count in counts.items():
            if kind in ENDS:
                self._ends.setdefault(kind, []).append(printable(shown(place).rpartition("/")[2]))
            else:
                self._counts[kind] = self._counts.get(kind, 0) + count

    def lines(self, heading: str, most: int | None = None) -> list[str]:
        """A line with the most frequent kinds of entries under a heading, and one for each kind of end."""
        several = sorted(self._counts.items(), key=lambda item: -item[1])[:most]
        texts = [f"{count:,} {_ONE.get(kind, kind) if count == 1 else kind}" for kind, count in several]
        lines = [f"{heading}: {', '.join(texts)}"] * bool(texts)
        for kind, text in ENDS.items():
            if names := self._ends.get(kind):
                one = len(names) == 1
                found = text.format(number_of(len(names), "archive"), *(("is", "a copy") if one else ("are", "copies")))
                lines.append(f"{found}; compare {'it' if one else 'them'} with the original: {some(names)}")
        return lines


MISSING = "\0none"
"""Label of an image without one."""
MOST_LABEL_CHARACTERS = 200
"""Longest label. Those of a shard are an array, each of whose rows has the length of the longest."""


def contents_of(content: bytes) -> Contents:
    """Contents from what `to_bytes` made.

    Raises:
        ValueError, KeyError, OSError: it is something else, or damaged; or of a version that read labels and arrays
            differently, and these images may have some.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            arrays = {name: _array_in(found, name) for name in found}
        contents = _contents_in(arrays)
        is_old = "format" not in arrays
        fits = _fit_together(contents)
    except (ValueError, KeyError, OSError):
        raise
    # Anyone may have written what lies beside shards.
    except (*DAMAGES, MemoryError) as error:
        raise ValueError(str(error)) from None
    if is_old and (".npy" in contents.left_out or MISSING in contents.labels):
        raise ValueError("contents of an older version")
    if not fits:
        raise ValueError("contents that do not fit together")
    return contents


def _array_in(archive: Any, name: str) -> NDArray[Any]:
    """Array of a name of an archive that `numpy.load` has opened.

    Raises:
        ValueError: it is not as `to_bytes` writes it.
    """
    members = archive.zip.namelist()
    member = name if name in members else f"{name}.npy"  # as NumPy chooses
    if member in members:
        with archive.zip.open(member) as file:
            start = file.read(MOST_HEADER_BYTES)
            if is_array(start) and not has_plain_header(start):
                raise ValueError(f"the header of {name} is damaged")
    return loaded_array(archive[name], name)


_DTYPES = {"offsets": np.uint64, "sizes": np.uint32, "block_starts": np.int64, "block_crcs": np.uint32}


def _fit_together(found: Contents) -> bool:
    """True if every image lies within blocks that are in their order, and has a label."""
    arrays = {name: getattr(found, name) for name in (*_DTYPES, "labels")}
    if any(one.ndim != 1 or one.dtype != _DTYPES.get(name, one.dtype) for name, one in arrays.items()):
        return False
    if found.labels.dtype.kind != "U" or len(found.block_starts) != len(found.block_crcs):
        return False
    one_an_image = {len(found.offsets), len(found.sizes), len(found.labels)}
    if found.table is not None:
        if found.table.ndim != 2 or found.table.shape[1] != len(found.columns):
            return False
        one_an_image.add(len(found.table))
    edges = np.concatenate([found.block_starts, [found.end]])
    within = (found.offsets <= found.end) & (found.offsets + found.sizes <= found.end)
    in_order = edges[0] == 0 and (np.diff(edges) >= 0).all()
    return len(one_an_image) == 1 and bool(in_order and within.all())


def _contents_in(found: Mapping[str, NDArray[Any]]) -> Contents:
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
        table=found.get("table"),
        columns=tuple(found["columns"].tolist()) if "columns" in found else (),
    )
