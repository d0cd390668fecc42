"""`parquet:PATH`: images in the Hugging Face layout, one row an image."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.decoding import UnreadableImage, read_header
from gen_dist.data.deep_files import Keeping, common_dtype
from gen_dist.data.identity import content_sample, stamp
from gen_dist.data.naming import printable
from gen_dist.data.parquet_files import Splits, find_files
from gen_dist.data.parquet_reading import holds_bytes, image_rows, is_integer, opened, read_column
from gen_dist.data.sources.source import SPLITS, Block, Request, SplitName, register
from gen_dist.errors import DataError
from gen_dist.files import retrying

if TYPE_CHECKING:
    import pyarrow

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


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
    _splits: Splits = field(init=False)
    _remarks: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._splits, self._remarks = retrying(lambda: find_files(self.name, self.path))

    @property
    def name(self) -> str:
        """`parquet:PATH`."""
        return f"parquet:{printable(str(self.path))}"

    @property
    def slug(self) -> str:
        """`parquet-` and the name of the file or directory."""
        return f"parquet-{self.path.resolve().name or 'root'}"

    @property
    def has_test_split(self) -> bool:
        """True if there are files of a test split."""
        return "test" in self._splits

    def fingerprint(self) -> object:
        """Path, names and stamps of the files, and a part of their content."""
        stamps = {split: [[path.name, *stamp(path.stat())] for path in paths] for split, paths in self._splits.items()}
        files = [(str(path), path.stat().st_size) for paths in self._splits.values() for path in paths]
        return [os.fsencode(self.path.resolve()).hex(), stamps, content_sample(files)]

    def remarks(self) -> list[str]:
        """Files that are not used."""
        return self._remarks

    def deep_dtype(self) -> str | None:
        """See `KeepsDepth`. The headers of all images are read, or those up to the first 8-bit image."""
        return self._deep_dtype

    @cached_property
    def _deep_dtype(self) -> str | None:
        return common_dtype(self._dtypes())

    def _dtypes(self) -> Iterator[str]:
        for image in (image for block in self.blocks() for image in block.images):
            with contextlib.suppress(UnreadableImage):
                yield read_header(image, Keeping(deep=True, pages="first")).dtype

    def fetch(self) -> None:
        """Nothing to do."""

    def class_names(self) -> tuple[str, ...]:
        """Names in the Hugging Face metadata, else the numbers up to the highest label; `all` without labels."""
        first = self._parts["train"][0]
        images = self.image_count()
        if not images:
            raise DataError(f"{self.name}: it has no images: no rows in {first.path.name}")
        if first.label_column is None:
            return ("all",)
        if first.label_names is not None:
            return first.label_names
        highest = max(int(labels.max(initial=0)) for split in self._splits for labels in self._labels[split])
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
        for split, parts in self._parts.items():
            for part, labels in zip(parts, self._labels[split], strict=True):
                first = 0
                for images in image_rows(self.name, part.path, part.image_column):
                    names = [f"{printable(part.path.name)} row {first + i}" for i in range(len(images))]
                    yield Block(split, images, labels[first : first + len(images)], names)
                    first += len(images)

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


def _inspect(name: str, path: Path) -> _Part:
    """Read the schema and the number of rows."""
    with opened(name, path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    image_column = next((column for column in _IMAGE_COLUMNS if column in schema.names), None)
    if image_column is None:
        columns = printable(", ".join(schema.names))[:200]
        raise DataError(f"{name}: {path.name} has no column {' or '.join(_IMAGE_COLUMNS)}, only {columns}")
    column_type = printable(str(schema.field(image_column).type))[:100]
    if rows and not holds_bytes(schema.field(image_column).type):
        raise DataError(f"{name}: column {image_column} of {path.name} is {column_type}, not bytes of images")
    label_column = next((column for column in _LABEL_COLUMNS if column in schema.names), None)
    if label_column is not None and rows and not is_integer(schema.field(label_column).type):
        label_type = printable(str(schema.field(label_column).type))[:100]
        raise DataError(f"{name}: column {label_column} of {path.name} is {label_type}, not integers")
    return _Part(path, rows, image_column, label_column, _label_names(schema, label_column))


def _label_names(schema: pyarrow.Schema, label_column: str | None) -> tuple[str, ...] | None:
    encoded = (schema.metadata or {}).get(b"huggingface")
    if encoded is None or label_column is None:
        return None
    # Written by any version of the datasets library: content that cannot be parsed counts as missing.
    try:
        feature: Any = json.loads(encoded)["info"]["features"][label_column]
        names = feature["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return tuple(printable(str(label)) for label in names) if isinstance(names, list) and names else None


def _read_labels(name: str, part: _Part) -> NDArray[np.int64]:
    """Labels int64 [rows]; all 0 without a label column."""
    if part.label_column is None or not part.rows:
        return np.zeros(part.rows, np.int64)
    column = read_column(name, part.path, part.label_column)
    if column.null_count:
        raise DataError(f"{name}: {column.null_count} of {part.rows} labels in {part.path.name} are missing")
    labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return labels


def _open(request: Request) -> Parquet:
    if request.packing.pages == "images":
        name = printable(str(request.path))
        raise DataError(f"parquet:{name}: a row is one image, and --pages images is for folder:PATH; leave it out")
    return Parquet(request.path)


register("parquet", _open, takes_path=True)
