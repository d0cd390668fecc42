"""Every source packs into the pixels, labels and splits that it holds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset, packed_files, packing
from gen_dist.data.decoding import decode_image
from gen_dist.data.packed_files import ArrayFile
from tests.support.digits import write_idx

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def open_source(tmp_path: Path) -> Callable[..., Dataset]:
    def opened(source: str, root: Path = tmp_path, **options: Any) -> Dataset:
        return open_dataset(source, root, DataConfig(cache_dir=str(tmp_path / "cache"), **options))

    return opened


def images_by_class(dataset: Dataset) -> dict[str, NDArray[np.uint8]]:
    """The only image of each class, from whichever split has it."""
    images = np.concatenate([dataset.train.images, dataset.test.images])
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    return {dataset.class_names[label]: image for image, label in zip(images, labels, strict=True)}


def encode(image: Image.Image, extension: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format={"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension.upper()), **options)
    return stream.getvalue()


def save(folder: Path, class_name: str, image: Image.Image, extension: str = "png", **options: Any) -> Path:
    (folder / class_name).mkdir(parents=True, exist_ok=True)
    path = folder / class_name / f"{len(list((folder / class_name).iterdir())):03d}.{extension}"
    path.write_bytes(encode(image, extension, **options))
    return path


def mixed_folder(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Write an image of each format and mode, each in a class of its own; returns the colour at its centre."""
    side = (24, 24)
    colours: dict[str, tuple[int, int, int]] = {}

    def add(name: str, image: Image.Image, colour: tuple[int, int, int], extension: str, **options: Any) -> None:
        save(folder, name, image, extension, **options)
        colours[name] = colour

    orange = Image.new("RGB", side, (255, 128, 0))
    add("rgb_png", orange, (255, 128, 0), "png")
    add("rgb_jpg", orange, (255, 128, 0), "jpg", quality=95, subsampling=0)
    add("rgb_bmp", orange, (255, 128, 0), "bmp")
    add("rgb_webp", orange, (255, 128, 0), "webp", lossless=True)
    add("rgb_ppm", orange, (255, 128, 0), "ppm")
    add("gray_png", Image.new("L", side, 77), (77, 77, 77), "png")
    add("gray_jpg", Image.new("L", side, 77), (77, 77, 77), "jpg", quality=95)
    add("one_bit", Image.new("1", side, 1), WHITE, "png")
    palette = Image.new("P", side, 1)
    palette.putpalette([0, 0, 0, 10, 20, 200])
    add("palette", palette, (10, 20, 200), "png")
    add("palette_transparent", palette, WHITE, "png", transparency=1)
    add("palette_half", palette, (132, 137, 227), "png", transparency=bytes([255, 128]))
    add("gif", palette, (10, 20, 200), "gif")
    add("cmyk_jpg", Image.new("CMYK", side, (0, 255, 255, 0)), RED, "jpg", quality=95)
    add("cmyk_tif", Image.new("CMYK", side, (255, 0, 255, 0)), GREEN, "tif")
    add("rgba_half", Image.new("RGBA", side, (255, 0, 0, 128)), (255, 127, 127), "png")
    add("rgba_clear", Image.new("RGBA", side, (255, 0, 0, 0)), WHITE, "png")
    add("rgb_colour_key", Image.new("RGB", side, RED), WHITE, "png", transparency=RED)
    add("gray_alpha", Image.new("LA", side, (0, 64)), (191, 191, 191), "png")
    add("sixteen_bit", Image.fromarray(np.full(side, 30000, np.uint16)), (117, 117, 117), "png")
    add("sixteen_bit_full", Image.fromarray(np.full(side, 65535, np.uint16)), WHITE, "tif")
    add("sixteen_bit_big_endian", Image.frombytes("I;16B", side, b"\x40\x00" * 576), (64, 64, 64), "tif")
    add("int32", Image.fromarray(np.full(side, 30000, np.int32)), (117, 117, 117), "tif")
    add("float_unit", Image.fromarray(np.full(side, 0.25, np.float32)), (64, 64, 64), "tif")
    add("float_255", Image.fromarray(np.full(side, 200.4, np.float32)), (200, 200, 200), "tif")
    add("ycbcr", Image.new("YCbCr", side, (76, 85, 255)), (254, 0, 0), "jpg", quality=95, subsampling=0)
    return colours


def test_every_format_and_mode_packs_with_its_colours(
    tmp_path: Path, open_source: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    colours = mixed_folder(folder)
    whole = encode(Image.effect_noise((64, 64), 90).convert("RGB"), "jpg")
    (folder / "rgb_jpg" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "rgb_png" / "text.png").write_text("no image at all")
    (folder / "rgb_png" / "notes.txt").write_text("ignored without a word")
    (folder / "rgb_png" / ".hidden.png").write_text("ignored too")
    dataset = open_source(f"folder:{folder}", image_size=16)
    images = images_by_class(dataset)
    assert dataset.image_shape == (3, 16, 16)
    assert dataset.class_names == tuple(sorted(colours))
    assert len(dataset.train.labels) + len(dataset.test.labels) == len(colours)
    for name, colour in colours.items():
        tolerance = 3 if "jp" in name or name == "ycbcr" else 1
        assert np.abs(images[name].reshape(3, -1).T.astype(int) - colour).max() <= tolerance, name
    lines = capsys.readouterr().out.splitlines()
    assert "left out 2 unreadable images: rgb_jpg/truncated.jpg (image file is truncated (" in lines[0]
    assert "rgb_png/text.png (not an image of a format that is read)" in lines[0]


def test_a_folder_of_gray_images_packs_as_one_channel(tmp_path: Path, open_source: Callable[..., Dataset]) -> None:
    folder = tmp_path / "gray"
    for value in range(0, 250, 10):
        save(folder, "a", Image.new("L", (9, 9), value))
        save(folder, "b", Image.new("LA", (9, 9), (value, 255)))
    dataset = open_source(f"folder:{folder}", image_size=8)
    assert dataset.image_shape == (1, 8, 8)
    for split in (dataset.train, dataset.test):
        assert (split.images == split.images[:, :1, :1, :1]).all()
    values = np.concatenate([dataset.train.images, dataset.test.images])[:, 0, 4, 4]
    assert sorted(values) == sorted([*range(0, 250, 10)] * 2)
    assert open_source(f"folder:{folder}", image_size=8, channels=3).image_shape == (3, 8, 8)
    save(folder, "0", Image.new("RGB", (9, 9), RED))
    coloured = open_source(f"folder:{folder}", image_size=8)
    assert coloured.image_shape == (3, 8, 8)
    assert open_source(f"folder:{folder}", image_size=8, channels=1).image_shape == (1, 8, 8)


def test_images_are_cropped_at_the_centre_and_resized(tmp_path: Path, open_source: Callable[..., Dataset]) -> None:
    wide = Image.new("RGB", (120, 40), RED)
    wide.paste(GREEN, (40, 0, 80, 40))
    wide.paste(BLUE, (80, 0, 120, 40))
    folder = tmp_path / "crop"
    save(folder, "wide", wide)
    save(folder, "tall", wide.rotate(90, expand=True))
    save(folder, "tiny", Image.new("RGB", (1, 3), GREEN))
    huge = Image.new("RGB", (2400, 800), RED)
    huge.paste(GREEN, (800, 0, 1600, 800))
    save(folder, "huge_jpg", huge, "jpg", quality=95)
    dataset = open_source(f"folder:{folder}", image_size=10)
    for name, image in images_by_class(dataset).items():
        # The filter mixes colours at the two edges, as it does when the whole image is resized and then cropped.
        inside = image[:, 2:-2, 2:-2].reshape(3, -1).T.astype(int)
        assert np.abs(inside - GREEN).max() <= (3 if name == "huge_jpg" else 0), name
        assert np.abs(image.reshape(3, -1).T.astype(int) - GREEN).max() < 64, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, open_source: Callable[..., Dataset], orientation: int) -> None:
    upright = Image.new("RGB", (16, 16), RED)
    upright.paste(BLUE, (0, 8, 16, 16))
    upright.paste(GREEN, (0, 0, 8, 8))
    # The image as a camera stores it; the orientation tag turns it upright again (EXIF 2.32, tag 0x0112).
    transpose = Image.Transpose
    undo = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = tmp_path / "exif"
    for _ in range(2):
        save(folder, "a", stored, "png", exif=exif)
    image = open_source(f"folder:{folder}", image_size=16).train.images[0]
    assert tuple(image[:, 4, 4]) == GREEN
    assert tuple(image[:, 4, 12]) == RED
    assert tuple(image[:, 12, 8]) == BLUE


def test_directories_train_and_test_are_the_splits(tmp_path: Path, open_source: Callable[..., Dataset]) -> None:
    folder = tmp_path / "splits"
    for split, count in (("train", 5), ("val", 2)):
        for value in range(count):
            save(folder, f"{split}/cat", Image.new("L", (8, 8), value))
            save(folder, f"{split}/dog/nested", Image.new("L", (8, 8), 100 + value))
    dataset = open_source(f"folder:{folder}", image_size=8)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [0, 1, 100, 101]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    alone = open_source(f"folder:{folder / 'train'}", image_size=8)
    assert alone.class_names == ("cat", "dog")
    assert (len(alone.train.labels), len(alone.test.labels)) == (9, 1)


def test_a_flat_folder_is_one_class(tmp_path: Path, open_source: Callable[..., Dataset]) -> None:
    folder = tmp_path / "flat"
    for value in range(40):
        save(folder, ".", Image.new("RGB", (70, 80), (value, 0, 0)))
    dataset = open_source(f"folder:{folder}", test_fraction=0.25)
    assert dataset.image_shape == (3, 80, 70)
    assert dataset.class_names == ("all",)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (30, 10)
    held_out = dataset.test.images[:, 0, 0, 0].tolist()
    kept = dataset.train.images[:, 0, 0, 0].tolist()
    assert kept == sorted(kept)
    assert sorted(kept + held_out) == list(range(40))


def test_a_link_back_into_a_folder_does_not_go_round(tmp_path: Path, open_source: Callable[..., Dataset]) -> None:
    folder = tmp_path / "loop"
    save(folder, "a", Image.new("L", (8, 8), 1))
    save(folder, "a", Image.new("L", (8, 8), 2))
    (folder / "a" / "again").symlink_to(folder / "a", target_is_directory=True)
    dataset = open_source(f"folder:{folder}", image_size=8)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 2


def test_decompression_bombs_are_left_out(
    tmp_path: Path, open_source: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bomb"
    for value in range(3):
        save(folder, "a", Image.new("L", (8, 8), value))
    save(folder, "a", Image.new("1", (10000, 9000)))  # above the size at which PIL warns, below that at which it raises
    dataset = open_source(f"folder:{folder}", image_size=8)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 3
    assert "left out 1 unreadable image: a/003.png" in capsys.readouterr().out


def write_parquet(path: Path, images: list[Any], labels: list[int] | None, **options: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {options.get("image_column", "image"): images}
    if labels is not None:
        columns[options.get("label_column", "label")] = labels
    table = pyarrow.table(columns)
    if "names" in options:
        feature = {"_type": "ClassLabel", "names": options["names"]}
        metadata = {"info": {"features": {options.get("label_column", "label"): feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=options.get("row_group_size", 100))


def hugging_face(*images: Image.Image) -> list[dict[str, Any]]:
    return [{"bytes": encode(image, "png"), "path": f"{i}.png"} for i, image in enumerate(images)]


def test_parquet_packs_rows_in_order_with_the_class_names(tmp_path: Path, open_source: Callable[..., Dataset]) -> None:
    train = [Image.new("RGB", (8, 6), (value % 256, value // 256, 7)) for value in range(700)]
    write_parquet(
        tmp_path / "train.parquet", hugging_face(*train), [i % 3 for i in range(700)], names=["cat", "dog", "eel"]
    )
    write_parquet(tmp_path / "test.parquet", hugging_face(*train[:5]), [2, 1, 0, 0, 0], names=["cat", "dog", "eel"])
    dataset = open_source(f"parquet:{tmp_path / 'train.parquet'}")
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.image_shape == (3, 6, 8)
    values = dataset.train.images[:, 0, 0, 0].astype(int) + 256 * dataset.train.images[:, 1, 5, 7].astype(int)
    assert values.tolist() == list(range(700))
    assert dataset.train.labels.tolist() == [i % 3 for i in range(700)]
    assert dataset.test.labels.tolist() == [2, 1, 0, 0, 0]
    assert (dataset.train.images[:, 2] == 7).all()


@pytest.mark.parametrize(("budget", "bound"), [(8, 10), (2, 3)])  # images: those of five tasks, those of three
def test_decoded_images_in_memory_are_bounded_by_bytes(
    budget: int, bound: int, tmp_path: Path, open_source: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [Image.new("RGB", (40, 30), (value, 1, 2)) for value in range(150)]
    write_parquet(tmp_path / "a.parquet", hugging_face(*images), None)
    monkeypatch.setattr(packing, "THREADS", 2)
    monkeypatch.setattr(packing, "MOST_BYTES_DECODED", budget * 3 * 40 * 30)
    append = packing._Packer._append
    held, most = 0, 0
    lock = threading.Lock()

    def count(change: int) -> None:
        nonlocal held, most
        with lock:
            held += change
            most = max(most, held)

    def decode(*given: Any) -> Any:
        count(1)
        return decode_image(*given)

    def append_and_free(packer: Any, block: Any, images: Any, *more: Any) -> None:
        append(packer, block, images, *more)
        count(-len(images))

    monkeypatch.setattr(packing, "decode_image", decode)
    monkeypatch.setattr(packing._Packer, "_append", append_and_free)
    dataset = open_source(f"parquet:{tmp_path / 'a.parquet'}", test_fraction=0.5)
    assert sorted([*dataset.train.images[:, 0, 0, 0], *dataset.test.images[:, 0, 0, 0]]) == list(range(150))
    assert 2 <= most <= bound


def test_few_bytes_are_moved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "_MOST_BYTES_MOVED", 2**17)
    images = np.arange(200, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 3, 64, 64), np.uint8)
    file = ArrayFile(tmp_path / "images.npy")
    file.append(images)
    tracemalloc.start()
    try:
        file.keep(np.arange(1, 200, 2), 2)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    file.finish()
    file.close()
    assert most <= 2**18 + 2**16  # a part, its first channels, and a little
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images[1::2, :2])


def test_parquet_directory_has_splits_by_name_and_plain_bytes(
    tmp_path: Path, open_source: Callable[..., Dataset]
) -> None:
    directory = tmp_path / "set"
    for name, first in (("train-00000-of-00002", 0), ("train-00001-of-00002", 3), ("validation-00000-of-00001", 9)):
        encoded = [encode(Image.new("L", (8, 8), first + i), "png") for i in range(3)]
        write_parquet(directory / f"{name}.parquet", encoded, [first + i for i in range(3)], image_column="img")
    with pytest.raises(ValueError, match="label 11 is out of range"):  # 12 classes for 9 images
        open_source(f"parquet:{directory}")
    for path in directory.iterdir():
        encoded = [encode(Image.new("L", (8, 8), i), "png") for i in range(3)]
        write_parquet(path, encoded, None, image_column="img")
    dataset = open_source(f"parquet:{directory}")
    assert dataset.class_names == ("all",)
    assert dataset.image_shape == (1, 8, 8)
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_parquet_rows_without_an_image_are_left_out(
    tmp_path: Path, open_source: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    images: list[Any] = hugging_face(*[Image.new("L", (8, 8), value) for value in range(8)])
    images[2] = None
    images[5] = {"bytes": None, "path": "elsewhere.png"}
    write_parquet(tmp_path / "a.parquet", images, list(range(8)))
    dataset = open_source(f"parquet:{tmp_path / 'a.parquet'}")
    assert sorted([*dataset.train.labels, *dataset.test.labels]) == [0, 1, 3, 4, 6, 7]
    for split in (dataset.train, dataset.test):
        assert split.images[:, 0, 0, 0].tolist() == split.labels.tolist()
    assert "a.parquet row 2, a.parquet row 5" in capsys.readouterr().out


def test_mnist5k_holds_out_100_images_a_class(open_source: Callable[..., Dataset]) -> None:
    dataset = open_source("mnist5k")
    assert dataset.image_shape == (1, 28, 28)
    assert np.bincount(dataset.train.labels).tolist() == [400] * 10
    assert np.bincount(dataset.test.labels).tolist() == [100] * 10
    assert len(set(dataset.test.labels[:64].tolist())) == 10
    everything = np.concatenate([dataset.train.images, dataset.test.images]).reshape(5000, -1)
    assert len(np.unique(everything, axis=0)) == 5000
    # With another digest, old runs cannot be resumed: the held-out part and the format are part of their definition.
    assert dataset.digest == "17ead6a210b7f5d296ded20496eb1b0ff2865ec3ab0a524730482adb86822e29"


def test_image_size_and_channels_apply_to_arrays_too(open_source: Callable[..., Dataset]) -> None:
    plain, coloured = open_source("mnist5k"), open_source("mnist5k", channels=3)
    assert coloured.image_shape == (3, 28, 28)
    assert (coloured.test.images == plain.test.images).all()
    small = open_source("mnist5k", image_size=14)
    assert small.image_shape == (1, 14, 14)
    halved = plain.test.images.reshape(1000, 14, 2, 14, 2).mean((2, 4))
    assert np.abs(small.test.images[:, 0] - halved).mean() < 8


def test_synthetic_images_are_a_function_of_their_position(open_source: Callable[..., Dataset]) -> None:
    few, many = open_source("synthetic", synthetic_images=100), open_source("synthetic", synthetic_images=1300)
    assert (len(few.train.labels), len(few.test.labels)) == (100, 64)
    assert (len(many.train.labels), len(many.test.labels)) == (1300, 162)
    assert np.array_equal(few.train.images, many.train.images[:100])
    assert np.array_equal(few.test.images, many.test.images[:64])
    assert not np.array_equal(few.train.images[:64], few.test.images)
    assert few.digest == "4897e3bdb2f6b06496c6b0dbf4e62fa1b5ba399ff79d7870eb70df0bc8aefb25"
    assert np.bincount(many.train.labels, minlength=10).min() > 80
    assert (many.train.images.reshape(1300, -1).max(1) > 90).all()
    assert (many.train.images == 0).mean() > 0.5
    coloured = open_source("synthetic", synthetic_images=10, channels=3, image_size=40)
    assert coloured.image_shape == (3, 40, 40)


def write_mnist(raw: Path, suffix: str = "") -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 12)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(count) % 10
        write_idx(raw / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("source", "directory"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_local_idx_files_are_read_without_torchvision(
    tmp_path: Path,
    open_source: Callable[..., Dataset],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    directory: str,
    suffix: str,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    write_mnist(tmp_path / directory / "raw", suffix)
    dataset = open_source(source)
    assert dataset.image_shape == (1, 28, 28)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (30, 12)
    assert dataset.train.images[:, 0, 0, 0].tolist() == dataset.train.labels.tolist()
    assert len(dataset.class_names) == 10


def test_packed_cifar10_needs_no_torchvision(
    tmp_path: Path, open_source: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    directory = tmp_path / "cifar-10-batches-py"
    directory.mkdir()
    sums = {}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    for number, name in enumerate(names):
        pixels = np.full((4, 3, 32, 32), number, np.uint8)
        pixels[:, 2, 31, 0] = [0, 1, 2, 9]
        content = {"label_names": ["x"] * 10} if name == "batches.meta" else {"data": pixels.reshape(4, -1)}
        (directory / name).write_bytes(pickle.dumps({**content, "labels": [0, 1, 2, 9]}))
        sums[name] = hashlib.md5((directory / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    dataset = open_source("cifar10")
    assert dataset.image_shape == (3, 32, 32)
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert dataset.test.images[:, 2, 31, 0].tolist() == dataset.test.labels.tolist() == [0, 1, 2, 9]
    assert dataset.class_names[9] == "truck"
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert open_source("cifar10").digest == dataset.digest


def test_svhn_is_read_through_torchvision_with_zero_as_label_0(
    tmp_path: Path, open_source: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import SVHN

    scipy_io = pytest.importorskip("scipy.io")
    files = {}
    for split, count in (("train", 5), ("test", 3)):
        pixels = np.zeros((32, 32, 3, count), np.uint8)
        pixels[3, 5, 1] = np.arange(count)
        path = tmp_path / f"{split}_32x32.mat"
        labels = np.array([10, 1, 9, 3, 4][:count]).reshape(-1, 1)
        scipy_io.savemat(path, {"X": pixels, "y": labels})
        files[split] = ["unused", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", files)
    dataset = open_source("svhn")
    assert dataset.train.labels.tolist() == [0, 1, 9, 3, 4]
    assert dataset.train.images[:, 1, 3, 5].tolist() == [0, 1, 2, 3, 4]
    assert dataset.test.labels.tolist() == [0, 1, 9]


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are no text are a matter of Linux")
def test_file_names_that_are_no_text_do_not_matter(
    tmp_path: Path, open_source: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "names"
    for value in range(4):
        path = save(folder, "a", Image.new("L", (8, 8), value))
        os.rename(os.fsencode(path), os.fsencode(folder) + b"/a/\xff%d.png" % value)
    (folder / "a" / os.fsdecode(b"\xfe.png")).write_text("no image")
    dataset = open_source(f"folder:{folder}", image_size=8)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 4
    assert "a/\\xfe.png" in capsys.readouterr().out


def test_a_relative_folder_is_the_same_source(
    tmp_path: Path, open_source: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    for value in range(4):
        save(folder, "a", Image.new("L", (8, 8), value))
    (folder / "a" / "bad.png").write_text("no image")
    monkeypatch.chdir(folder)
    for path in (".", "./", "../here", str(folder)):
        lines: list[str] = []
        packing = DataConfig(cache_dir=str(tmp_path / "cache"))
        open_dataset(f"folder:{path}", ".", packing, lines.append)
        assert any("unreadable image: a/bad.png" in line for line in lines)
    assert len(list((tmp_path / "cache").glob("folder-here-*"))) == 1


# A new source that needs no files has one line here.
WITHOUT_FILES = [
    "mnist5k",
    "synthetic",
]


@pytest.mark.parametrize("source", WITHOUT_FILES)
def test_a_source_packs_the_same_images_twice(source: str, tmp_path: Path) -> None:
    found = [open_dataset(source, tmp_path, DataConfig(cache_dir=str(tmp_path / name))) for name in ("one", "two")]
    assert found[0].digest == found[1].digest
    for split in (found[0].train, found[0].test):
        assert split.images.dtype == np.uint8 and split.images.ndim == 4 and len(split.images) == len(split.labels) > 0
        assert split.labels.min() >= 0 and split.labels.max() < len(found[0].class_names)
