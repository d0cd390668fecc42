"""`parquet:PATH`: images in the Hugging Face layout, one row an image."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config.labels import NO_LABELS, LabelScheme
from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.deep_files import Keeping, common_dtype
from gen_dist.data.headers import read_header
from gen_dist.data.identity import content_sample, stamp
from gen_dist.data.labelling import joined_columns, kind_of, numbered, raw_labels
from gen_dist.data.naming import printable
from gen_dist.data.parquet_files import Splits, find_files
from gen_dist.data.parquet_reading import (
    holds_bytes,
    holds_labels,
    image_rows,
    is_list,
    is_text,
    label_names,
    no_labels,
    opened,
    read_column,
)
from gen_dist.data.sources.source import SPLITS, Block, Request, SplitName, register
from gen_dist.errors import DataError
from gen_dist.files import retrying

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class _Part:
    """One parquet file."""

    path: Path
    rows: int
    image_column: str
    label_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    """Names of one column's classes, from the Hugging Face metadata; names of several columns. None if there are none.
    """


@dataclass
class Parquet:
    """Rows of one parquet file or of all in a directory.

    In a directory, files named train*, test* and validation* are the splits; `train.parquet` alone has its sibling
    `test.parquet` as test split. Else part of the images is held out.
    """

    path: Path
    label_columns: tuple[str, ...] = ()
    """Columns of labels; if none is named, the first of `label`, `labels` and `fine_label` that is there."""
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
        """Names in the Hugging Face metadata, else texts, or numbers up to the highest label; `all` without classes."""
        return self.label_scheme().class_names

    def label_scheme(self) -> LabelScheme:
        """See `HasLabels`."""
        return self._numbered[1]

    def image_count(self) -> int:
        """Rows in both splits."""
        return sum(part.rows for parts in self._parts.values() for part in parts)

    def blocks(self) -> Iterator[Block]:
        """Rows in the order of the files' names.

        Raises:
            DataError: a file is damaged.
        """
        for split, parts in self._parts.items():
            labels, first_of_part = self._numbered[0][split], 0
            for part in parts:
                first = 0
                for images in image_rows(self.name, part.path, part.image_column):
                    names = [f"{printable(part.path.name)} row {first + i}" for i in range(len(images))]
                    of_images = labels[first_of_part + first : first_of_part + first + len(images)]
                    yield Block(split, images, of_images, names)
                    first += len(images)
                first_of_part += part.rows

    def rows(self, split: SplitName) -> Iterator[tuple[Path, str, NDArray[Any]]]:
        """Files of a split in order: path, column of the images, and labels of all rows as `blocks` gives them."""
        first = 0
        for part in self._parts.get(split, ()):
            yield part.path, part.image_column, self._numbered[0][split][first : first + part.rows]
            first += part.rows

    @cached_property
    def _parts(self) -> dict[SplitName, list[_Part]]:
        parts = {
            split: [_inspect(self.name, path, self.label_columns) for path in self._splits[split]]
            for split in self._in_order()
        }
        first = parts["train"][0]
        for part in (part for split_parts in parts.values() for part in split_parts):
            if (part.label_columns, part.label_names) != (first.label_columns, first.label_names):
                raise DataError(f"{self.name}: {part.path.name} has other labels or class names than {first.path.name}")
        return parts

    @cached_property
    def _numbered(self) -> tuple[dict[SplitName, NDArray[Any]], LabelScheme]:
        """Labels by split, all 0 if there are none, and their meaning."""
        first, images = self._parts["train"][0], self.image_count()
        if not images:
            raise DataError(f"{self.name}: it has no images: no rows in {first.path.name}")
        if not first.label_columns:
            rows = {split: sum(part.rows for part in self._parts[split]) for split in self._in_order()}
            return {split: np.zeros(count, np.int64) for split, count in rows.items()}, NO_LABELS
        found = {split: _read_labels(self.name, self._parts[split]) for split in self._in_order()}
        for split, labels in found.items():
            one_column = labels.dtype.kind == "i" and labels.ndim == 1
            if one_column and first.label_names is None and (highest := int(labels.max(initial=0))) >= images:
                raise DataError(
                    f"{self.name}: label {highest} is out of range: it would make more classes than there are "
                    f"images ({images}), in {split}"
                )
        of_one = first.label_columns if len(first.label_columns) == 1 and found["train"].shape[1:] == (1,) else None
        return numbered(found, first.label_names or of_one, self.name)

    def _in_order(self) -> list[SplitName]:
        return [split for split in SPLITS if split in self._splits]


def _inspect(name: str, path: Path, asked: tuple[str, ...]) -> _Part:
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
    labels = asked or tuple(column for column in _LABEL_COLUMNS if column in schema.names)[:1]
    if lacking := [column for column in labels if column not in schema.names]:
        columns = printable(", ".join(schema.names))[:200]
        raise DataError(f"{name}: {path.name} has no column {lacking[0]} of --label-columns, only {columns}")
    for column in labels if rows else ():
        if not holds_labels(schema.field(column).type):
            label_type = printable(str(schema.field(column).type))[:100]
            raise DataError(
                f"{name}: column {column} of {path.name} is {label_type}, not integers, texts, booleans, "
                "floating point or lists of them; name others with --label-columns"
            )
    names = label_names(schema, labels[0]) if len(labels) == 1 else labels or None
    return _Part(path, rows, image_column, labels, names)


def _read_labels(name: str, parts: Sequence[_Part]) -> NDArray[Any]:
    """Raw labels of all rows of a split."""
    parts = [part for part in parts if part.rows] or parts[:1]
    columns = [[_of_rows(name, part, column) for part in parts if part.rows] for column in parts[0].label_columns]
    for column, of_parts in zip(parts[0].label_columns, columns, strict=True):
        for part, labels in zip(parts, of_parts, strict=False):
            if (kind := kind_of(labels)) != (of_first := kind_of(of_parts[0])):
                raise DataError(
                    f"{name}: labels {column} of {part.path.name} are {kind}, those of {parts[0].path.name} "
                    f"{of_first}; write them alike"
                )
    try:
        whole = [np.concatenate(of_parts) if of_parts else np.empty(0, np.int64) for of_parts in columns]
        return whole[0] if len(whole) == 1 else joined_columns(whole, sum(part.rows for part in parts))
    except (DataError, ValueError) as error:
        raise DataError(f"{name}: {error}") from None


def _of_rows(name: str, part: _Part, column: str) -> NDArray[Any]:
    """Raw labels of one column of a file; a row of a list has as many as any other."""
    found = read_column(name, part.path, column)
    try:
        if found.null_count == part.rows and not is_list(found.type):
            return no_labels(found.type, part.rows)
        if found.null_count or is_list(found.type) or is_text(found.type):
            rows = found.to_pylist()
            widths = {len(row) for row in rows if isinstance(row, list)}
            if len(widths) > 1:
                raise DataError(f"lists of {min(widths)} to {max(widths)} labels; each image needs as many")
            for width in widths:
                rows = [[None] * width if row is None else row for row in rows]
            values = np.array(rows, dtype=object)
        else:
            values = found.to_numpy()
        return raw_labels(values, part.rows)
    except DataError as error:
        raise DataError(f"{name}: column {column} of {part.path.name}: {error}") from None


def _open(request: Request) -> Parquet:
    if request.packing.pages == "images":
        name = printable(str(request.path))
        raise DataError(f"parquet:{name}: a row is one image, and --pages images is for folder:PATH; leave it out")
    return Parquet(request.path, request.packing.label_columns)


register("parquet", _open, takes_path=True)
