"""The index of a set of shards, written once: where each training image lies, and packed images of the test split."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.labels import LabelScheme
from gen_dist.data.image_names import names_file
from gen_dist.data.labelling import EXAMPLES
from gen_dist.data.naming import remarks_on_classes
from gen_dist.data.packing import images_file, labels_file
from gen_dist.data.ranges import Measured, measured_scale
from gen_dist.data.refusals import held_out_count
from gen_dist.data.shard_order import permuted
from gen_dist.data.shards.contents import Contents, LeftOut
from gen_dist.data.shards.indexing import ShardContents
from gen_dist.data.shards.labels import Labels, Moments, request_of
from gen_dist.data.shards.packed_parts import Look, PackedParts, Picked
from gen_dist.data.shards.reading import Shard
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import DataError
from gen_dist.files import open_regular, sync
from gen_dist.randomness import Stream

MOST_HELD_OUT = 10_000
SAMPLED = 1024
"""Training images that are packed too, for statistics of the split."""
COLUMNS = {"offsets": np.uint64, "sizes": np.uint32, "labels": np.int64, "block_starts": np.int64}
"""Arrays of the index with a number an image, or a block of the shards."""
_FILES = (
    *(f"{name}.npy" for name in (*COLUMNS, "block_crcs")),
    *(name_of(split) for split in ("test", "sample") for name_of in (images_file, labels_file)),  # type: ignore[arg-type]
)
_NAMES = tuple(names_file(split) for split in ("test", "sample"))  # type: ignore[arg-type]
"""Files outside of the digest: names of images are no part of the data."""


class IndexBuilder:
    """Writer of an index."""

    def __init__(
        self,
        name: str,
        packing: DataConfig,
        places: list[str],
        test_places: list[str],
        contents: ShardContents,
        parts: PackedParts,
    ) -> None:
        """
        Args:
            name: the source in error messages.
            packing: size and channels of the images, and the share held out.
            places: shards of the training split.
            test_places: those of the test split; empty to hold images out.
            contents: contents of all of them.
            parts: packer of some images.
        """
        self._name = name
        self._packing = packing
        self._places = places
        self._test_places = test_places
        self._contents = contents
        self._parts = parts
        self._labels = Labels(name, request_of(packing))
        self._moments = Moments()
        self._left_out = LeftOut()

    def build(self, directory: Path) -> dict[str, Any]:
        """Write the files of the index; returns what describes it, for JSON.

        Raises:
            DataError: there are too few images, labels do not fit, or images differ.
            OSError: the disk is full.
        """
        counts, tested = self._count()
        scheme = self._labels.scheme()
        held_out, sampled = self._chosen(int(counts.sum()))
        shards, sample, test = self._write_columns(directory, scheme, counts, held_out, sampled)
        examples = np.array([one.label for one in sample], scheme.dtype)
        examples = examples[evenly_spaced(min(EXAMPLES, len(examples)), len(examples))]
        scheme = self._labels.finished(scheme, self._moments, examples)
        class_names = scheme.class_names
        for place in self._test_places:
            test += self._picked(place, self._contents(place), slice(None))
        look = self._parts.look(sample)
        for split, picked in (("test", test), ("sample", sample)):
            self._parts.pack(directory, split, picked, look, scheme)
        measured = self._measured(directory, look)
        if not tested and len(test) == MOST_HELD_OUT:
            look.remarks.append(f"{MOST_HELD_OUT:,} images are held out for testing, the most that are packed")
        meta = {
            "shards": [[shard.place, *shard.facts, shard.sha256, shard.end] for shard in shards],
            "first_rows": np.concatenate([[0], np.cumsum(counts - _per_shard(held_out, counts))]).tolist(),
            "blocks": self._blocks,
            "class_names": class_names,
            "image_shape": look.shape,
            "fitting": look.fitting,
            "remarks": [
                *self._left_out.lines("left out of its shards", 5),
                *remarks_on_classes(class_names),
                *look.remarks,
                *measured.remarks,
            ],
            "files": {name: _describe(directory / name) for name in (*_FILES, *_NAMES)},
        }
        of_content = [[shard.sha256 for shard in shards], class_names, look.shape, look.fitting, self._packing.fit]
        if not scheme.is_plain:
            meta["labels"] = scheme.as_json()
            of_content.append(meta["labels"])
        if not measured.scale.is_plain:
            meta["values"] = measured.scale.as_json()
            of_content.append(meta["values"])
        of_content += [meta["first_rows"], [meta["files"][name] for name in _FILES]]
        meta["digest"] = hashlib.sha256(json.dumps(of_content).encode()).hexdigest()
        return meta

    def _measured(self, directory: Path, look: Look) -> Measured:
        """Range of the values, by the images that are packed."""
        sample, test = (np.load(directory / images_file(split), mmap_mode="r") for split in ("sample", "test"))  # type: ignore[arg-type]
        measured = measured_scale(self._name, sample, test, self._packing)
        if not measured.scale.is_plain and not self._packing.given_range and self._packing.value_range != "dtype":
            looked_at = f"the range of values is that of {len(sample) + len(test):,} images"
            measured.remarks.insert(0, f"{looked_at}; say --value-range if others go beyond")
        return measured

    def _count(self) -> tuple[NDArray[np.int64], int]:
        """Images of each training shard, and of all test shards."""
        counts = np.zeros(len(self._places), np.int64)
        for number, place in enumerate(self._places):
            contents = self._contents(place)
            counts[number] = len(contents.sizes)
            self._labels.add(place, contents)
            self._left_out.add(place, contents.left_out)
        tested = 0
        for place in self._test_places:
            contents = self._contents(place)
            self._labels.add(place, contents)
            self._left_out.add(place, contents.left_out)
            tested += len(contents.sizes)
        if counts.sum() < 2 or (self._test_places and not tested):
            split = "train" if counts.sum() < 2 else "test"
            raise DataError(f"{self._name}: its {split} shards have fewer than two images with a name such as 0001.jpg")
        return counts, tested

    def _chosen(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images that are held out, and training images that are packed too; sorted, by a keyed permutation of all."""
        held_out = 0 if self._test_places else min(MOST_HELD_OUT, held_out_count(count, self._packing))
        keys = np.random.Philox(key=[0, Stream.HELD_OUT], counter=[0, 0, 0, 1]).random_raw(8)
        chosen = permuted(np.arange(min(held_out + SAMPLED, count), dtype=np.uint64), count, keys)
        return np.sort(chosen[:held_out]), np.sort(chosen[held_out:])

    def _write_columns(
        self,
        directory: Path,
        scheme: LabelScheme,
        counts: NDArray[np.int64],
        held_out: NDArray[np.int64],
        sampled: NDArray[np.int64],
    ) -> tuple[list[Shard], list[Picked], list[Picked]]:
        shards: list[Shard] = []
        picked: dict[str, list[Picked]] = {"sample": [], "test": []}
        self._blocks = [0]
        files = {name: _Column(directory / f"{name}.npy", dtype) for name, dtype in COLUMNS.items() if name != "labels"}
        files["labels"] = _Column(directory / "labels.npy", scheme.dtype, scheme.shape)
        files["block_crcs"] = _Column(directory / "block_crcs.npy", np.uint32)
        first = 0
        for place, count in zip(self._places, counts.tolist(), strict=True):
            contents = self._contents(place)
            if len(contents.sizes) != count:
                raise DataError(f"{self._name}: {place} has changed while its index was written; try again")
            leaving, looked_at = (_within(rows, first, first + count) for rows in (held_out, sampled))
            picked["test"] += self._picked(place, contents, leaving)
            picked["sample"] += self._picked(place, contents, looked_at)
            kept = np.delete(np.arange(count), leaving)
            files["offsets"].append(contents.offsets[kept])
            files["sizes"].append(contents.sizes[kept])
            labels = self._labels.of(contents, kept)
            if scheme.kind == "numbers":
                self._moments.add(labels)
            files["labels"].append(labels)
            files["block_starts"].append(contents.block_starts)
            files["block_crcs"].append(contents.block_crcs)
            self._blocks.append(self._blocks[-1] + len(contents.block_starts))
            shards.append(Shard(place, contents.facts, contents.sha256, contents.end))
            first += count
        for file in files.values():
            file.finish()
        return shards, picked["sample"], picked["test"]

    def _picked(self, place: str, contents: Contents, rows: NDArray[np.int64] | slice) -> list[Picked]:
        labels = self._labels.of(contents, rows)
        numbers_of = np.arange(len(contents.sizes))[rows].tolist()
        columns = contents.offsets[rows].tolist(), contents.sizes[rows].tolist(), labels.tolist(), numbers_of
        return [Picked(place, *numbers) for numbers in zip(*columns, strict=True)]


class _Column:
    """A .npy file of numbers, or rows of them, that grows."""

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...] = ()) -> None:
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._count = 0
        self._file: BinaryIO = path.open("wb")
        self._path = path
        self._write_header()

    def append(self, numbers: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(numbers, self._dtype).data)
        self._count += len(numbers)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()  # padded, so that the count can grow without moving the numbers
        self._file.close()
        sync(self._path)

    def _write_header(self) -> None:
        header: dict[str, Any] = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._count, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def damage_of(directory: Path, meta: dict[str, Any], most_bytes: int) -> str:
    """Difference of the files of an index from what was written; empty if there is none. Digests are compared of
    indexes of up to `most_bytes`, sizes of all."""
    described: dict[str, list[Any]] = meta["files"]
    for name, (size, _) in described.items():
        found = os.stat(directory / name).st_size
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    if sum(size for size, _ in described.values()) <= most_bytes:
        for name, facts in described.items():
            if _describe(directory / name) != facts:
                return f"{name} has another SHA-256"
    return ""


def _describe(path: Path) -> list[Any]:
    with open_regular(path) as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _within(rows: NDArray[np.int64], first: int, end: int) -> NDArray[np.int64]:
    """Those of some sorted rows in first .. end - 1, counted from `first`."""
    return rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)] - first


def _per_shard(rows: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of some sorted rows in each shard."""
    edges = np.searchsorted(rows, np.concatenate([[0], np.cumsum(counts)]))
    return np.diff(edges)
