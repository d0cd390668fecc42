"""Remembered contents of a shard are read again if they are damaged, or of a version that read shards differently."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.headers import read_header
from gen_dist.data.shards.contents import contents_of
from gen_dist.data.shards.fetching import Fetcher
from gen_dist.data.shards.tar_contents import tar_contents
from gen_dist.data.shards.writing import index_place
from gen_dist.errors import DataError
from tests.support.shards import encoded, samples, tar_of


def written(files: dict[str, bytes]) -> bytes:
    return tar_contents("set", "a.tar", iter([tar_of(files)])).to_bytes()


def without_format(content: bytes) -> bytes:
    """Contents as versions wrote them that knew neither arrays nor numbers."""
    stream = io.BytesIO()
    with np.load(io.BytesIO(content)) as found:
        np.savez(stream, **{name: found[name] for name in found if name != "format"})
    return stream.getvalue()


def test_contents_of_older_versions_serve_where_they_mean_so() -> None:
    labelled, bare = written(samples(0, 3)), written({"0.png": encoded(0)})
    assert contents_of(without_format(labelled)).labels.tolist() == ["0", "1", "2"]
    assert len(contents_of(bare).sizes) == 1
    with pytest.raises(ValueError, match="older version"):  # its JSON may have had numbers, which nobody read
        contents_of(without_format(bare))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"<html>", written(samples(0, 3))[:-40]], ids=len)
def test_an_index_that_is_damaged_is_not_used(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "a.tar").write_bytes(tar_of(samples(0, 8)))
    Path(index_place(str(tmp_path / "a.tar"))).write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        contents_of(content)
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), test_fraction=0.2)
    assert len(open_dataset(f"shards:{tmp_path / 'a.tar'}", "", packing, lambda _: None).train.labels) == 6


@pytest.mark.parametrize(
    "changed",
    [
        {"offsets": np.array([2**64 - 1] * 3, np.uint64)},
        {"offsets": np.zeros((3, 1), np.uint64)},
        {"offsets": np.array(0, np.uint64)},
        {"offsets": np.array(["a"] * 3)},
        {"sizes": np.array([0.5] * 3)},
        {"labels": np.zeros(3)},
        {"labels": np.array(["a", "b"])},
        {"end": np.array("no number")},
        {"end": np.arange(2)},
        {"end": np.array(-1)},
        {"block_starts": np.array([9], np.int64)},
        {"left_out": np.array("a"), "left_out_counts": np.array(1)},
        {"class_names": np.array(3)},
        {"table": np.zeros((3, 2)), "columns": np.array(["a"])},
        {"table": np.zeros(3), "columns": np.array(["a"])},
    ],
    ids=str,
)
def test_hostile_arrays_beside_a_shard_are_not_used(changed: dict[str, Any]) -> None:
    stream = io.BytesIO()
    with np.load(io.BytesIO(written(samples(0, 3)))) as found:
        np.savez(stream, **(dict(found) | changed))
    with pytest.raises((ValueError, KeyError, OSError)):
        contents_of(stream.getvalue())


@pytest.mark.parametrize("name", ["labels", "sha256", "class_names"])
def test_texts_that_unicode_lacks_are_not_used(name: str) -> None:
    stream = io.BytesIO()
    with np.load(io.BytesIO(written(samples(0, 3)))) as found:
        np.savez(stream, **(dict(found) | {name: np.full(3, 2**31, np.uint32).view("U1")}))
    with pytest.raises(ValueError, match="characters that Unicode lacks"):
        contents_of(stream.getvalue())


@pytest.mark.parametrize("member", ["offsets", "sha256", "class_names"])
def test_a_member_that_is_no_array_is_not_used(member: str) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(written(samples(0, 3)))) as whole, zipfile.ZipFile(stream, "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, b"no magic" if name == f"{member}.npy" else whole.read(name))
    with pytest.raises(ValueError, match=f"^{member} is not an array"):
        contents_of(stream.getvalue())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("member", ["offsets.npy", "offsets"])
@pytest.mark.parametrize("changed", [b"(3L,)", b" (3,)", b"( 3,)", b"1+[3]"])
def test_a_header_that_numpy_does_not_write_is_not_used(changed: bytes, member: str) -> None:
    """NumPy takes an integer with an L for Python 2's, and warns. It reads members without the ending, too."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(written(samples(0, 3)))) as whole, zipfile.ZipFile(stream, "w") as strange:
        for name in whole.namelist():
            content = whole.read(name)
            if name == "offsets.npy":
                name, content = member, content.replace(b"(3,)", changed)
            strange.writestr(name, content)
    with pytest.raises(ValueError, match="the header of offsets is damaged"):
        contents_of(stream.getvalue())


def test_a_bucket_that_refuses_missing_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_fetcher: Fetcher, place: str) -> bool:
        raise DataError(f"{place}: PermissionError")

    (tmp_path / "a.tar").write_bytes(tar_of(samples(0, 8)))
    monkeypatch.setattr(Fetcher, "exists", refused)
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), test_fraction=0.2)
    assert len(open_dataset(f"shards:{tmp_path / 'a.tar'}", "", packing, lambda _: None).train.labels) == 6


@pytest.mark.parametrize(
    "header",
    [b"{'descr': '<u2'", b"{[]: 1}", b"((((", b"\xff", b"{'descr': ',', 'fortran_order': False, 'shape': (2, 2)}"],
    ids=repr,
)
def test_an_array_with_a_damaged_header_is_unreadable(header: bytes) -> None:
    header += b" \n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(32)
    with pytest.raises(UnreadableImage):
        read_header(content)


def test_a_large_file_has_time_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int, float] = {}

    def pipe_file(_place: str, content: Any, timeout: float) -> None:
        given[len(content)] = timeout

    system = SimpleNamespace(async_impl=True, pipe_file=pipe_file, makedirs=lambda *_, **__: None, _parent=str)
    fetcher = Fetcher("set", print)
    monkeypatch.setattr(fetcher, "_system", lambda _place: system)
    for size in (1, 2**27):
        fetcher.write("s3://bucket/a.tar", bytes(size))
    assert given[2**27] >= given[1] + 120
