"""Packed images keep the names of their files, beside the images and outside of their digest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data import cache as packed
from gen_dist.data.image_names import ImageNames, write_names


def _open(tmp_path: Path, lines: list[str] | None = None) -> Dataset:
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), image_size=8, test_fraction=0.3)
    return open_dataset(f"folder:{tmp_path / 'images'}", ".", packing, (lines if lines is not None else []).append)


def _write_folder(tmp_path: Path) -> dict[str, int]:
    """Images of one grey level each, and an unreadable one; returns the levels by name."""
    levels = {f"{'ab'[value % 2]}/{value:02}.png": 10 * value for value in range(20)}
    for name, value in levels.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), value).save(tmp_path / "images" / name)
    (tmp_path / "images" / "a" / "07.png").write_bytes(b"unreadable")
    return levels


def test_each_image_keeps_the_name_of_its_file(tmp_path: Path) -> None:
    levels = _write_folder(tmp_path)
    for _ in range(2):  # packed, then opened
        dataset = _open(tmp_path)
        for split in (dataset.train, dataset.test):
            assert split.names is not None
            assert [levels[name] for name in split.names] == split.images[:, 0, 0, 0].tolist()
        assert {*dataset.train.names, *dataset.test.names} == {*levels} - {"a/07.png"}  # type: ignore[misc]


def test_a_cache_without_names_opens_with_the_same_digest(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    with_names = _open(tmp_path)
    (directory,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    meta = json.loads((directory / "meta.json").read_text())
    for name in ("train_names.npy", "test_names.npy"):  # as version 0.1.0 wrote it
        (directory / name).unlink()
        del meta["files"][name]
    meta["digest_of_this_file"] = packed.digest_of_meta(meta)
    (directory / "meta.json").write_text(json.dumps(meta))
    lines: list[str] = []
    without = _open(tmp_path, lines)
    assert without.digest == with_names.digest and without.train.names is None
    assert not any("packed" in line for line in lines)


@pytest.mark.parametrize("damage", ["flipped byte", "removed"])
def test_damaged_names_are_announced_and_packed_again(tmp_path: Path, damage: str) -> None:
    _write_folder(tmp_path)
    whole = _open(tmp_path)
    assert whole.test.names is not None
    (path,) = (tmp_path / "cache").glob("*/test_names.npy")
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped byte":
        content[-3] ^= 1
        path.write_bytes(content)
    lines: list[str] = []
    again = _open(tmp_path, lines)
    assert any("are damaged" in line and "test_names.npy" in line for line in lines)
    assert again.test.names is not None and list(again.test.names) == list(whole.test.names)


def test_a_source_of_unnamed_images_has_no_names(tmp_path: Path) -> None:
    packing = DataConfig(cache_dir=str(tmp_path), synthetic_images=64)
    dataset = open_dataset("synthetic", ".", packing, lambda _line: None)
    assert dataset.train.names is None and dataset.test.names is None


def test_names_of_any_text_are_read_as_written(tmp_path: Path) -> None:
    names = ["a.png", "", "é/ü 2.png", "two\nlines", "\udcff.png"]
    write_names(tmp_path / "names.npy", names)
    read = ImageNames(np.load(tmp_path / "names.npy", mmap_mode="c"))
    assert list(read) == ["a.png", "", "é/ü 2.png", r"two\nlines", r"\xff.png"]
    assert read[-1] == r"\xff.png" and read[1:3] == ["", "é/ü 2.png"] and len(read) == 5
