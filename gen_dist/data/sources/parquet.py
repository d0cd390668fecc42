"""`parquet:PATH`: images in the Hugging Face layout, one row an image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.sources.source import SPLITS, Block, SplitName, register
from gen_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
# Rows read at once: small, as rows may be images of several MB.
_ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class _Part:
    """One parquet file."""

    path: Path
    rows: int
    image_column: str
    label_column: str | None
    label_names: tuple[str, ...] | None
    """From the Hugging Face metadata. None if they are not there."""


@dataclass
class Parquet:
    """Rows of one parquet file or of all in a directory.

    In a directory, files named train*, test* and validation* are the splits; `train.parquet` alone has its sibling
    `test.parquet` as test split. Else part of the images is held out.
    """

    path: Path
    default_size: int | None = None
    _splits: dict[SplitName, list[Path]] = field(init=False)

    def __post_init__(self) -> None:
        self._splits = self._find_files()

    @property
    def name(self) -> str:
        """`parquet:PATH`."""
        return f"parquet:{self.path}"

    @property
    def slug(self) -> str:
        """`parquet-` and the name of the file or directory."""
        return f"parquet-{self.path.resolve().name or 'root'}"

    @property
    def has_test_split(self) -> bool:
        """True if there are files of a test split."""
        return "test" in self._splits

    def fingerprint(self) -> object:
        """Names, sizes and times of the files."""
        return {split: [_file_stamp(path) for path in paths] for split, paths in self._splits.items()}

    def fetch(self) -> None:
        """Nothing to do."""

    def class_names(self) -> tuple[str, ...]:
        """Names in the Hugging Face metadata, else the numbers up to the highest label; `all` without labels."""
        first = self._parts["train"][0]
        if first.label_column is None:
            return ("all",)
        if first.label_names is not None:
            return first.label_names
        highest = max(int(labels.max(initial=0)) for split in self._splits for labels in self._labels[split])
        images = sum(part.rows for parts in self._parts.values() for part in parts)
        if highest >= images:
            raise DataError(
                f"{self.name}: label {highest} is out of range: it would make more classes than there are "
                f"images ({images})"
            )
        return tuple(str(label) for label in range(highest + 1))

    def image_count(self) -> int:
        """Rows in both splits."""
        return sum(part.rows for parts in self._parts.values() for part in parts)

    def blocks(self) -> Iterator[Block]:
        """Rows in the order of the files' names.

        Raises:
            DataError: a file is damaged.
        """
        import pyarrow.compute
        import pyarrow.parquet

        for split, parts in self._parts.items():
            for part, labels in zip(parts, self._labels[split], strict=True):
                first = 0
                try:
                    with pyarrow.parquet.ParquetFile(part.path) as file:
                        for batch in file.iter_batches(_ROWS_PER_BLOCK, columns=[part.image_column]):
                            column = batch.column(part.image_column)
                            if pyarrow.types.is_struct(column.type):
                                column = pyarrow.compute.struct_field(column, "bytes")
                            # A missing image is empty, and so unreadable.
                            images = [encoded or b"" for encoded in column.to_pylist()]
                            names = [f"{part.path.name} row {first + i}" for i in range(len(images))]
                            yield Block(split, images, labels[first : first + len(images)], names)
                            first += len(images)
                except (OSError, pyarrow.ArrowException) as error:
                    raise _damaged(self.name, part.path, error) from None

    def _find_files(self) -> dict[SplitName, list[Path]]:
        if self.path.is_file():
            test = self.path.with_name("test.parquet")
            if self.path.name == "train.parquet" and test.is_file():
                return {"train": [self.path], "test": [test]}
            return {"train": [self.path]}
        if not self.path.is_dir():
            raise DataError(f"{self.name}: there is no such file or directory")
        files = sorted(path for path in self.path.glob("*.parquet") if not path.name.startswith("."))
        if not files:
            raise DataError(f"{self.name}: no *.parquet files in that directory")
        test_files = [path for path in files if path.name.startswith("test")]
        validation = [path for path in files if path.name.startswith("val")]
        train = [path for path in files if path.name.startswith("train")]
        if not train:
            train = [path for path in files if path not in test_files and path not in validation]
        if not train:
            raise DataError(f"{self.name}: no train*.parquet files there, only {files[0].name} and the like")
        held_out = test_files or validation
        return {"train": train, "test": held_out} if held_out else {"train": train}

    @cached_property
    def _parts(self) -> dict[SplitName, list[_Part]]:
        parts = {split: [_inspect(self.name, path) for path in self._splits[split]] for split in self._in_order()}
        first = parts["train"][0]
        for part in (part for split_parts in parts.values() for part in split_parts):
            if (part.label_column, part.label_names) != (first.label_column, first.label_names):
                raise DataError(f"{self.name}: {part.path.name} has other labels or class names than {first.path.name}")
        return parts

    @cached_property
    def _labels(self) -> dict[SplitName, list[NDArray[np.int64]]]:
        return {split: [_read_labels(self.name, part) for part in self._parts[split]] for split in self._in_order()}

    def _in_order(self) -> list[SplitName]:
        return [split for split in SPLITS if split in self._splits]


def _file_stamp(path: Path) -> list[str | int]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _damaged(name: str, path: Path, error: Exception) -> DataError:
    reason = str(error).partition("\n")[0]
    return DataError(f"{name}: {path.name} is not a whole parquet file ({reason[:200]})")


def _inspect(name: str, path: Path) -> _Part:
    """Read the schema and the number of rows."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{name} needs pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(name, path, error) from None
    image_column = next((column for column in _IMAGE_COLUMNS if column in schema.names), None)
    if image_column is None:
        raise DataError(
            f"{name}: {path.name} has no column {' or '.join(_IMAGE_COLUMNS)}, only {', '.join(schema.names)}"
        )
    if not _holds_bytes(schema.field(image_column).type):
        raise DataError(
            f"{name}: column {image_column} of {path.name} is {schema.field(image_column).type}, not bytes of images"
        )
    label_column = next((column for column in _LABEL_COLUMNS if column in schema.names), None)
    if label_column is not None and not pyarrow.types.is_integer(schema.field(label_column).type):
        raise DataError(
            f"{name}: column {label_column} of {path.name} is {schema.field(label_column).type}, not integers"
        )
    return _Part(path, rows, image_column, label_column, _label_names(schema, label_column))


def _holds_bytes(column_type: pyarrow.DataType) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(column_type):
        position = column_type.get_field_index("bytes")
        return position >= 0 and _holds_bytes(column_type.field(position).type)
    return bool(pyarrow.types.is_binary(column_type) or pyarrow.types.is_large_binary(column_type))


def _label_names(schema: pyarrow.Schema, label_column: str | None) -> tuple[str, ...] | None:
    encoded = (schema.metadata or {}).get(b"huggingface")
    if encoded is None or label_column is None:
        return None
    # Written by any version of the datasets library: content that cannot be parsed counts as missing.
    try:
        feature: Any = json.loads(encoded)["info"]["features"][label_column]
        names = feature["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(str(label) for label in names) if isinstance(names, list) and names else None


def _read_labels(name: str, part: _Part) -> NDArray[np.int64]:
    """Labels int64 [rows]; all 0 without a label column."""
    import pyarrow
    import pyarrow.parquet

    if part.label_column is None:
        return np.zeros(part.rows, np.int64)
    try:
        column = pyarrow.parquet.read_table(part.path, columns=[part.label_column], partitioning=None)[0]
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(name, part.path, error) from None
    if column.null_count:
        raise DataError(f"{name}: {column.null_count} of {part.rows} labels in {part.path.name} are missing")
    labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return labels


register("parquet", lambda request: Parquet(request.path), takes_path=True)
