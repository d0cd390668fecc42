"""Every kind of bad data gives one line that names what is wrong."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import TrainBatches, open_dataset
from gen_dist.errors import DataError


def png(value: int = 0, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side), value).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def folder(files: dict[str, bytes], **options: Any) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    """A case with `folder:` on a directory of these files."""

    def made(path: Path) -> tuple[str, dict[str, Any]]:
        (path / "images").mkdir()
        for name, content in files.items():
            write(path / "images" / name, content)
        return f"folder:{path / 'images'}", options

    return made


def parquet(
    columns: dict[str, list[Any]], names: list[str] | None = None, cut: int | None = None, damage: int | None = None
) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    """A case with `parquet:` on a file of these columns, cut to a number of bytes or damaged at one."""

    def made(path: Path) -> tuple[str, dict[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(columns)
        if names:
            metadata = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
        file = path / "rows.parquet"
        pyarrow.parquet.write_table(table, file, compression="snappy")
        content = bytearray(file.read_bytes())
        if damage is not None:
            content[damage : damage + 40] = b"\xff" * 40
        file.write_bytes(content[:cut])
        return f"parquet:{file}", {}

    return made


def idx(*shape: int) -> bytes:
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    return header + bytes(int(np.prod(shape)))


def mnist(**replaced: bytes | None) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    """A case with `mnist` where some of the four raw files are replaced or (None) missing."""

    def made(path: Path) -> tuple[str, dict[str, Any]]:
        files: dict[str, bytes | None] = {
            "train_images": idx(20, 28, 28),
            "train_labels": idx(20),
            "t10k_images": idx(10, 28, 28),
            "t10k_labels": idx(10),
        }
        for name, content in {**files, **replaced}.items():
            part, _, kind = name.partition("_")
            kind, _, suffix = kind.partition("_")
            if content is not None:
                rank = 3 if kind == "images" else 1
                file_name = f"{part}-{kind}-idx{rank}-ubyte" + (f".{suffix}" if suffix else "")
                write(path / "MNIST" / "raw" / file_name, content)
        return "mnist", {}

    return made


def named(source: str, **options: Any) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    """A case with no files: `{}` in the source and in the options is the test's directory."""

    def made(path: Path) -> tuple[str, dict[str, Any]]:
        filled = {name: value.format(path) if isinstance(value, str) else value for name, value in options.items()}
        return source.format(path), filled

    return made


def file_as_folder(path: Path) -> tuple[str, dict[str, Any]]:
    return f"folder:{write(path / 'image.png', png())}", {}


def train_without_image_rows(path: Path) -> tuple[str, dict[str, Any]]:
    (path / "set").mkdir()
    return f"parquet:{path / 'set'}", {}


def only_test_parquet(path: Path) -> tuple[str, dict[str, Any]]:
    parquet({"image": [png(1), png(2)]})(path)
    (path / "set").mkdir()
    (path / "rows.parquet").rename(path / "set" / "test-00000-of-00001.parquet")
    return f"parquet:{path / 'set'}", {}


def other_labels_in_test(path: Path) -> tuple[str, dict[str, Any]]:
    parquet({"image": [png(1)], "label": [0]}, names=["cat"])(path)
    (path / "rows.parquet").rename(path / "test.parquet")
    parquet({"image": [png(1)], "label": [0]}, names=["dog"])(path)
    (path / "rows.parquet").rename(path / "train.parquet")
    return f"parquet:{path / 'train.parquet'}", {}


def damaged_cifar10(path: Path) -> tuple[str, dict[str, Any]]:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        write(path / "cifar-10-batches-py" / name, b"no pickle")
    return "cifar10", {}


def damaged_svhn(path: Path) -> tuple[str, dict[str, Any]]:
    for split in ("train", "test"):
        write(path / f"{split}_32x32.mat", b"no matrix")
    return "svhn", {}


def cache_below_a_file(path: Path) -> tuple[str, dict[str, Any]]:
    return "synthetic", {"cache_dir": str(write(path / "file", b"") / "cache")}


BYTES = [png(value) for value in range(6)]
TRUNCATED = png(3, side=64)[:60]
LABELLED: dict[str, list[Any]] = {"image": BYTES, "label": [0, 1, 0, 1, 0, 1]}

BAD_DATA: dict[str, tuple[Callable[[Path], tuple[str, dict[str, Any]]], str]] = {
    "unknown source": (named("imagenet"), "unknown data source 'imagenet'; use one of "),
    "unknown kind with path": (named("zip:{}/a.zip"), "unknown data source"),
    "folder without path": (named("folder:"), "folder: needs a path"),
    "parquet without path": (named("parquet:"), "parquet: needs a path"),
    "folder in a home that is not there": (named("folder:~no_such_user/images"), "there is no such home directory"),
    "missing folder": (named("folder:{}/nowhere"), "there is no such directory"),
    "a file as folder": (file_as_folder, "that is a file, not a directory"),
    "empty folder": (folder({}), "no images in"),
    "folder with text only": (folder({"a.txt": b"a", "b.json": b"{}", ".c.png": png()}), "looked for .avif .bmp"),
    "folder with empty classes": (folder({"cat/notes.txt": b""}), "no images in"),
    "one image": (folder({"a.png": png()}), "one readable image is too few"),
    "all truncated": (folder({f"{i}.png": TRUNCATED for i in range(4)}), "4 of 4 images are unreadable (0.png: "),
    "one of one unreadable": (folder({"a.png": b""}), "1 of 1 image is unreadable (a.png: "),
    "more than half unreadable": (
        folder({"a.png": png(), "b.png": b"", "c.jpg": b"x"}),
        "2 of 3 images are unreadable",
    ),
    "one unreadable, as an error": (
        folder({"a.png": png(), "b.png": png(), "c.png": TRUNCATED}, unreadable_images="error"),
        "c.png is unreadable",
    ),
    "images beside classes": (folder({"a.png": png(), "cat/b.png": png()}), "1 image beside its class directories"),
    "test class unknown to train": (
        folder({"train/cat/a.png": png(), "test/dog/b.png": png()}),
        "test/dog/b.png is of class 'dog'",
    ),
    "unreadable test split": (
        folder({f"train/a/{i}.png": png() for i in range(3)} | {"test/a/b.png": b""}),
        "the test split has no readable image",
    ),
    "missing parquet": (named("parquet:{}/nowhere"), "there is no such file or directory"),
    "directory without parquet": (train_without_image_rows, "no *.parquet files"),
    "directory with a test split only": (only_test_parquet, "no train*.parquet files there"),
    "truncated parquet": (parquet(LABELLED, cut=-40), "rows.parquet is not a whole parquet file"),
    "empty parquet file": (parquet(LABELLED, cut=0), "rows.parquet is empty: 0 bytes, not a whole parquet file"),
    "damaged parquet rows": (parquet(LABELLED, damage=4), "rows.parquet is not a whole parquet file"),
    "parquet without rows": (parquet({"image": [], "label": []}), "it has no images: no rows in rows.parquet"),
    "parquet without image column": (parquet({"picture": BYTES}), "no column image or img, only picture"),
    "parquet with numbers as images": (parquet({"image": [1, 2, 3]}), "is int64, not bytes of images"),
    "parquet with bytes as labels": (parquet({**LABELLED, "label": [b"a", b"b"] * 3}), "is binary, not integers"),
    "parquet label above its names": (parquet({**LABELLED, "label": [0, 1, 0, 2, 0, 1]}, ["a", "b"]), "label 2 of"),
    "parquet label below 0": (parquet({**LABELLED, "label": [0, 1, -1, 1, 0, 1]}), "row 2 has no label"),
    "parquet label absurdly high": (
        parquet({**LABELLED, "label": [0, 1, 10**12, 1, 0, 1]}),
        "labels go from 0 to 1000000000000",
    ),
    "parquet label missing": (parquet({**LABELLED, "label": [0, 1, None, 1, 0, 1]}), "row 2 has no label"),
    "parquet with images of several sizes": (parquet({"image": [*BYTES, png(0, 9)]}), "give --image-size"),
    "parquet splits with other class names": (other_labels_in_test, "other labels or class names"),
    "cache directory below a file": (cache_below_a_file, "cannot write packed images to"),
    "cache in a place that cannot be written": (
        named("mnist5k", cache_dir="/proc/gen_dist"),
        "--cache-dir or $GEN_DIST",
    ),
    "no mnist files, no network": (named("mnist"), "use --data mnist5k"),
    "no kmnist files, no network": (
        named("kmnist"),
        "KMNIST/raw/train-images-idx3-ubyte is not there and the download",
    ),
    "no cifar10 files, no network": (named("cifar10"), "no route to host"),
    "no svhn files, no network": (named("svhn"), "train_32x32.mat is not there and the download failed"),
    "one mnist file missing, no network": (mnist(t10k_labels=None), "t10k-labels-idx1-ubyte is not there"),
    "truncated mnist file": (mnist(train_images=idx(20, 28, 28)[:-1]), "has 15695 bytes, but its header [20, 28, 28]"),
    "truncated mnist header": (
        mnist(train_labels=b"\x00\x00\x08\x01\x00"),
        "train-labels-idx1-ubyte is not an idx file",
    ),
    "mnist images that are none": (mnist(train_images=b"<html>not found</html>"), "is not an idx file"),
    "empty mnist file": (mnist(t10k_images=b""), "t10k-images-idx3-ubyte is not an idx file"),
    "truncated mnist gzip, no network": (
        mnist(train_images=None, train_images_gz=b"\x1f\x8b\x08\x00\x00"),
        "train-images-idx3-ubyte.gz is truncated or damaged and the download failed",
    ),
    "fewer mnist labels than images": (mnist(train_labels=idx(19)), "20 images but 19 labels"),
    "mnist label out of range": (mnist(train_labels=idx(20)[:-1] + b"\x0a"), "label 10 of mnist train image 19"),
    "mnist splits of other sizes": (mnist(t10k_images=idx(10, 32, 32)), "images differ in size"),
    "mnist without images": (mnist(train_images=idx(0, 28, 28), train_labels=idx(0)), "the train split has no"),
    "damaged cifar10": (damaged_cifar10, "cifar-10-batches-py is damaged (a checksum differs); delete it"),
    "damaged svhn": (damaged_svhn, "train_32x32.mat is damaged (a checksum differs); delete it"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    make, words = BAD_DATA[case]
    source, options = make(tmp_path)
    options = {"cache_dir": str(tmp_path / "cache"), **options}
    with pytest.raises(DataError) as error:
        open_dataset(source, tmp_path, DataConfig(**options))
    message = str(error.value)
    assert words in message
    assert "\n" not in message and len(message) < 600
    assert error.value.__suppress_context__ or error.value.__context__ is None
    # Nothing is left that could be taken for a packed source, and nothing half-built.
    cache = tmp_path / "cache"
    assert not cache.exists() or [path.suffix for path in cache.iterdir()] in ([], [".lock"])


def test_fewer_images_than_a_batch_is_one_clear_line(tmp_path: Path) -> None:
    split = open_dataset("mnist5k", tmp_path, DataConfig(cache_dir=str(tmp_path))).train
    with pytest.raises(DataError) as error:
        TrainBatches(
            split,
            seed=0,
            global_batch_size=5000,
            micro_batches=[(0, 5000)],
            device=torch.device("cpu"),
            resident_budget_bytes=0,
        )
    wanted = "has 4,000 images, fewer than the 5,000 of a batch; use --global-batch-size 4000 or less"
    assert str(error.value) == f"train split of mnist5k {wanted}"


def assert_refused_while_packing(cache: Path, reason: str) -> None:
    with pytest.raises(DataError) as error:
        open_dataset("synthetic", ".", DataConfig(cache_dir=str(cache), synthetic_images=20_000))
    message = str(error.value)
    assert str(cache) in message and reason in message and "free some space or name another directory" in message
    assert "\n" not in message
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    # Once there is room again, the same call packs.
    dataset = open_dataset("synthetic", ".", DataConfig(cache_dir=str(cache), synthetic_images=100))
    assert len(dataset.train.labels) == 100


def test_a_file_size_limit_while_packing_is_one_clear_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        assert_refused_while_packing(tmp_path / "cache", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_packing_is_one_clear_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"no right to mount a small disk: {mount.stderr.strip()}")
    try:
        assert_refused_while_packing(disk / "cache", os.strerror(28))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("photos", "folder:"),
        ("photos.tar.d", "folder:"),
        ("a.npy", "array:"),
        ("a.npz", "array:"),
        ("a.parquet", "parquet:"),
        ("a.tar", "shards:"),
        ("spark.parquet/", "parquet:"),
        ("a-*.tar", "shards:"),
        ("a.zip", None),
        ("none", None),
    ],
)
def test_a_path_that_is_no_source_is_told_as_which(
    name: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("photos") or name.endswith("/"):
        (tmp_path / name).mkdir()
        name = name.rstrip("/")
    elif name != "none" and "*" not in name:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as error:
        open_dataset(name, tmp_path, DataConfig(cache_dir=str(tmp_path / "cache")))
    said = str(error.value)
    assert f"write {meant}{name}" in said if meant else "use one of array:PATH, cifar10, fashion_mnist, folder:" in said
