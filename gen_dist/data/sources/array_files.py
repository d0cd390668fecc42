"""`array:FILE`: images, signals or vectors in a .npy file, which is mapped, or in a .npz file with labels."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config.data import Form, Layout
from gen_dist.config.labels import NO_LABELS, LabelScheme
from gen_dist.data.array_bytes import DAMAGES, MAGIC, is_array, loaded_array
from gen_dist.data.given import array_images, form_of
from gen_dist.data.identity import content_sample, stamp
from gen_dist.data.labelling import kind_of, numbered, raw_labels
from gen_dist.data.naming import printable
from gen_dist.data.sources.source import Block, SplitName
from gen_dist.errors import DataError

SUFFIXES = (".npy", ".npz")
_BLOCK = 256
_NAMES: Mapping[SplitName, tuple[str, str]] = {"train": ("x", "labels"), "test": ("x_test", "labels_test")}
"""Names of images and labels in a .npz file. Only the first is needed."""
_LABEL_NAMES = "label_names"
_PLACES: Mapping[SplitName, str] = {"train": "image", "test": "test image"}


@dataclass
class ArrayFile:
    """Images [N, H, W], [N, H, W, C] or [N, C, H, W], signals [N, C, L] or [N, L] or vectors [N, D], of a dtype that is
    kept.

    A .npz file has the arrays `x`, and `labels`, `x_test` and `labels_test` where there are such; see `raw_labels` for
    their forms. Both splits have labels or none. `label_names` are names of the classes, or of the A attributes or
    numbers. Its arrays are in memory while they are packed.
    """

    path: Path
    layout: Layout | None = None
    array_of: Form | None = None
    _arrays: dict[str, NDArray[Any]] = field(init=False, default_factory=dict)
    """Arrays that have been read. An opening of packed images reads none."""

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise DataError(f"{self.name}: there is no such file; name one that numpy.save or numpy.savez wrote")

    @property
    def name(self) -> str:
        """`array:FILE`."""
        return f"array:{printable(str(self.path))}"

    @property
    def slug(self) -> str:
        """`array-` and the file's name."""
        return f"array-{self.path.stem}"

    @property
    def has_test_split(self) -> bool:
        """True if a .npz file has test images."""
        return _NAMES["test"][0] in self._names

    @property
    def default_size(self) -> int | None:
        """None: the size of the images."""
        return None

    def fingerprint(self) -> object:
        """Path, stamp and a part of the content, the order of the axes and what the rows are."""
        size = self.path.stat()
        sample = content_sample([(str(self.path), size.st_size)])
        said = [self.array_of] if self.array_of else []  # named only then, so that caches of images keep their key
        return [os.fsencode(self.path.resolve()).hex(), stamp(size), sample, self.layout, *said]

    @property
    def form(self) -> Form:
        """See `HasForm`."""
        return form_of(self._found("train").ndim, self.array_of)

    def remarks(self) -> list[str]:
        """A line on arrays that are not used."""
        used = {name for split in self._splits() for name in _NAMES[split]}
        used |= {_LABEL_NAMES} if _NAMES["train"][1] in self._names else set()
        unused = sorted(set(self._names) - used)
        return [f"not used: {', '.join(map(printable, unused))}"] if unused else []

    def fetch(self) -> None:
        """Nothing to do."""

    def class_names(self) -> tuple[str, ...]:
        """Given names, sorted texts, the numbers themselves, or one name without classes."""
        return self.label_scheme().class_names

    def label_scheme(self) -> LabelScheme:
        """See `HasLabels`."""
        return self._numbered[1]

    def image_count(self) -> int:
        """Images of both splits."""
        return sum(len(self._images(split)) for split in self._splits())

    def blocks(self) -> Iterator[Block]:
        """Some images at a time: a file that is mapped is not read whole."""
        for split in self._splits():
            found, labels = self._found(split), self._numbered[0][split]
            for first in range(0, len(found), _BLOCK):
                rows = slice(first, first + _BLOCK)
                images = self._rows(self._read(found, rows), split)
                texts = [f"{_PLACES[split]} {place}" for place in range(first, first + len(images))]
                yield Block(split, np.ascontiguousarray(images), labels[rows], texts)

    def _splits(self) -> list[SplitName]:
        return ["train", "test"] if self.has_test_split else ["train"]

    def _images(self, split: SplitName) -> NDArray[Any]:
        """Images [N, C, H, W] of a split; a file that is mapped is not read."""
        return self._rows(self._found(split), split)

    def _rows(self, found: NDArray[Any], split: SplitName) -> NDArray[Any]:
        """Rows [n, C, H, W] of an array. Those of both splits have the form of the training split."""
        return array_images(found, self.layout, f"{self.name}: {_NAMES[split][0]}", self.form)

    def _read(self, found: NDArray[Any], rows: slice) -> NDArray[Any]:
        """Some rows. Those of a file are read, not mapped: one that is cut off meanwhile would end the process.

        Raises:
            DataError: the file has changed.
        """
        if not isinstance(found, np.memmap):
            return found[rows]
        wanted = found[rows]
        with self.path.open("rb") as file:
            file.seek(found.offset + rows.start * found.strides[0])
            values = np.fromfile(file, found.dtype, wanted.size)
        if values.size != wanted.size:
            raise DataError(f"{self.name} was cut off while it was packed; nothing is packed: save it again")
        return values.reshape(wanted.shape)

    def _found(self, split: SplitName) -> NDArray[Any]:
        """Array of a split's images, as the file has it."""
        name = _NAMES[split][0]
        found = self._array(name)
        if found is None:
            raise DataError(
                f"{self.name} has the arrays {', '.join(map(printable, self._names)) or 'none'}, but no {name}; "
                "write numpy.savez(FILE, x=images, labels=labels)"
            )
        return found

    @cached_property
    def _numbered(self) -> tuple[dict[SplitName, NDArray[Any]], LabelScheme]:
        """Labels by split, all 0 if there are none, and their meaning.

        Raises:
            DataError: they are in no known form, not one an image, or of one split alone.
        """
        found = {split: self._labels(split) for split in self._splits()}
        if all(labels is None for labels in found.values()):
            return {split: np.zeros(len(self._images(split)), np.int64) for split in found}, NO_LABELS
        if any(labels is None for labels in found.values()):
            test, train = kind_of(found["test"]), kind_of(found["train"])
            raise DataError(
                f"{self.name}: labels of test images are {test}, those of train images {train}; give both splits "
                "labels of one kind, or none"
            )
        names = self._array(_LABEL_NAMES)
        named = None if names is None else [printable(str(name)) for name in names.ravel().tolist()]
        return numbered({split: labels for split, labels in found.items() if labels is not None}, named, self.name)

    def _labels(self, split: SplitName) -> NDArray[Any] | None:
        """Raw labels; None without labels."""
        found = self._array(_NAMES[split][1])
        try:
            return None if found is None else raw_labels(found, len(self._images(split)))
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None

    @cached_property
    def _names(self) -> list[str]:
        """Names of the arrays in the file."""
        with self._opened() as arrays:
            return list(arrays)

    def _array(self, name: str) -> NDArray[Any] | None:
        """Array of a name; None if there is none."""
        if name in self._names and name not in self._arrays:
            with self._opened() as arrays:
                self._arrays[name] = loaded_array(arrays[name], name)
        return self._arrays.get(name)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Mapping[str, Any]]:
        """Context manager that gives the arrays of the file by name. Those of an archive are read when asked for.

        Raises:
            DataError: it is damaged, or has something else.
        """
        try:
            # Opened here: given a path, NumPy leaves an archive that is damaged open.
            with self.path.open("rb") as file, warnings.catch_warnings():
                # Of headers of Python 2, of NumPy's old names for types, and of bad escapes.
                for category in (UserWarning, DeprecationWarning, FutureWarning, SyntaxWarning):
                    warnings.simplefilter("ignore", category)
                if is_array(file.read(len(MAGIC))):
                    yield {_NAMES["train"][0]: self._mapped()}
                else:
                    file.seek(0)
                    with np.load(file, allow_pickle=False) as found:
                        yield found
        except DAMAGES as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"{self.name}: no arrays of numbers can be read from it: {reason}; save it again") from None

    def _mapped(self) -> NDArray[Any]:
        """Array of a .npy file, in memory if its rows do not follow one another in the file."""
        found: NDArray[Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if found.flags.c_contiguous and found.dtype.isnative:
            return found
        return np.array(found)
