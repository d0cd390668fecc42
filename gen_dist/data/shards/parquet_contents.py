"""Images and labels of a parquet shard in the Hugging Face layout. A block is the images of a row group, end to end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.naming import printable
from gen_dist.data.parquet_reading import holds_bytes, holds_labels, is_list, is_text, label_names
from gen_dist.data.shards.contents import MISSING, MOST_LABEL_CHARACTERS, Contents, table_of
from gen_dist.data.shards.fetching import Facts, Fetcher
from gen_dist.data.shards.labels import USUAL_LABELS, LabelRequest
from gen_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# Arrow reads footers and columns in pieces; one request for a few of them is quicker.
_READ_AHEAD_BYTES = 2**16
_MOST_ROW_GROUP_BYTES = 2**29
# Many threads read, and each holds a row group as Arrow has it, as images and joined.
_LARGE_ROW_GROUP_BYTES = 2**26
_ONE_LARGE = threading.Lock()
_ROW_GROUPS_KEPT = 4


def parquet_contents(
    name: str, place: str, facts: Facts, fetcher: Fetcher, request: LabelRequest = USUAL_LABELS
) -> Contents:
    """Find the images of a parquet file.

    Args:
        name: the source in error messages.
        place: path or URL of the file.
        facts: its state.
        fetcher: its reader.
        request: columns of the labels.

    Raises:
        DataError: it is damaged, has no images, or labels are missing.
    """

    def read(file: pyarrow.parquet.ParquetFile) -> Contents:
        schema = file.schema_arrow
        columns = _label_columns(name, place, schema, request)
        column = columns[0] if columns and _are_classes(schema, columns) else None
        names = (label_names(schema, column) or ()) if column else ()
        sizes: list[int] = []
        labels: list[str] = []
        rows: list[list[Any] | None] = []
        starts: list[int] = []
        crcs: list[int] = []
        sha256 = hashlib.sha256()
        end = 0
        for group in range(file.num_row_groups):
            with _alone_if_large(file, group):
                images = _images(name, place, file, group)
                content = b"".join(images)
                sizes += map(len, images)
                del images
            labels += _labels(name, place, file, group, column, names, request)
            if columns and column is None:
                rows += _rows(file, group, columns)
            starts.append(end)
            crcs.append(zlib.crc32(content))
            sha256.update(content)
            end += len(content)
        table, of_table = _table(name, place, rows, columns)
        ends = np.cumsum(np.array(sizes, np.uint64)).astype(np.uint64)
        sizes_array = np.array(sizes, np.uint32)
        return Contents(
            offsets=ends - sizes_array,
            sizes=sizes_array,
            labels=np.array(labels, dtype=np.str_),
            block_starts=np.array(starts, np.int64),
            block_crcs=np.array(crcs, np.uint32),
            sha256=sha256.hexdigest(),
            end=end,
            class_names=names,
            table=table,
            columns=of_table,
        )

    return _opened(name, place, facts, fetcher, read)


def row_group(name: str, place: str, facts: Facts, fetcher: Fetcher, group: int) -> bytes:
    """Images of a row group, end to end.

    Raises:
        DataError: the file cannot be read or is damaged.
    """

    def read(file: pyarrow.parquet.ParquetFile) -> bytes:
        with _alone_if_large(file, group):
            return b"".join(_images(name, place, file, group))

    return _opened(name, place, facts, fetcher, read)


class RowGroupReader:
    """Reader of some images of parquet shards, for several threads. It keeps the last row groups, since images that lie
    apart in one are asked for one after another."""

    def __init__(self, name: str, fetcher: Fetcher) -> None:
        """
        Args:
            name: the source in error messages.
            fetcher: reader of files.
        """
        self._name = name
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()

    def read(self, place: str, contents: Contents, first: int, last: int) -> bytes:
        """Bytes of the images of a file, end to end, from one offset to another.

        Raises:
            DataError: the file cannot be read or is damaged.
        """
        groups = range(
            int(np.searchsorted(contents.block_starts, first, "right")) - 1,
            int(np.searchsorted(contents.block_starts, last, "left")),
        )
        content = b"".join(self._row_group(place, contents.facts, group) for group in groups)
        start = int(contents.block_starts[groups[0]])
        return content[first - start : last - start]

    def _row_group(self, place: str, facts: Facts, group: int) -> bytes:
        with self._lock:
            mine = (place, group) not in self._held
            held = self._held.setdefault((place, group), Future())
            while len(self._held) > _ROW_GROUPS_KEPT:
                self._held.popitem(last=False)
        if mine:
            try:
                held.set_result(row_group(self._name, place, facts, self._fetcher, group))
            except BaseException as error:
                held.set_exception(error)
        return held.result()


def _alone_if_large(file: pyarrow.parquet.ParquetFile, group: int) -> contextlib.AbstractContextManager[Any]:
    """Context manager in which a row group that is large is the only one of them in memory."""
    large = file.metadata.row_group(group).total_byte_size > _LARGE_ROW_GROUP_BYTES
    return _ONE_LARGE if large else contextlib.nullcontext()


def _images(name: str, place: str, file: pyarrow.parquet.ParquetFile, group: int) -> list[bytes]:
    import pyarrow.compute

    schema = file.schema_arrow
    column = next((one for one in IMAGE_COLUMNS if one in schema.names), None)
    if column is None or not holds_bytes(schema.field(column).type):
        columns = printable(", ".join(f"{one.name} ({one.type})" for one in schema))[:200]
        raise DataError(f"{name}: {_short(place)} has no column image or img with bytes of images, only {columns}")
    grown = file.metadata.row_group(group).total_byte_size
    if grown > _MOST_ROW_GROUP_BYTES:
        raise DataError(
            f"{name}: a row group of {_short(place)} has {grown:,} bytes, and one is read whole; write shards with at "
            f"most {_MOST_ROW_GROUP_BYTES:,} in each"
        )
    nested = pyarrow.types.is_struct(schema.field(column).type)
    images = file.read_row_group(group, [f"{column}.bytes" if nested else column], use_threads=False)[column]
    if nested:
        images = pyarrow.compute.struct_field(images, "bytes")
    return [encoded or b"" for encoded in images.to_pylist()]


def _labels(
    name: str,
    place: str,
    file: pyarrow.parquet.ParquetFile,
    group: int,
    column: str | None,
    names: tuple[str, ...],
    request: LabelRequest,
) -> list[str]:
    if column is None:
        return [MISSING] * file.metadata.row_group(group).num_rows
    found = file.read_row_group(group, [column], use_threads=False)[column]
    if found.null_count and not request.may_miss:
        raise DataError(
            f"{name}: {found.null_count} labels in {_short(place)} are missing; add them, or use --missing-labels "
            "unknown"
        )
    labels = found.to_pylist()
    kind = file.schema_arrow.field(column).type
    if is_text(kind):
        if (longest := max((len(label or "") for label in labels), default=0)) > MOST_LABEL_CHARACTERS:
            raise DataError(
                f"{name}: a label of {_short(place)} has {longest:,} characters, more than {MOST_LABEL_CHARACTERS}; a "
                "label is the name or number of a class"
            )
        return [label or MISSING for label in labels]
    known = [label for label in labels if label is not None]
    if names and known and not 0 <= min(known) <= max(known) < len(names):
        raise DataError(f"{name}: labels in {_short(place)} are {min(known)}..{max(known)}, of {len(names)} classes")
    return [MISSING if label is None else names[label] if names else str(label) for label in labels]


def _label_columns(name: str, place: str, schema: pyarrow.Schema, request: LabelRequest) -> tuple[str, ...]:
    """Columns of the labels; empty if there are none.

    Raises:
        DataError: one that was asked for is missing, or holds something else than labels.
    """
    columns = request.columns or tuple(one for one in LABEL_COLUMNS if one in schema.names)[:1]
    for column in columns:
        if column not in schema.names:
            others = printable(", ".join(schema.names))[:200]
            raise DataError(
                f"{name}: {_short(place)} has no column {printable(column)} of --label-columns, only {others}"
            )
        if not holds_labels(schema.field(column).type):
            kind = printable(str(schema.field(column).type))[:100]
            raise DataError(
                f"{name}: column {printable(column)} of {_short(place)} is {kind}, not integers, texts, booleans, "
                "floating point or lists of them; name others with --label-columns"
            )
    return columns


def _are_classes(schema: pyarrow.Schema, columns: tuple[str, ...]) -> bool:
    """True for one column of integers or texts."""
    import pyarrow

    kind = schema.field(columns[0]).type
    return len(columns) == 1 and (is_text(kind) or bool(pyarrow.types.is_integer(kind)))


def _rows(file: pyarrow.parquet.ParquetFile, group: int, columns: tuple[str, ...]) -> list[list[Any] | None]:
    """Attributes or numbers of the images of a row group."""
    found = file.read_row_group(group, list(columns), use_threads=False)
    if len(columns) == 1 and is_list(found[columns[0]].type):
        lists: list[list[Any] | None] = found[columns[0]].to_pylist()
        return lists
    return [list(row) for row in zip(*(found[column].to_pylist() for column in columns), strict=True)]


def _table(
    name: str, place: str, rows: list[list[Any] | None], columns: tuple[str, ...]
) -> tuple[NDArray[Any] | None, tuple[str, ...]]:
    """Attributes or numbers of all images of a file, and their names."""
    if all(row is None for row in rows):
        return None, ()
    try:
        return table_of(rows, columns)
    except DataError as error:
        raise DataError(f"{name}: {_short(place)}: {error}") from None


def _opened(
    name: str, place: str, facts: Facts, fetcher: Fetcher, use: Callable[[pyarrow.parquet.ParquetFile], Any]
) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{name} needs pyarrow; pip install pyarrow") from None
    try:
        # Open buffers would hold a whole row group twice.
        with pyarrow.parquet.ParquetFile(_RangeFile(place, facts.size, fetcher), pre_buffer=False) as file:
            return use(file)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        reason = printable(" ".join(str(error).split()))[:200]
        raise DataError(f"{name}: {_short(place)} is not a whole parquet file ({reason})") from None


def _short(place: str) -> str:
    return printable(place.rpartition("/")[2])


class _RangeFile(io.RawIOBase):
    """A file that is read by ranges."""

    def __init__(self, place: str, size: int, fetcher: Fetcher) -> None:
        self._place = place
        self._size = size
        self._fetcher = fetcher
        self._offset = 0
        self._held = b""
        self._held_from = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset."""
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def read(self, size: int = -1) -> bytes:
        """Bytes from here on, fewer at the end."""
        last = self._size if size < 0 else min(self._offset + size, self._size)
        first = min(self._offset, last)
        if not self._held_from <= first <= last <= self._held_from + len(self._held):
            end = min(max(last, first + _READ_AHEAD_BYTES), self._size)
            self._held_from = max(0, end - _READ_AHEAD_BYTES) if end == self._size else first
            self._held_from = min(self._held_from, first)
            self._held = self._fetcher.read(self._place, self._held_from, end) if end > self._held_from else b""
        self._offset = last
        return self._held[first - self._held_from : last - self._held_from]
