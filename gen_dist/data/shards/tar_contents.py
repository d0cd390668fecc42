"""Images and labels of a tar file in the WebDataset layout, found in one pass over its blocks.

Files of one sample stand one after another and differ in what follows the first dot of their names: `0017.jpg`,
`0017.cls`, `0017.json`. Format of the headers: POSIX.1-2001, "ustar Interchange Format", and GNU's long names.
"""

from __future__ import annotations

import collections
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.naming import printable
from gen_dist.data.shards.contents import (
    BLOCK_BYTES,
    LONG_ZEROS,
    MISSING,
    MOST_LABEL_CHARACTERS,
    NO_FILES,
    NO_IMAGE,
    NO_MARK,
    Contents,
    table_of,
)
from gen_dist.data.walking import EXTENSIONS
from gen_dist.errors import DataError

_RECORD = 512
_PAGE = 4096
"""Bytes by which systems write files: the data of a copy that was cut off end at a multiple of them."""
_MOST_WITHOUT_FILES = 2**16
"""Zero bytes of a tar file without files. A small shard whose copy was cut off has more, and leaving it out would lose
its images."""
_USUAL_BLOCK = 20 * _RECORD
"""Bytes to a multiple of which GNU tar, BSD tar and Python's tarfile fill up an archive."""
_TAPE_BLOCKS = tuple(2**power for power in range(14, 21))
"""Blocks of tapes."""
_BLOCKS = (
    *(2**power for power in range(9, 14)),
    _USUAL_BLOCK,
    *sorted({*_TAPE_BLOCKS, *range(2 * _USUAL_BLOCK, 2**22, _USUAL_BLOCK)}),
)
"""Blocks that programs or people choose (`tar -b N` takes any multiple of 512 bytes), the smallest first."""
_MOST_LABEL_BYTES = 2**20
_MOST_IMAGE_BYTES = 2**28
_LABEL_KEYS = ("label", "cls", "class")
_LONG_NAMES = b"LKxg"
_OF_NEXT_FILE = b"LKx"
_FILES = (b"0", b"\0", b"7")


def tar_contents(
    name: str,
    shard: str,
    blocks: Iterator[bytes],
    columns: tuple[str, ...] = (),
    names: list[str] | None = None,
) -> Contents:
    """Find the images of a tar file.

    Args:
        name: the source in error messages.
        shard: name of the file in error messages.
        blocks: its bytes, `BLOCK_BYTES` at a time.
        columns: keys of the sidecars with the labels. None named takes `label`, `cls` or `class`.
        names: takes the name of each image in the file, in their order, if it is given.

    Raises:
        DataError: it is damaged, cut off, no tar file or compressed, or a sample has two images.
    """
    return _Pass(name, shard, blocks, columns, names).contents()


class _Pass:
    def __init__(
        self, name: str, shard: str, blocks: Iterator[bytes], columns: tuple[str, ...], names: list[str] | None
    ) -> None:
        self._name = name
        self._columns = columns
        self._names = names
        self._shard = shard
        self._blocks = blocks
        self._held = b""
        self._held_from = 0
        """Offset of the first byte that is held."""
        self._crcs = array("I")
        self._bytes_taken = 0
        self._sha256 = hashlib.sha256()
        self._offsets, self._sizes = array("Q"), array("I")
        self._labels: list[str] = []
        self._left_out: collections.Counter[str] = collections.Counter()
        self._key = ""
        self._image: tuple[int, int] | None = None
        self._image_name = ""
        self._label: tuple[int, str] | None = None
        """Rank of the kind of the label, and its text: `.cls` goes before `.json`."""
        self._row: list[Any] | None = None
        """Attributes or numbers of the sample."""
        self._rows: list[list[Any] | None] = []

    def contents(self) -> Contents:
        place, long_name, kind, last = 0, "", b"", b""
        while header := self._bytes(place, _RECORD):
            if header.count(0) == _RECORD:
                break
            size, kind = self._size_and_kind(header, place)
            start, place = place + _RECORD, place + _RECORD + -(-size // _RECORD) * _RECORD
            if kind in _LONG_NAMES:
                long_name = _long_name(kind, self._whole(start, size)) or long_name
            else:
                if kind in _FILES:
                    self._add(long_name or _short_name(header), start, size)
                long_name = ""
            last = self._bytes(place - _RECORD, _RECORD) if size else header
        self._finish_sample()
        if kind and kind in _OF_NEXT_FILE:
            raise self._damaged("it ends behind a file's long name, without the file; copy it anew, or leave it out")
        self._take_end(place, last)
        table, columns = self._table()
        return Contents(
            np.frombuffer(self._offsets, np.uint64) if self._offsets else np.empty(0, np.uint64),
            np.frombuffer(self._sizes, np.uint32) if self._sizes else np.empty(0, np.uint32),
            np.array(self._labels, dtype=np.str_),
            np.arange(len(self._crcs), dtype=np.int64) * BLOCK_BYTES,
            np.array(self._crcs, np.uint32),
            self._sha256.hexdigest(),
            self._bytes_taken,
            left_out=dict(self._left_out),
            table=table,
            columns=columns,
        )

    def _take_end(self, place: int, last: bytes) -> None:
        """Take what is behind the last file: a digest is of all bytes.

        Args:
            place: offset behind the last file.
            last: last record of the last file.

        Raises:
            DataError: the file is empty, goes on behind the mark of its end, or its zeros may be those of a copy that
                was cut off.
        """
        if not self._bytes_taken:
            raise self._damaged("it is empty; write or copy it anew, or leave it out")
        rest = self._held[max(0, place - self._held_from) :]
        goes_on = rest.count(0) < len(rest)
        for block in self._blocks:
            self._take(block)
            goes_on |= block.count(0) < len(block)
        if goes_on:
            raise self._damaged("it goes on behind its end, as joined tar files do; write all files into one archive")
        zeros = self._bytes_taken - place
        if place:
            if end := self._end(zeros, place, last.count(0) == len(last)):
                self._left_out[end] += 1
        elif zeros <= _MOST_WITHOUT_FILES:
            self._left_out[NO_FILES] += 1
        else:
            raise self._damaged(
                f"all {zeros:,} bytes are zero, as of a copy that was cut off; copy it anew, or leave it out"
            )

    def _end(self, zeros: int, place: int, ends_in_zeros: bool) -> str:
        """Kind of the end of an archive with `zeros` zero bytes behind its last file; empty for a usual one.

        Two records of zeros mark the end, and more fill up the last block. A copy whose room was set aside and whose
        rest never came ends in zeros, too. Where those are more than usual blocks have, it is refused by its cut, which
        is at a page: within a file, whose end is zero then, or behind one, at a multiple of `_PAGE`. An archive with
        blocks of tapes may end at a page, since few others are a multiple of such a block. Everything else that is
        longer than usual gets a line: a cut at any byte can be within the zeros that fill up a file's last record.
        Within a usual block, a cut behind a file does not differ from padding.

        Raises:
            DataError: the zeros may be those of such a copy.
        """
        if zeros < 2 * _RECORD:  # some programs leave the mark out
            return NO_MARK
        total = place + zeros
        # A mark that straddles two blocks has a record before the last one.
        block = next((one for one in _BLOCKS if total % one == 0 and zeros <= one + _RECORD), None)
        if block and block <= _USUAL_BLOCK:
            return ""
        is_likely = block or (zeros <= _USUAL_BLOCK + _RECORD)
        if not is_likely or ends_in_zeros or (place % _PAGE == 0 and block not in _TAPE_BLOCKS):
            also = " and the end of its last file" if ends_in_zeros else ""
            raise self._damaged(
                f"its last {zeros:,} bytes{also} are zero, as of a copy that was cut off; copy it anew, write it anew "
                "with tar's usual blocks (-b 20), or leave it out"
            )
        return LONG_ZEROS

    def _size_and_kind(self, header: bytes, place: int) -> tuple[int, bytes]:
        if found := _size_and_kind(header):
            return found
        if not place:
            compressed = header[:2] == b"\x1f\x8b"
            raise self._damaged("it is compressed; unpack it with gunzip" if compressed else "it is no tar file")
        raise self._damaged(f"it is damaged or cut off at byte {place:,}; copy it anew, or leave it out")

    def _add(self, path: str, start: int, size: int) -> None:
        directory, _, base = path.rpartition("/")
        if base.startswith("."):
            return
        stem, _, ending = base.partition(".")
        key, ending = f"{directory}/{stem}", ending.lower()
        if key != self._key:
            self._finish_sample()
            self._key = key
        if ending == "npy" and self._image:  # values beside the image, such as features of it
            self._left_out[".npy"] += 1
        elif f".{ending}" in EXTENSIONS or ending == "npy":
            if self._image and self._image_name.lower().endswith(".npy"):
                self._left_out[".npy"] += 1
            elif self._image:
                raise self._damaged(f"sample {printable(key.lstrip('/'))} has two images; keep one of them")
            if size > _MOST_IMAGE_BYTES:
                raise self._damaged(f"an image at byte {start:,} has {size:,} bytes; at most {_MOST_IMAGE_BYTES:,} fit")
            in_last = max(size - 1, 0) % _RECORD + 1 if size else 0
            self._whole(start + size - in_last, in_last)  # an image that is cut off is not one
            self._image, self._image_name = (start, size), path
        elif ending == "cls" and not self._columns:
            self._take_label(0, self._text(start, size).decode("utf-8", "replace").strip(), start)
        elif ending == "json":
            found = _label_in(self._text(start, size), self._columns)
            if isinstance(found, str):
                self._take_label(1, found, start)
            else:
                self._row = found
        else:
            self._left_out[printable(f".{ending}")[:40]] += 1

    def _take_label(self, rank: int, label: str, start: int) -> None:
        if len(label) > MOST_LABEL_CHARACTERS:
            raise self._damaged(
                f"the label at byte {start:,} has {len(label):,} characters, more than {MOST_LABEL_CHARACTERS}; "
                "a label is the name or number of a class"
            )
        if label and self._label and self._label[0] == rank and self._label[1] != label:
            both = f"{printable(self._label[1])} and {printable(label)}"
            raise self._damaged(f"sample {printable(self._key.lstrip('/'))} has two labels, {both}; keep one of them")
        if label:
            self._label = min(self._label or (rank, label), (rank, label))

    def _finish_sample(self) -> None:
        if self._image:
            self._offsets.append(self._image[0])
            self._sizes.append(self._image[1])
            self._labels.append(self._label[1] if self._label else MISSING)
            self._rows.append(self._row if self._label is None else None)
            if self._names is not None:
                self._names.append(printable(self._image_name))
        elif self._key:
            self._left_out[NO_IMAGE] += 1
        self._image, self._label, self._row = None, None, None

    def _table(self) -> tuple[NDArray[Any] | None, tuple[str, ...]]:
        """Attributes or numbers of all samples; None if no sample has any."""
        if all(row is None for row in self._rows):
            return None, ()
        if any(label != MISSING for label in self._labels):
            raise self._damaged("some samples have a class and others attributes or numbers; write them alike")
        try:
            return table_of(self._rows, self._columns)
        except DataError as error:
            raise self._damaged(str(error)) from None

    def _text(self, start: int, size: int) -> bytes:
        """Bytes of a label or of JSON.

        Raises:
            DataError: as `_whole`, or they end in zeros, which no text does.
        """
        content = self._whole(start, size)
        if content and not any(content[-4:]):  # a character of UTF-32 has three
            raise self._damaged(
                f"the label at byte {start:,} ends in zeros, as of a copy that was cut off; copy it anew"
            )
        return content

    def _whole(self, start: int, size: int) -> bytes:
        """Bytes of a small file.

        Raises:
            DataError: the tar file ends before, or they are too many.
        """
        if size > _MOST_LABEL_BYTES:
            raise self._damaged(f"a label at byte {start:,} has {size:,} bytes")
        content = self._bytes(start, size)
        if len(content) < size or (self._held_from + len(self._held) < start):
            raise self._damaged("it is cut off; copy it anew, or leave it out")
        return content

    def _bytes(self, start: int, size: int) -> bytes:
        """Bytes from an offset on, fewer at the end. Offsets never become smaller."""
        while self._held_from + len(self._held) < start + size:
            block = next(self._blocks, b"")
            if not block:
                break
            self._take(block)
            kept = max(0, start - self._held_from)
            self._held_from += min(kept, len(self._held))
            self._held = self._held[kept:] + block
        first = start - self._held_from
        return self._held[first : first + size]

    def _take(self, block: bytes) -> None:
        self._crcs.append(zlib.crc32(block))
        self._sha256.update(block)
        self._bytes_taken += len(block)

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._name}: {printable(self._shard)}: {reason}")


def name_before(content: bytes) -> str | None:
    """Name of the file whose data begin where these bytes of a tar file end; None if its header is not among them."""
    header = content[-_RECORD:]
    if _size_and_kind(header) is None:
        return None
    for records in range(2, len(content) // _RECORD + 1):  # an entry with a long name stands right before it
        first = len(content) - records * _RECORD
        found = _size_and_kind(content[first : first + _RECORD])
        if found and found[1] in _LONG_NAMES and -(-found[0] // _RECORD) == records - 2:
            start = first + _RECORD
            return _long_name(found[1], content[start : start + found[0]]) or _short_name(header)
    return _short_name(header)


def _size_and_kind(header: bytes) -> tuple[int, bytes] | None:
    """Bytes of an entry and its kind; None if this is no header of one."""
    try:
        wanted = int(header[148:156].split(b"\0")[0] or b"0", 8)
        if len(header) == _RECORD and sum(header) - sum(header[148:156]) + 8 * 32 == wanted:
            field = header[124:136]
            size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)
            if size >= 0:
                return size, header[156:157]
    except ValueError:
        pass
    return None


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0].decode("utf-8", "surrogateescape")
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return f"{prefix.decode('utf-8', 'surrogateescape')}/{name}" if prefix else name


def _long_name(kind: bytes, content: bytes) -> str:
    """Name that an entry of the kind gives to the next file; empty if it gives none."""
    if kind == b"L":
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if kind != b"x":
        return ""
    for line in content.split(b"\n"):  # LENGTH KEY=VALUE
        _, _, pair = line.partition(b" ")
        if pair.startswith(b"path="):
            return pair[5:].decode("utf-8", "surrogateescape")
    return ""


def _label_in(content: bytes, columns: tuple[str, ...]) -> str | list[Any] | None:
    """Label in the JSON of a sample: a class, empty if there is none; or several, or a number, as a list."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    if len(columns) > 1:
        return [found.get(key) for key in columns]
    kinds = (int, str, float, list)
    label = next((found[key] for key in columns or _LABEL_KEYS if isinstance(found.get(key), kinds)), "")
    if isinstance(label, list):
        several: list[Any] = label
        return several
    if isinstance(label, float) or (columns and isinstance(label, bool)):
        return [label]
    return str(label).strip()
