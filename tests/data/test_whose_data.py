"""Packed images belong to the files that they were made of, and to no others that look alike."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, identity, open_dataset
from gen_dist.data.fitting import Fitting
from gen_dist.errors import DataError
from tests.support.digits import write_idx


def write_folder(folder: Path, shade: int, count: int = 6) -> Path:
    (folder / "a").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / "a" / f"{number}.pgm"
        path.write_bytes(b"P5\n8 8\n255\n" + bytes([shade]) * 64)
        os.utime(path, (0, 0))
    return folder


def write_parquet(path: Path, shade: int) -> Path:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    Image.new("L", (8, 8), shade).save(stream, "BMP")
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": [stream.getvalue()] * 6}), path, compression="none")
    os.utime(path, (0, 0))
    return path


def write_mnist(root: Path, shade: int) -> Path:
    for part in ("train", "t10k"):
        images, labels = np.full((6, 28, 28), shade, np.uint8), np.zeros(6, np.uint8)
        for name, content in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            write_idx(root / "MNIST/raw" / f"{part}-{name}", content)
            os.utime(root / "MNIST/raw" / f"{part}-{name}", (0, 0))
    return root


def opened(source: str, tmp_path: Path, root: Path = Path("unused")) -> Dataset:
    return open_dataset(source, root, DataConfig(cache_dir=str(tmp_path / "cache"), image_size=8), lambda line: None)


def same_status(_: os.stat_result) -> list[int]:
    return [0, 0, 0, 0]  # as two images of a file system may give


SETS: dict[str, Callable[[Path, int, Path], Dataset]] = {
    "folder": lambda place, shade, tmp: opened(f"folder:{write_folder(place / 'imgs', shade)}", tmp),
    "parquet": lambda place, shade, tmp: opened(f"parquet:{write_parquet(place / 'set.parquet', shade)}", tmp),
    "parquet directory": lambda place, shade, tmp: opened(
        f"parquet:{write_parquet(place / 'set/train.parquet', shade).parent}", tmp
    ),
    "mnist": lambda place, shade, tmp: opened("mnist", tmp, write_mnist(place / "root", shade)),
}


@pytest.mark.parametrize("kind", SETS)
def test_sets_of_equal_names_sizes_and_times_are_two(tmp_path: Path, kind: str) -> None:
    for version, shade in (("v1", 40), ("v2", 200)):
        assert (SETS[kind](tmp_path / version, shade, tmp_path).train.images == shade).all()


@pytest.mark.parametrize("kind", SETS)
def test_sets_of_equal_path_and_state_are_told_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for module in ("folder", "parquet", "torchvision_sets"):
        monkeypatch.setattr(sys.modules[f"gen_dist.data.sources.{module}"], "stamp", same_status)
    # The folder is scanned with the real size in its stamp, which reading compares.
    monkeypatch.setattr(sys.modules["gen_dist.data.sources.folder"], "stamp", lambda status: [status.st_size, 0, 0, 0])
    for shade in (40, 200):
        shutil.rmtree(tmp_path / "at", ignore_errors=True)
        assert (SETS[kind](tmp_path / "at", shade, tmp_path).train.images == shade).all()


def test_files_overwritten_in_place_are_packed_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "imgs", 40)
    assert (opened(f"folder:{folder}", tmp_path).train.images == 40).all()
    before = [path.stat() for path in sorted((folder / "a").iterdir())]
    write_folder(folder, 200)  # as cp -p does: the same inodes, sizes and times
    after = [path.stat() for path in sorted((folder / "a").iterdir())]
    assert [(s.st_ino, s.st_size, s.st_mtime_ns) for s in before] == [
        (s.st_ino, s.st_size, s.st_mtime_ns) for s in after
    ]
    assert (opened(f"folder:{folder}", tmp_path).train.images == 200).all()


def test_of_large_sets_a_part_spread_evenly_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_READ_WHOLE_BYTES", 0)
    monkeypatch.setattr(identity, "_PIECE_BYTES", 16)
    many = [tmp_path / f"{number}" for number in range(300)]
    for path in (*many, tmp_path / "large"):
        path.write_bytes(bytes(10_000))
    for files in (many, [tmp_path / "large"]):
        named = [(str(path), 10_000) for path in files]
        before = identity.content_sample(named)
        for path in files:
            path.write_bytes(b"\x01" * 10_000)
        assert identity.content_sample(named) != before
        assert identity.content_sample(named) == identity.content_sample(named)


def test_a_folder_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "imgs", 40)
    source = sys.modules["gen_dist.data.sources.folder"].Folder(folder)
    (folder / "a" / "3.pgm").write_bytes(b"P5\n9 9\n255\n" + bytes(81))
    with pytest.raises(DataError, match=r"3\.pgm changed while it was read"):
        for block in source.blocks():
            for image in block.images:
                sys.modules["gen_dist.data.decoding"].decode_image(image, Fitting(8, 8), None)


def test_a_parquet_file_replaced_while_it_is_packed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "one/set.parquet", 40)
    other = write_parquet(tmp_path / "two/set.parquet", 200)
    parquet = sys.modules["gen_dist.data.sources.parquet"]
    image_rows, calls = parquet.image_rows, []

    def replaced_first(*words: object) -> object:
        calls.append(words)
        if len(calls) == 2:  # the first look is at the type of the images
            os.replace(other, path)
        return image_rows(*words)

    monkeypatch.setattr(parquet, "image_rows", replaced_first)
    with pytest.raises(DataError, match="changed while they were packed"):
        opened(f"parquet:{path}", tmp_path)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]
