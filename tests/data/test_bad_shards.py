"""Bad shards and bad encoded images through the door of training: one line, exit code 2, and nothing half written.

With the table of `test_shards.py` these are more than forty.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from fsspec import AbstractFileSystem, register_implementation
from PIL import Image

import gen_dist
from gen_dist.cli import run_command
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from tests.data.test_shard_refusals import BAD, GOOD
from tests.support.runs import small_config
from tests.support.shards import ShardServer, encoded, samples, served


class Place(NamedTuple):
    """Directory of a case, and a server of its files."""

    path: Path
    server: ShardServer

    def file(self, name: str, content: bytes) -> str:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(content)
        return f"{self.path}/{name}"

    def indexed(self, pattern: str, **options: Any) -> str:
        """Pattern of shards that have an index, whose blocks are not on the disk."""
        packing = DataConfig(cache_dir=str(self.path / "cache"), **options)
        open_dataset(f"shards:{pattern}", "", packing, lambda _line: None)
        return pattern


class NoCredentialsError(Exception):
    """As botocore raises it."""


def system(error: Exception) -> type[AbstractFileSystem]:
    """A file system that refuses with an error."""

    class Refusing(AbstractFileSystem):
        def info(self, *_: Any, **__: Any) -> Any:
            raise error

        def glob(self, *_: Any, **__: Any) -> Any:
            raise error

    return Refusing


def gated() -> OSError:
    error = OSError("401 Client Error: https://host/a.tar?token=word")
    setattr(error, "response", SimpleNamespace(status_code=401))  # noqa: B010  OSError has no such attribute
    return error


register_implementation("bucket", system(NoCredentialsError("Unable to locate credentials")), clobber=True)
register_implementation("gated", system(gated()), clobber=True)
register_implementation("denied", system(PermissionError("Anonymous caller, key=word")), clobber=True)


def _status(place: Place, status: int) -> str:
    place.server.fails = lambda _: status
    return f"{place.server.url}/{{0..3}}.tar"


def _without_ranges(place: Place) -> str:
    place.file("a.tar", bytes(2**20 + 512))
    place.server.ranges = False
    return f"{place.server.url}/a.tar"


def _other_tag(place: Place) -> str:
    place.file("a.tar", GOOD)
    pattern = place.indexed(f"{place.server.url}/a.tar")
    place.server.etag = '"2"'
    return pattern


def _other_content(place: Place) -> str:
    place.file("a.tar", GOOD)
    pattern = place.indexed(f"{place.server.url}/a.tar")
    place.file("a.tar", GOOD[:700] + bytes([GOOD[700] ^ 1]) + GOOD[701:])
    return pattern


def _cut_at_an_entry(place: Place) -> str:
    pattern = place.indexed(place.file("a.tar", GOOD))
    with tarfile.open(place.path / "a.tar") as tar:
        end = tar.getmembers()[-2].offset
    os.truncate(place.path / "a.tar", end)
    return pattern


def _gone(place: Place) -> str:
    pattern = place.indexed(place.file("a.tar", GOOD))
    (place.path / "a.tar").unlink()
    return pattern


def _parquet(place: Place, columns: dict[str, Any]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), place.path / "a.parquet")
    return f"{place.path}/a.parquet"


def _two_labels() -> bytes:
    """A tar file to which another label of a sample was appended, behind the first."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in [*list(samples(0, 6).items())[:4], ("000001.cls", b"2"), *list(samples(2, 4).items())]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


PNGS = [encoded(number) for number in range(6)]
Case = tuple[Callable[[Place], str], str, dict[str, Any]]


def case(make: Callable[[Place], str], line: str, **options: Any) -> Case:
    return make, line, options


MORE: dict[str, Case] = {
    # credentials
    "a bucket without credentials": case(lambda p: "bucket://set/{0..3}.tar", "no credentials of a reader"),
    "a listing without credentials": case(lambda p: "bucket://set/*.tar", "no credentials of a reader"),
    "a gated set of Hugging Face": case(lambda p: "gated://set/a.tar", "HTTP 401: no credentials of a reader"),
    "a user who may not read": case(lambda p: "denied://set/a.tar", "no credentials of a reader"),
    "a server that forbids": case(lambda p: _status(p, 403), "HTTP 403: no credentials of a reader"),
    # patterns
    "a protocol that there is not": case(lambda p: "nowhere://set/a.tar", "Protocol not known: nowhere"),
    "a range without an end": case(lambda p: f"{p.path}/{{0..}}.tar", "{0..} is no range of two whole numbers"),
    "a range of letters": case(lambda p: f"{p.path}/{{a..c}}.tar", "{a..c} is no range of two whole numbers"),
    "an empty brace": case(lambda p: f"{p.path}/{{}}.tar", "{} is no range"),
    "a brace alone": case(lambda p: f"{p.path}/{{0..3.tar", "{ has no other brace"),
    "a directory": case(lambda p: f"{p.path}/", "is no .tar or .parquet file"),
    "test shards that are not there": case(
        lambda p: p.file("a.tar", GOOD), "no file is named", test_shards="/nowhere/none*.tar"
    ),
    # servers
    "a file that a server has not": case(lambda p: _status(p, 404), "there is no such file"),
    "a server without ranges": case(_without_ranges, "sends whole files and no ranges"),
    "https of a server of http": case(
        lambda p: f"{p.server.url.replace('http', 'https')}/a.tar", "which is not tried again"
    ),
    # shards
    "another tag": case(_other_tag, "a.tar has changed since it was indexed"),
    "other content of the same tag": case(_other_content, "have another digest); put the old one back"),
    "a shard that was cut at an entry": case(_cut_at_an_entry, "has changed since it was indexed"),
    "a shard that has gone": case(_gone, "a.tar: No such file"),
    "an empty shard": case(
        lambda p: (p.file("a.tar", GOOD), p.file("b.tar", b""), f"{p.path}/*.tar")[2], "b.tar: it is empty"
    ),
    "joined tar files": case(lambda p: p.file("a.tar", GOOD + GOOD), "a.tar: it goes on behind its end"),
    "two labels of one kind": case(lambda p: p.file("a.tar", _two_labels()), "sample 000001 has two labels, 1 and 2"),
    "parquet without images": case(lambda p: _parquet(p, {"text": ["a"] * 6}), "no column image or img"),
    "parquet without the label column": case(
        lambda p: _parquet(p, {"image": PNGS}), "no column age of --label-columns", label_columns=("age",)
    ),
    "vectors in shards": case(
        lambda p: p.file("a.tar", GOOD), "--array-of vectors is not for shards", array_of="vectors"
    ),
    "a cache of nothing": case(
        lambda p: p.file("a.tar", GOOD), "cache_gib 0.0 is not a positive number", cache_gib=0.0
    ),
    "a cache of no number": case(
        lambda p: p.file("a.tar", GOOD), "cache_gib nan is not a positive number", cache_gib=float("nan")
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "files").mkdir()
    with served(tmp_path / "files") as server:
        yield Place(tmp_path / "files", server)


def line_of(capsys: pytest.CaptureFixture[str], path: Path, data: str, options: dict[str, Any]) -> str:
    """The only line of an error that training ends with, after which no half of anything is left."""

    def train() -> None:
        packing = DataConfig(cache_dir=str(path / "cache"), **options)
        gen_dist.train(
            small_config("vae", data=data, packing=packing, steps=2, global_batch_size=4, run_dir=str(path / "run"))
        )

    indexes = set((path / "cache").glob("*/meta.json"))
    with pytest.raises(SystemExit) as stop:
        run_command(train)
    told = capsys.readouterr().err
    (line,) = (line for line in told.splitlines() if line.startswith("error: "))
    assert stop.value.code == 2 and "Traceback" not in told and told.rstrip().endswith(line)
    assert len(line) < 600 and "word" not in line.replace(str(path), "")
    assert set((path / "cache").glob("*/meta.json")) == indexes
    assert not [file for file in (path / "cache").glob(".*") if file.is_dir()]
    assert not (path / "run" / "checkpoints").exists()
    return line


@pytest.mark.parametrize("name", MORE)
def test_bad_shards_end_training_with_one_line(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    make, wanted, options = MORE[name]
    assert wanted in line_of(capsys, place.path, f"shards:{make(place)}", options)


def test_the_table_has_forty_bad_inputs() -> None:
    assert len({**MORE, **BAD, **ENCODED}) >= 40 + len(ENCODED)


def _folder(place: Place, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        place.file(f"images/{name}", content)
    return f"folder:{place.path}/images"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _jpeg(number: int = 0, mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    return saved(Image.fromarray(noise).convert(mode), "JPEG")


def _array(place: Place) -> str:
    np.save(place.path / "a.npy", np.zeros((9, 8, 8), np.uint8))
    return f"array:{place.path}/a.npy"


JPEGS = {f"{number}.jpg": _jpeg(number) for number in range(8)}
ENCODED: dict[str, Case] = {
    "encoded arrays": case(_array, "is of arrays, not of encoded images; leave out --packed-as encoded"),
    "encoded digits": case(lambda p: "mnist5k", "is of arrays, not of encoded images"),
    "a damaged JPEG that is an error": case(
        lambda p: _folder(p, {**JPEGS, "3.jpg": _jpeg(3)[:500]}), "3.jpg is unreadable", unreadable_images="error"
    ),
    "damaged JPEGs": case(
        lambda p: _folder(p, {name: content[:500] for name, content in JPEGS.items()}), "8 of 8 images are unreadable"
    ),
    "encoded images of two sizes": case(
        lambda p: _folder(p, {**JPEGS, "9.png": encoded(9)}), "--fit crop, pad or stretch", fit="none"
    ),
    "encoded pages": case(lambda p: _folder(p, JPEGS), "packed_as encoded with pages images", pages="images"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_bad_encoded_images_end_training_with_one_line(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make, wanted, options = ENCODED[name]
    assert wanted in line_of(capsys, place.path, make(place), {"packed_as": "encoded", **options})


def _animated() -> bytes:
    frames = [Image.new("RGB", (32, 32), (40 * number, 0, 0)) for number in range(3)]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


ODD: dict[str, bytes] = {
    "CMYK.jpg": _jpeg(1, "CMYK"),
    "deep.png": saved(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60), "PNG"),
    "animated.webp": _animated(),
    "cut.jpg": _jpeg(2)[:700],
    "turned.jpg": saved(
        Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)),
        "JPEG",
        exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_the_same_encoded_and_raw(name: str, place: Place) -> None:
    source = _folder(place, {**JPEGS, name: ODD[name]})
    found, told = [], []
    for storage in ("raw", "encoded"):
        lines: list[str] = []
        packing = DataConfig(cache_dir=str(place.path / "cache"), packed_as=storage)
        dataset = open_dataset(source, "", packing, lines.append)
        found.append(np.concatenate([dataset.train.images[:], dataset.test.images[:]]))
        told.append([line for line in lines if not line.startswith("packed ")])
    assert np.array_equal(found[0], found[1]) and told[0] == told[1]
    assert len(found[0]) == 8 + (name != "cut.jpg")
    assert name == "CMYK.jpg" or name == "turned.jpg" or any(name in line for line in told[0]), told
