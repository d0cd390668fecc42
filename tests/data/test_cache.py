"""The packed cache: built once, whole or not at all, and never trusted when damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, building, open_dataset
from gen_dist.data import cache as packed
from gen_dist.errors import DataError
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parent.parent.parent
BUILDER = """
import json, pathlib, sys, time
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from gen_dist.data import packing
ready, go, cache, images, stops = sys.argv[1:]
made, blocks_of = 0, packing.blocks_of
def slow_blocks(source):
    global made
    for block in blocks_of(source):
        yield block
        made += block.images.nbytes
        if made > 6_000_000 and stops == "at its middle":
            time.sleep(600)
        while made > 6_000_000 and stops == "until another waits" and not pathlib.Path(go + " waits").exists():
            time.sleep(0.001)
packing.blocks_of = slow_blocks
def announce(line):
    lines.append(line)
    if line.startswith("waiting"):
        pathlib.Path(go + " waits").touch()
pathlib.Path(ready).touch()
while not pathlib.Path(go).exists():
    time.sleep(0.001)
lines = []
dataset = open_dataset("synthetic", ".", DataConfig(cache_dir=cache, synthetic_images=int(images)), announce)
print(json.dumps({"lines": lines, "digest": dataset.digest, "sum": int(dataset.train.images.sum())}))
"""


def start_builder(tmp_path: Path, number: int, images: int, stops: str) -> subprocess.Popen[str]:
    """Start a process that waits for the file `go` and then opens the synthetic images.

    Packing stops for good `at its middle`, or `until another waits`: both at 6 MB, however busy the machine is.
    """
    command = [*warm_python(), "-c", BUILDER, str(tmp_path / f"ready{number}"), str(tmp_path / "go")]
    return subprocess.Popen(
        [*command, str(tmp_path / "cache"), str(images), stops],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


def open_synthetic(cache: Path, images: int = 200, **options: Any) -> tuple[Dataset, list[str]]:
    lines: list[str] = []
    packing = DataConfig(cache_dir=str(cache), synthetic_images=images, **options)
    return open_dataset("synthetic", "unused", packing, lines.append), lines


def cache_directory(cache: Path) -> Path:
    (directory,) = [path for path in cache.iterdir() if path.is_dir()]
    return directory


def test_two_builders_make_one_cache(tmp_path: Path) -> None:
    builders = [start_builder(tmp_path, number, 20_000, "until another waits") for number in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    (tmp_path / "go").touch()
    results = [json.loads(builder.communicate(timeout=60)[0]) for builder in builders]
    lines = [line for result in results for line in result["lines"]]
    assert sum(line.startswith("packed synthetic") for line in lines) == 1, lines
    assert sum(line.startswith("waiting for another process") for line in lines) == 1, lines
    assert results[0]["digest"] == results[1]["digest"]
    assert results[0]["sum"] == results[1]["sum"] > 0
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".lock"}
    cache_directory(tmp_path / "cache")


def test_a_killed_builder_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    builder = start_builder(tmp_path, 0, 20_000, "at its middle")
    (tmp_path / "go").touch()

    def in_mid_build() -> bool:
        return any(path.stat().st_size > 4_000_000 for path in cache.glob(".*/train_images.npy"))

    wait_for(in_mid_build)
    builder.send_signal(signal.SIGKILL)
    assert builder.wait(timeout=60) == -signal.SIGKILL
    builder.communicate()
    left_over = [path for path in cache.iterdir() if path.is_dir()]
    assert [path.name.startswith(".synthetic-building-") for path in left_over] == [True]
    dataset, lines = open_synthetic(cache)
    assert [line.startswith("packed synthetic") for line in lines] == [True]
    assert len(dataset.train.labels) == 200
    assert not left_over[0].exists()


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy"])
@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "removed"])
@pytest.mark.parametrize("always_verified", [True, False], ids=["small", "large"])
def test_a_damaged_cache_is_announced_and_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str, always_verified: bool
) -> None:
    if not always_verified:
        monkeypatch.setattr(packed, "_ALWAYS_VERIFIED_BYTES", 0)
    whole, _ = open_synthetic(tmp_path)
    path = cache_directory(tmp_path) / name
    content = bytearray(path.read_bytes())
    # Damage is done to a new file: an open map of the old one stays valid.
    path.unlink()
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    again, lines = open_synthetic(tmp_path)
    assert "are damaged" in lines[0] and name in lines[0] and len(lines) == 2
    assert again.digest == whole.digest
    assert np.array_equal(again.train.images, whole.train.images)
    assert open_synthetic(tmp_path)[1] == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"digest": 3, "files": {}, "class_names": []}', "\x00\xff"])
def test_a_damaged_description_is_announced_and_built_again(tmp_path: Path, text: str) -> None:
    whole, _ = open_synthetic(tmp_path)
    (cache_directory(tmp_path) / "meta.json").write_text(text, encoding="latin-1")
    again, lines = open_synthetic(tmp_path)
    assert "are damaged" in lines[0]
    assert again.digest == whole.digest


def test_large_files_are_read_whole_only_if_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    describe = packed._describe

    def record(path: Path) -> dict[str, Any]:
        hashed.append(path.name)
        return describe(path)

    open_synthetic(tmp_path)
    monkeypatch.setattr(packed, "_describe", record)
    open_synthetic(tmp_path)
    assert len(hashed) == 4
    monkeypatch.setattr(packed, "_ALWAYS_VERIFIED_BYTES", 0)
    open_synthetic(tmp_path)
    assert len(hashed) == 4
    # A copy of the cache has other inodes: it is verified once, and then known.
    original = cache_directory(tmp_path)
    shutil.copytree(original, tmp_path / "copy")
    shutil.rmtree(original)
    (tmp_path / "copy").rename(original)
    assert open_synthetic(tmp_path)[1] == []
    assert len(hashed) == 8
    open_synthetic(tmp_path)
    assert len(hashed) == 8


def save_gray(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def test_a_folder_is_packed_again_only_if_it_changed(tmp_path: Path) -> None:
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), image_size=8)
    lines: list[str] = []
    for value in range(4):
        save_gray(tmp_path / "images" / f"{value}.png", value)
    first = open_dataset(f"folder:{tmp_path / 'images'}", ".", packing, lines.append)
    open_dataset(f"folder:{tmp_path / 'images'}", ".", packing, lines.append)
    assert len(lines) == 1
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "other").mkdir()
    (tmp_path / "moved").rename(tmp_path / "other" / "images")
    moved = open_dataset(f"folder:{tmp_path / 'other' / 'images'}", ".", packing, lines.append)
    assert len(lines) == 2 and moved.digest == first.digest
    save_gray(tmp_path / "other" / "images" / "2.png", 99)
    changed = open_dataset(f"folder:{tmp_path / 'other' / 'images'}", ".", packing, lines.append)
    assert len(lines) == 3 and changed.digest != first.digest


def test_images_packed_as_skipped_raise_if_asked_to(tmp_path: Path) -> None:
    for value in range(4):
        save_gray(tmp_path / "images" / f"{value}.png", value)
    (tmp_path / "images" / "bad.png").write_bytes(b"bad")
    source, cache = f"folder:{tmp_path / 'images'}", str(tmp_path / "cache")
    lines: list[str] = []
    for _ in range(2):
        open_dataset(source, ".", DataConfig(cache_dir=cache), lines.append)
    assert sum("left out 1 unreadable image: bad.png" in line for line in lines) == 2
    with pytest.raises(DataError, match=r"bad\.png"):
        open_dataset(source, ".", DataConfig(cache_dir=cache, unreadable_images="error"))


def test_a_finished_cache_opens_from_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_synthetic(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(building, "FileLock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert open_synthetic(tmp_path)[1] == []


def test_cache_directory_is_the_option_then_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path / "variable"))
    open_dataset("synthetic", ".", DataConfig(synthetic_images=64), lambda line: None)
    assert (tmp_path / "variable").is_dir()
    open_synthetic(tmp_path / "option", 64)
    assert (tmp_path / "option").is_dir()
