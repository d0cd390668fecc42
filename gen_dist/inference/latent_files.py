"""Files with the latents of images, as bytes: parquet, safetensors, npz and csv, each a function of its rows alone."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

FileFormat = Literal["parquet", "safetensors", "npz", "csv"]
Rows = dict[str, Any]
"""Values of some images by column: an array [n, ...], or a list of n texts."""

TEXT = "text"
_NUMBERS_AS_TEXT = 2**17
"""Numbers that are text at once: Python's texts take 50 times the memory of float32."""


class Column(NamedTuple):
    """One value or array of each image."""

    name: str
    dtype: str
    """NumPy's name of the dtype, or `text`."""
    shape: tuple[int, ...]
    """Shape for one image; () for a number."""
    meaning: str

    @property
    def size(self) -> int:
        """Numbers for one image."""
        return int(np.prod(self.shape, dtype=np.int64))


def joined(parts: Iterable[Rows]) -> Rows:
    """Rows of several parts, in their order."""
    parts = list(parts)
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: np.concatenate(values)
        if isinstance(values[0], np.ndarray)
        else [text for part in values for text in part]
        for name, values in columns.items()
    }


def as_parquet(columns: Sequence[Column], rows: Rows, facts: Mapping[str, Any]) -> bytes:
    """One row group; arrays are fixed-size lists of their numbers in C order, whose shapes stand in the metadata.

    Args:
        columns: what the rows have.
        rows: of one shard.
        facts: JSON of the file's metadata `gen_dist`.
    """
    import pyarrow
    import pyarrow.parquet

    arrays, fields = [], []
    for column in columns:
        values = rows[column.name]
        if column.dtype == TEXT:
            array = pyarrow.array(values, pyarrow.string())
        else:
            array = pyarrow.array(values.reshape(-1))
            if column.shape:
                array = pyarrow.FixedSizeListArray.from_arrays(array, column.size)
        arrays.append(array)
        metadata = {"meaning": column.meaning, "shape": json.dumps(column.shape)}
        fields.append(pyarrow.field(column.name, array.type, nullable=False, metadata=metadata))
    table = pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields, {"gen_dist": json.dumps(facts)}))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        sink,
        row_group_size=max(1, len(table)),
        compression="none",  # numbers of a network have no repetition
        use_dictionary=[column.name for column in columns if column.dtype == TEXT],
        write_page_checksum=True,
    )
    return sink.getvalue()


def as_safetensors(columns: Sequence[Column], rows: Rows, facts: Mapping[str, Any]) -> bytes:
    """Tensors by column; texts are lists in the metadata `gen_dist`, JSON, beside the facts."""
    from safetensors.numpy import save

    texts = {column.name: rows[column.name] for column in columns if column.dtype == TEXT}
    tensors = {column.name: rows[column.name] for column in columns if column.dtype != TEXT}
    # One entry: the order of several is random, and the bytes with it.
    return save(tensors, {"gen_dist": json.dumps({**facts, **texts})})


def from_safetensors(columns: Sequence[Column], content: bytes) -> Rows:
    """Rows of `as_safetensors`."""
    from safetensors.numpy import load

    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    texts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["gen_dist"])
    return {column.name: (texts if column.dtype == TEXT else tensors)[column.name] for column in columns}


def as_npz(columns: Sequence[Column], rows: Rows, facts: Mapping[str, Any]) -> bytes:
    """Arrays by column, as of numpy.savez; texts as arrays of text. The facts are the text `gen_dist`."""
    arrays = {column.name: np.asarray(rows[column.name]) for column in columns}
    arrays["gen_dist"] = np.asarray(json.dumps(facts))
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, array in arrays.items():
            # numpy.savez would write the time.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return sink.getvalue()


def as_csv(columns: Sequence[Column], rows: Rows, facts: Mapping[str, Any]) -> bytes:
    """A line for each image under a line of names; the numbers of an array are `mean_0`, `mean_1`, ... in C order.

    Floats have as many digits as give the same float32 again. A table has no place for the facts.
    """
    del facts
    names: list[str] = []
    for column in columns:
        names += [f"{column.name}_{place}" for place in range(column.size)] if column.shape else [column.name]
    count, at_once = len(rows[columns[0].name]), max(1, _NUMBERS_AS_TEXT // len(names))
    sink = io.BytesIO()
    with io.TextIOWrapper(sink, "utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for first in range(0, count, at_once):
            some = [np.asarray(rows[column.name][first : first + at_once]) for column in columns]
            cells = [values.reshape(len(values), -1).astype(str).astype(object) for values in some]
            writer.writerows(np.concatenate(cells, axis=1).tolist())
        text.flush()
        return sink.getvalue()


WRITERS = {"parquet": as_parquet, "safetensors": as_safetensors, "npz": as_npz, "csv": as_csv}
"""Functions from columns, rows and facts to the bytes of a file, by format."""
