"""Files that cannot be read just now are not damaged: they are tried again, or packing stops and leaves no cache."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen_dist import files
from gen_dist.config import DataConfig
from gen_dist.data import Dataset, building, decoding, image_files, open_dataset, packing
from gen_dist.data import cache as packed
from gen_dist.errors import DataError

IMAGES = 10


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    (path / "a").mkdir(parents=True)
    for value in range(IMAGES):
        Image.new("L", (8, 8), value).save(path / "a" / f"{value}.png")
    return path


def opened(folder: Path, lines: list[str] | None = None) -> Dataset:
    config = DataConfig(cache_dir=str(folder.parent / "cache"), image_size=8)
    return open_dataset(f"folder:{folder}", ".", config, (lines if lines is not None else []).append)


def count(dataset: Dataset) -> int:
    return len(dataset.train.labels) + len(dataset.test.labels)


def failing(code: int, times: int, function: Callable[..., Any], word: str) -> Callable[..., Any]:
    """`function` that fails at first for paths that contain a word."""
    left = [times]

    def failed(path: Any, *words: Any, **named: Any) -> Any:
        if word in os.fsdecode(path) and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), os.fsdecode(path))
        return function(path, *words, **named)

    return failed


@pytest.mark.parametrize("name", ["EMFILE", "EIO", "ESTALE", "ENOMEM", "ENFILE", "ETIMEDOUT"])
def test_an_error_that_passes_leaves_no_image_out(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "open", failing(getattr(errno, name), 2, os.open, "7.png"))
    assert count(opened(folder)) == IMAGES


@pytest.mark.parametrize("name", ["EMFILE", "EIO", "ESTALE", "ENOMEM", "EACCES", "EPERM", "ENOENT"])
def test_an_error_that_stays_stops_packing(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    code = getattr(errno, name)
    monkeypatch.setattr(image_files, "read_regular", failing(code, 99, files.read_regular, "7.png"))
    with pytest.raises(DataError) as error:
        opened(folder)
    assert "a/7.png" in str(error.value) and os.strerror(code) in str(error.value) and "\n" not in str(error.value)
    assert [path.suffix for path in (folder.parent / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert count(opened(folder)) == IMAGES


def test_a_lack_of_memory_stops_packing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "fitted", no_memory)
    with pytest.raises(DataError, match="out of memory; nothing is packed"):
        opened(folder)


@pytest.mark.parametrize("name", ["EACCES", "EIO", "ENOMEM", "EMFILE"])
@pytest.mark.parametrize("file", ["meta.json", "train_images.npy", "test_labels.npy"])
def test_a_cache_that_cannot_be_read_now_is_not_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    opened(folder)
    lines: list[str] = []
    code = getattr(errno, name)
    monkeypatch.setattr(os, "open", failing(code, 99, os.open, file))
    with pytest.raises(DataError) as error:
        opened(folder, lines)
    assert "cannot read packed images" in str(error.value) and os.strerror(code) in str(error.value)
    assert not lines
    monkeypatch.undo()
    assert count(opened(folder, lines)) == IMAGES
    assert not lines, "it was not packed again"


def test_a_cache_is_read_again_after_an_error_that_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder)
    lines: list[str] = []
    monkeypatch.setattr(os, "open", failing(errno.ESTALE, 2, os.open, "meta.json"))
    assert count(opened(folder, lines)) == IMAGES and not lines


@pytest.mark.parametrize("name", ["EACCES", "EIO", "ELOOP", "ENAMETOOLONG"])
@pytest.mark.parametrize("source", ["folder", "parquet", "mnist", "cache"])
def test_a_place_that_cannot_be_read_is_one_line(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str
) -> None:
    place, code = tmp_path / "place", getattr(errno, name)
    place.mkdir()
    monkeypatch.setattr(os, "stat", failing(code, 9999, os.stat, "place"))
    monkeypatch.setattr(Path, "stat", failing(code, 9999, Path.stat, "place"))
    config = DataConfig(cache_dir=str(place if source == "cache" else tmp_path / "cache"), image_size=8)
    words = {"mnist": "mnist", "cache": f"folder:{folder}"}.get(source, f"{source}:{place}/x")
    with pytest.raises(DataError) as error:
        open_dataset(words, place, config, lambda line: None)
    assert "\n" not in str(error.value)
    assert name == "ELOOP" or os.strerror(code) in str(error.value)  # Path.exists: False for loops


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_packing_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lines: list[str] = []
    assert count(opened(folder, lines)) == IMAGES
    assert [line for line in lines if line.startswith("packed")]
    assert code == errno.ENOSYS or "has no file locks" in lines[0]


def test_two_builders_without_locks_use_the_first_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packing.pack
    sums: list[int] = []

    def pack_twice(*words: Any, **named: Any) -> Any:
        if not sums:
            sums.append(0)
            sums.append(int(opened(folder).train.images.sum()))
        return pack(*words, **named)

    monkeypatch.setattr(building, "_lock", lambda cache, slug: NoLock())
    monkeypatch.setattr(packed, "pack", pack_twice)
    assert int(opened(folder).train.images.sum()) == sums[1]
    assert len([path for path in (folder.parent / "cache").iterdir() if path.is_dir()]) == 1


class NoLock:
    is_locked = False

    def acquire(self, timeout: float = -1) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def release(self) -> None:
        pass


def test_what_killed_builders_left_is_removed_by_the_next(tmp_path: Path, folder: Path) -> None:
    from filelock import FileLock

    cache = tmp_path / "cache"
    for name in (
        ".folder-images-building-abc_1",
        ".mnist-building-x",
        ".folder-other-building-y",
        ".living-building-z",
    ):
        (cache / name).mkdir(parents=True)
        (cache / name / "train_images.npy").write_bytes(bytes(9))
    (cache / ".notes").mkdir()
    with FileLock(cache / "living.lock"):
        opened(folder)
    kept = sorted(path.name for path in cache.iterdir() if path.name.startswith("."))
    assert kept == [".living-building-z", ".notes"]


@pytest.mark.parametrize("name", ["x" * 240, "[a]*?", "-building-", "a b\nc"])
def test_any_name_of_a_folder_can_be_packed(tmp_path: Path, folder: Path, name: str) -> None:
    renamed = folder.rename(tmp_path / name)
    assert np.sort(opened(renamed).train.images[:, 0, 0, 0])[-1] == IMAGES - 1 or count(opened(renamed)) == IMAGES
