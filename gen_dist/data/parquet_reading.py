"""Reading of parquet files in bounded memory, with errors of one line."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.labelling import MISSING
from gen_dist.data.naming import printable
from gen_dist.errors import DataError
from gen_dist.files import retrying

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

# Rows read at once: small, as rows may be images of several MB.
_MOST_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 2**26
# Encoded images hardly compress. Rows that grow more than this, to more than that, are a decompression bomb.
_MOST_GROWTH = 20
_MOST_GROWN_BYTES = 2**28


@contextlib.contextmanager
def opened(name: str, path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Context manager that opens a parquet file.

    Args:
        name: the source in error messages.
        path: the file.

    Raises:
        DataError: pyarrow is missing, the file is damaged, or memory is exhausted.
        OSError: the file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{name} needs pyarrow; pip install pyarrow") from None
    shown = printable(path.name)
    size = path.stat().st_size
    if not size:
        raise DataError(f"{name}: {shown} is empty: 0 bytes, not a whole parquet file")
    try:
        with retrying(lambda: pyarrow.parquet.ParquetFile(path)) as file:
            if not 0 <= file.metadata.num_rows <= size:
                raise DataError(f"{name}: {shown} has {size:,} bytes but says {file.metadata.num_rows:,} rows")
            yield file
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{name}: out of memory while reading {shown}; free some and try again") from None
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        # Arrow's own errors have no number, or EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(error.errno, error.strerror, str(path)) from None
        reason = printable(" ".join(str(error).split()))
        raise DataError(f"{name}: {shown} is not a whole parquet file ({reason[:200]})") from None


def image_rows(name: str, path: Path, column: str, first: int = 0, count: int | None = None) -> Iterator[list[bytes]]:
    """Bytes of the images of a column, some rows at a time; empty for missing ones.

    Args:
        name: the source in error messages.
        path: the file.
        column: the column.
        first: row to begin with. Row groups before it are not read.
        count: number of rows; None is all that follow.

    Raises:
        DataError, OSError: see `opened`.
    """
    import pyarrow
    import pyarrow.compute

    with opened(name, path) as file:
        nested = pyarrow.types.is_struct(file.schema_arrow.field(column).type)
        rows = _rows_at_once(name, path, file.metadata)
        block: list[bytes] = []
        size = 0
        groups, skipped = _groups_of(file.metadata, first, count)
        left = file.metadata.num_rows if count is None else count
        columns = [f"{column}.bytes" if nested else column]
        for batch in file.iter_batches(rows, groups, columns, use_threads=False):
            batch, skipped = batch.slice(skipped, left), max(0, skipped - len(batch))
            left -= len(batch)
            images = batch.column(column)
            if nested:
                images = pyarrow.compute.struct_field(images, "bytes")
            for encoded in images.to_pylist():
                if len(block) == _MOST_ROWS_AT_ONCE or (block and size + len(encoded or b"") > _BYTES_AT_ONCE):
                    yield block
                    block, size = [], 0
                block.append(encoded or b"")
                size += len(block[-1])
        if block:
            yield block


def _groups_of(metadata: pyarrow.parquet.FileMetaData, first: int, count: int | None) -> tuple[list[int], int]:
    """Row groups with the rows from `first` on, and the rows of the first of them that come before."""
    ends = np.cumsum([metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)], dtype=int)
    begins = int(np.searchsorted(ends, first, "right"))
    stops = len(ends) if count is None else int(np.searchsorted(ends, first + count, "left")) + 1
    before = int(ends[begins - 1]) if begins else 0
    return list(range(begins, min(stops, len(ends)))), first - before


def read_column(name: str, path: Path, column: str) -> pyarrow.ChunkedArray:
    """A whole column of numbers.

    Raises:
        DataError, OSError: see `opened`.
    """
    with opened(name, path) as file:
        return file.read([column], use_threads=False)[column]


def holds_bytes(column_type: pyarrow.DataType) -> bool:
    """True for bytes, and for a struct with a field `bytes` of them."""
    import pyarrow

    if pyarrow.types.is_struct(column_type):
        position = column_type.get_field_index("bytes")
        if position < 0:
            return False
        column_type = column_type.field(position).type
    return bool(pyarrow.types.is_binary(column_type) or pyarrow.types.is_large_binary(column_type))


def holds_labels(column_type: pyarrow.DataType) -> bool:
    """True for integers, texts, booleans and floating point, and for lists of them."""
    import pyarrow

    kinds = pyarrow.types
    of = column_type.value_type if is_list(column_type) or kinds.is_dictionary(column_type) else column_type
    return bool(kinds.is_integer(of) or kinds.is_boolean(of) or kinds.is_floating(of) or is_text(of))


def is_text(column_type: pyarrow.DataType) -> bool:
    """True for texts, plain or as a dictionary."""
    import pyarrow

    kinds = pyarrow.types
    of = column_type.value_type if kinds.is_dictionary(column_type) else column_type
    return bool(kinds.is_string(of) or kinds.is_large_string(of))


def no_labels(column_type: pyarrow.DataType, rows: int) -> NDArray[Any]:
    """Raw labels of rows that all lack theirs, in a column of this type; see `gen_dist.data.labelling.raw_labels`."""
    import pyarrow

    if is_text(column_type):
        return np.full(rows, "")
    if pyarrow.types.is_floating(column_type):
        return np.full((rows, 1), np.nan, np.float32)
    return np.full((rows, 1) if pyarrow.types.is_boolean(column_type) else rows, MISSING)


def is_list(column_type: pyarrow.DataType) -> bool:
    """True for lists of any length."""
    import pyarrow

    kinds = pyarrow.types
    return bool(kinds.is_list(column_type) or kinds.is_large_list(column_type) or kinds.is_fixed_size_list(column_type))


def label_names(schema: pyarrow.Schema, label_column: str) -> tuple[str, ...] | None:
    """Class names in the Hugging Face metadata of a file. None if they are not there."""
    encoded = (schema.metadata or {}).get(b"huggingface")
    if encoded is None or is_text(schema.field(label_column).type):
        return None
    # Written by any version of the datasets library: content that cannot be parsed counts as missing.
    try:
        feature: Any = json.loads(encoded)["info"]["features"][label_column]
        names = feature["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return tuple(printable(str(label)) for label in names) if isinstance(names, list) and names else None


def _rows_at_once(name: str, path: Path, metadata: pyarrow.parquet.FileMetaData) -> int:
    """Rows that fit into memory, also if a dictionary repeats in each of them an image that fills a whole row group.

    Python asks for the sizes of row groups alone: at those of a column with damaged statistics, pyarrow 26 ends the
    process.
    """
    stored, most = path.stat().st_size, 1
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        grown = group.total_byte_size
        if grown > _MOST_GROWN_BYTES and grown > _MOST_GROWTH * stored:
            raise DataError(
                f"{name}: {group.num_rows:,} rows of {printable(path.name)} would grow from {stored:,} to {grown:,} "
                "bytes when they are decompressed; encoded images do not"
            )
        most = max(most, grown)
    return max(1, min(_MOST_ROWS_AT_ONCE, _BYTES_AT_ONCE * 2 // most))
