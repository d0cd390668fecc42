"""Shards of any type and number of channels: the values that the same images have as a folder or an array."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import gen_dist
from gen_dist.config import DataConfig
from gen_dist.data import Dataset, TrainBatches, open_dataset
from gen_dist.data.array_bytes import array_header, array_values
from gen_dist.errors import DataError
from tests.data.test_deep_files import tiff
from tests.support.shards import encoded, tar_of

COUNT = 20


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path: Path, lines: list[str]) -> Callable[..., Dataset]:
    def open_it(source: str, **options: Any) -> Dataset:
        packing = DataConfig(cache_dir=str(tmp_path / "cache"), **{"test_fraction": 0.2, **options})
        return open_dataset(source, "unused", packing, lines.append)

    return open_it


def values(number: int, dtype: str, channels: int = 1) -> NDArray[Any]:
    generator = np.random.default_rng(number)
    if np.dtype(dtype).kind == "f":
        return generator.normal(0, 3, (channels, 6, 9)).astype(dtype)
    ends = np.iinfo(dtype)
    return generator.integers(ends.min, ends.max, (channels, 6, 9), dtype)


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values(number, "uint16")[0]).save(stream, "PNG")
    return stream.getvalue()


def npy(number: int, dtype: str, channels: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values(number, dtype, channels))
    return stream.getvalue()


def write(directory: Path, files: dict[str, bytes]) -> tuple[str, str]:
    """The same files as two shards, and as a folder."""
    (directory / "files").mkdir()
    for name, content in files.items():
        (directory / "files" / name).write_bytes(content)
    names = sorted(files)
    for shard in range(2):
        part = {name: files[name] for name in names[shard * COUNT // 2 : (shard + 1) * COUNT // 2]}
        (directory / f"{shard}.tar").write_bytes(tar_of(part))
    return f"shards:{directory}/{{0..1}}.tar", f"folder:{directory / 'files'}"


def images_of(dataset: Dataset) -> set[bytes]:
    return {image.tobytes() for split in (dataset.train, dataset.test) for image in split.images[:]}


def first_batch(dataset: Dataset) -> torch.Tensor:
    batches = TrainBatches(
        dataset.train,
        seed=0,
        global_batch_size=8,
        micro_batches=[(0, 8)],
        device=torch.device("cpu"),
        resident_budget_bytes=0,
    )
    images, _ = batches.micro_batch(0, 0)
    batches.close()
    return images


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bit_shards_have_the_values_of_a_folder(kind: str, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    content = png if kind == "png" else lambda number: tiff(values(number, "uint16")[0], "<>"[number % 2])
    shards, folder = write(tmp_path, {f"{number:03}.{kind}": content(number) for number in range(COUNT)})
    ours, theirs = opened(shards, value_range="dtype"), opened(folder, value_range="dtype")
    assert ours.train.images.dtype == np.uint16 and ours.image_shape == (1, 6, 9)
    assert images_of(ours) == images_of(theirs)
    assert ours.scale.low == theirs.scale.low and ours.scale.high == theirs.scale.high
    batch = first_batch(ours)
    assert batch.dtype == torch.float32 and 0 <= batch.min() <= batch.max() <= 255
    reduced, by_folder = opened(shards, dtype="uint8"), opened(folder, dtype="uint8")
    assert images_of(reduced) == images_of(by_folder)


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 5), ("int16", 1), ("uint8", 3), ("float16", 2)])
def test_arrays_in_shards_have_any_type_and_channels(
    dtype: str, channels: int, tmp_path: Path, lines: list[str], opened: Callable[..., Dataset]
) -> None:
    shards, _ = write(tmp_path, {f"{number:03}.npy": npy(number, dtype, channels) for number in range(COUNT)})
    np.save(tmp_path / "whole.npy", np.stack([values(number, dtype, channels) for number in range(COUNT)]))
    ours = opened(shards)
    theirs = opened(f"array:{tmp_path / 'whole.npy'}", layout="NCHW")
    assert images_of(ours) == images_of(theirs)
    assert ours.image_shape == theirs.image_shape
    assert (ours.scale.dtype, ours.scale.low, ours.scale.high) == (dtype, theirs.scale.low, theirs.scale.high)
    told = any("the range of values is that of 20 images" in line for line in lines)
    assert told == (dtype != "uint8")
    assert opened(shards).digest == ours.digest


@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9), (1, 6, 9)])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "|u1", ">f4", "<f2", ">i2"])
def test_arrays_are_read_as_numpy_reads_them(dtype: str, shape: tuple[int, ...]) -> None:
    for order in ("C", "F"):
        array = np.asarray(np.random.default_rng(0).integers(0, 100, shape), dtype, order=order)
        for version in ((1, 0), (2, 0), (3, 0)):
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array, version)
            found = array_values(stream.getvalue(), True)
            assert found.dtype == array.dtype.newbyteorder("=") and found.flags.c_contiguous
            assert array_header(stream.getvalue()) == (found.shape, found.dtype.name)
            assert np.array_equal(found.reshape(shape), np.load(io.BytesIO(stream.getvalue())))


def test_values_beside_an_image_are_no_image(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    files: dict[str, bytes] = {}
    for number in range(6):
        image = {f"{number}.png": encoded(number)}
        beside = {f"{number}.npy": npy(number, "float32", 1)}
        files |= beside | image if number % 2 else image | beside
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    assert opened(f"shards:{tmp_path}/a.tar").train.images.dtype == np.uint8


def many(*content: bytes) -> dict[str, bytes]:
    """Ten images of each content."""
    endings = ["npy" if one.startswith(b"\x93NUMPY") else "png" for one in content]
    return {f"{i}{j}.{endings[j]}": one for i in range(10) for j, one in enumerate(content)}


BAD: dict[str, dict[str, bytes]] = {
    "images are of uint16 and uint8; reduce them: --dtype uint8": many(png(0), encoded(1)),
    "images have 2 and 3 channels": many(npy(0, "uint8", 2), npy(1, "uint8", 3)),
    "images looked at are unreadable": many(npy(0, "uint8", 2)[:100], b"\x93NUMPY" + bytes(80)),
    "an array of complex64": many(npy(0, "uint8", 2).replace(b"'|u1'", b"'<c8'")),
}


@pytest.mark.parametrize("line", BAD)
def test_values_that_cannot_be_kept_are_one_line(line: str, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(BAD[line]))
    with pytest.raises(DataError, match=line) as raised:
        opened(f"shards:{tmp_path}/a.tar")
    assert "\n" not in str(raised.value)


def test_a_vae_gives_the_units_of_shards_back(tmp_path: Path) -> None:
    shards, _ = write(tmp_path, {f"{number:03}.npy": npy(number, "int16", 2) for number in range(COUNT)})
    config = gen_dist.preset("vae-mnist").with_options(
        data=shards,
        cache_dir=str(tmp_path / "cache"),
        value_range="dtype",
        likelihood="gaussian",
        hidden_sizes=(8,),
        steps=2,
        global_batch_size=6,
        run_dir=str(tmp_path / "run"),
    )
    gen_dist.train(config, say=lambda _: None)
    images = torch.from_numpy(np.stack([values(number, "int16", 2) for number in range(3)]))
    assert gen_dist.load(tmp_path / "run").reconstruct(images).dtype == torch.int16
