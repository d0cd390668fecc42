"""Damaged shards, indexes of shards and arrays of NumPy: data, or one line, and an index never gives other images.

`make test` tries some, the slow tests as many as fit into their minutes (GEN_DIST_FUZZ_MINUTES). A failure names its
seed.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.image_files import image_warnings_as_intended
from gen_dist.data.shards.contents import contents_of
from gen_dist.data.shards.tar_contents import tar_contents
from gen_dist.errors import DataError
from tests.data.test_fuzz import images, parquet_files
from tests.support.fuzzing import MINUTES, for_minutes, mutated, strange_json, tried
from tests.support.shards import encoded, samples, tar_of

Fuzzed = tuple[dict[str, bytes], Callable[[str, bytes], None]]
"""Files by name, and all that reads them with one of them damaged."""


def _chance(content: bytes) -> random.Random:
    return random.Random(hashlib.sha256(content).digest())


def _opened(source: str, path: Path, lines: list[str] | None = None) -> Dataset | None:
    """The data with a batch read, or None for an error of one line."""
    packing = DataConfig(cache_dir=str(path / "cache"), image_size=16, unreadable_images="skip")
    try:
        dataset = open_dataset(source, "", packing, (lines if lines is not None else []).append)
        _first_rows(dataset)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 900, error
        return None
    return dataset


def _first_rows(dataset: Dataset) -> bytes:
    rows = np.arange(min(8, len(dataset.train.labels)))
    return np.asarray(dataset.train.images[rows]).tobytes() + np.asarray(dataset.train.labels[rows]).tobytes()


# Shards


def tar_files() -> dict[str, bytes]:
    """Tar files of each format of headers, of labels in all forms, and of images in all formats."""
    long_names = {f"{'a' * 120}/{name}": content for name, content in samples(0, 6).items()}
    attributes: dict[str, bytes] = {}
    for number in range(6):
        attributes[f"{number}.png"] = encoded(number)
        attributes[f"{number}.json"] = json.dumps({"label": [number % 2, number / 2], "x": None}).encode()
    classes: dict[str, bytes] = {}
    for number, (name, content) in enumerate(images().items()):
        classes[f"{number:02}.{name.rpartition('.')[2]}"] = content
        classes[f"{number:02}.json"] = b'{"label": "a"}'
    return {
        "ustar.tar": tar_of(samples(0, 8)),
        "gnu.tar": tar_of(long_names, tarfile.GNU_FORMAT),
        "pax.tar": tar_of(long_names, tarfile.PAX_FORMAT),
        "attributes.tar": tar_of(attributes),
        "classes.tar": tar_of(classes),
    }


def shards_in(path: Path) -> Fuzzed:
    """Tar and parquet shards, and the start of a training on one of them."""
    (path / "set").mkdir()
    files = tar_files() | {f"{name}.parquet": content for name, content in parquet_files(path).items()}

    def read(name: str, content: bytes) -> None:
        chance = _chance(content)
        if name.endswith("tar"):
            if chance.random() < 0.7:  # the reader meets the damage within the entries, and not their sums alone
                content = _with_sums(content)
            blocks = iter([content[:700], content[700:]] if chance.random() < 0.5 else [content])
            try:
                tar_contents("a", "b", blocks, ("label",) if chance.random() < 0.3 else ())
            except DataError as error:
                assert "\n" not in str(error) and len(str(error)) < 900, error
        file = path / "set" / f"a.{name.rpartition('.')[2]}"
        file.write_bytes(content)
        _opened(f"shards:{file}", path)
        shutil.rmtree(path / "cache", ignore_errors=True)

    return files, read


def _with_sums(content: bytes) -> bytes:
    """A tar file whose headers, changed as they are, have the sums that they say."""
    changed = bytearray(content)
    for place in range(0, len(changed) - 511, 512):
        if changed[place + 257 : place + 262] == b"ustar":
            changed[place + 148 : place + 156] = b" " * 8
            changed[place + 148 : place + 156] = f"{sum(changed[place : place + 512]):06o}\0 ".encode()
    return bytes(changed)


# Indexes


def index_in(path: Path) -> Fuzzed:
    """All that the cache keeps of a set of shards, and a reader that checks that the data are the same whatever is
    damaged."""
    (path / "set").mkdir()
    for shard in range(2):
        (path / f"set/{shard}.tar").write_bytes(tar_of(samples(shard * 20, 20)))
    source = f"shards:{path / 'set'}/{{0..1}}.tar"
    whole = _opened(source, path)
    assert whole is not None
    rows, cache = _first_rows(whole), path / "cache"
    kept = {entry.relative_to(cache).as_posix(): entry for entry in cache.rglob("*") if entry.is_file()}
    files = {name: entry.read_bytes() for name, entry in kept.items() if not name.endswith(".lock")}

    def read(name: str, content: bytes) -> None:
        chance = _chance(content)
        if name.endswith("json") and chance.random() < 0.5:
            content = strange_json(b"{\n" + files[name][1:], chance)
        (cache / name).unlink()  # maps of the whole file stay valid
        (cache / name).write_bytes(content)
        try:
            lines: list[str] = []
            dataset = _opened(source, path, lines)
            assert dataset is not None, name
            assert dataset.digest == whole.digest and dataset.class_names == whole.class_names
            assert _first_rows(dataset) == rows
        finally:
            shutil.rmtree(cache)
            for other, content in files.items():
                (cache / other).parent.mkdir(parents=True, exist_ok=True)
                (cache / other).write_bytes(content)

    return files, read


def contents_in(_path: Path) -> Fuzzed:
    """Contents of shards as files beside them, which anyone may have written, and a reader that takes them or not."""
    files = {name: tar_contents("a", "b", iter([shard])).to_bytes() for name, shard in tar_files().items()}

    def read(_name: str, content: bytes) -> None:
        for one in (content, _with_damaged_member(content)):
            try:
                found = contents_of(one)
            except (ValueError, KeyError, OSError):
                continue
            assert len(found.offsets) == len(found.sizes) == len(found.labels)
            assert (found.offsets + found.sizes <= found.end).all()

    return files, read


def _with_damaged_member(content: bytes) -> bytes:
    """An archive of NumPy's with one damaged array, whose sum fits."""
    chance, stream = _chance(content), io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(stream, "w") as damaged:
            names = whole.namelist()
            chosen = chance.choice(names)
            for name in names:
                member = whole.read(name)
                damaged.writestr(name, mutated(member, [member], chance) if name == chosen else member)
    except Exception:  # the archive itself is damaged, in whatever way
        return content
    return stream.getvalue()


# Arrays


def arrays_in(path: Path) -> Fuzzed:
    """Files of NumPy with images, vectors, labels and both splits, and their packing."""
    random_numbers = np.random.default_rng(0)
    pixels = random_numbers.integers(0, 256, (12, 16, 16), np.uint8)
    stored: dict[str, bytes] = {}
    for name, array in {
        "bytes.npy": pixels,
        "deep.npy": random_numbers.integers(0, 2**16, (12, 3, 16, 16), np.uint16),
        "floats.npy": random_numbers.random((12, 16, 16)).astype(np.float32),
        "fortran.npy": np.asfortranarray(pixels),
    }.items():
        stream = io.BytesIO()
        np.save(stream, array)
        stored[name] = stream.getvalue()
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        labels = np.array(["cat", "dog"])[np.arange(12) % 2]
        save(stream, x=pixels, labels=labels, x_test=pixels[:4], labels_test=labels[:4], rest=np.ones(2))
        stored[f"{save.__name__}.npz"] = stream.getvalue()

    def read(name: str, content: bytes) -> None:
        if name.endswith("npz") and _chance(content).random() < 0.7:
            content = _with_damaged_member(stored[name] if content[:2] != b"PK" else content)
        file = path / f"a.{name.rpartition('.')[2]}"
        file.write_bytes(content)
        _opened(f"array:{file}", path)
        shutil.rmtree(path / "cache", ignore_errors=True)

    return stored, read


READERS = {
    "shards": shards_in,
    "indexes of shards": index_in,
    "contents of shards": contents_in,
    "arrays": arrays_in,
}
FOUND = {"shards": (696542990989,), "contents of shards": (694404273223,)}
"""Seeds that once found a fault."""


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_data_or_one_line(reader: str, tmp_path: Path) -> None:
    files, read = READERS[reader](tmp_path)
    seeds = [*range(12), *FOUND.get(reader, ())]
    with image_warnings_as_intended():
        assert tried(files, read, iter(seeds)) == len(seeds)


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
@pytest.mark.parametrize("reader", READERS)
def test_readers_are_fuzzed_for_minutes(reader: str, tmp_path: Path) -> None:
    with image_warnings_as_intended():
        for_minutes(reader, *READERS[reader](tmp_path))
