"""Readers of damaged files: no traceback but our errors, no endless wait, and nothing silently different.

Files of every format are changed at random: bytes flipped, cut, doubled, exchanged between files. `make test` tries
some hundred, the slow tests as many as fit into their minutes (GEN_DIST_FUZZ_MINUTES). A failure names its seed.
"""

from __future__ import annotations

import gzip
import io
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.decoding import decode_image
from gen_dist.data.fitting import Fitting
from gen_dist.data.image_files import image_warnings_as_intended
from gen_dist.errors import ConfigError, DataError
from tests.support.digits import write_idx
from tests.support.fuzzing import MINUTES, for_minutes, tried

# Images


def images() -> dict[str, bytes]:
    """Small images of all formats and of the modes that take other ways through PIL."""
    random_numbers = np.random.default_rng(0)
    colour = Image.fromarray(random_numbers.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    alpha = Image.fromarray(random_numbers.integers(0, 256, (24, 20, 4), dtype=np.uint8))
    deep = Image.fromarray(random_numbers.integers(0, 65536, (24, 20), dtype=np.uint16))
    floats = Image.fromarray(random_numbers.random((24, 20), dtype=np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpg": (colour, "JPEG", {"exif": exif}),
        "progressive.jpg": (colour, "JPEG", {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), "JPEG", {}),
        "png": (alpha, "PNG", {"exif": exif}),
        "16.png": (deep, "PNG", {}),
        "palette.png": (colour.quantize(7), "PNG", {"transparency": 3}),
        "apng": (colour, "PNG", {"save_all": True, "append_images": [colour.rotate(90)]}),
        "gif": (colour, "GIF", {"save_all": True, "append_images": [colour.rotate(180)]}),
        "tif": (colour, "TIFF", {"exif": exif}),
        "lzw.tif": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "jpeg.tif": (colour, "TIFF", {"compression": "jpeg"}),
        "pages.tif": (deep, "TIFF", {"save_all": True, "append_images": [deep]}),
        "float.tif": (floats, "TIFF", {"compression": "tiff_deflate"}),
        "bmp": (colour, "BMP", {}),
        "dds": (alpha, "DDS", {}),
        "ico": (alpha, "ICO", {}),
        "pcx": (colour, "PCX", {}),
        "ppm": (colour, "PPM", {}),
        "16.pgm": (deep, "PPM", {}),
        "tga": (alpha, "TGA", {"compression": "tga_rle"}),
        "webp": (alpha, "WEBP", {}),
        "jp2": (colour, "JPEG2000", {}),
        "avif": (colour, "AVIF", {}),
        "qoi": (colour, "QOI", {}),
    }
    Image.init()
    files = {}
    for name, (image, form, options) in made.items():
        if form in Image.SAVE:
            stream = io.BytesIO()
            image.save(stream, form, **options)
            files[name] = stream.getvalue()
    for name, array in {"npy": np.asarray(colour).transpose(2, 0, 1), "16.npy": np.asarray(deep)}.items():
        stream = io.BytesIO()
        np.save(stream, array)
        files[name] = stream.getvalue()
    return files


def read_image(_name: str, content: bytes) -> None:
    try:
        decoded = decode_image(content, Fitting(16, 16), None)
    except (UnreadableImage, MemoryError):  # packing stops at a lack of memory, and says so
        return
    assert decoded.pixels.shape == (3, 16, 16) and decoded.pixels.dtype == np.uint8


def test_damaged_images_are_unreadable_or_pixels() -> None:
    with image_warnings_as_intended():
        assert tried(images(), read_image, iter(range(300))) == 300


# Sizes


def test_any_text_of_a_size_is_a_size_or_one_line() -> None:
    random_numbers, sizes = random.Random(0), 0
    for _ in range(3000):
        text = "".join(random_numbers.choices("0123456789xX* -+.e_\n\u0663\u00d7", k=random_numbers.randrange(9)))
        try:
            found = DataConfig(image_size=text).size
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 300, error
        else:
            assert found is not None and min(found) > 0, text
            sizes += 1
    assert sizes > 10


# Parquet


def parquet_files(path: Path) -> dict[str, bytes]:
    """Files of several codecs, layouts and encodings."""
    import pyarrow
    import pyarrow.parquet

    small = images()
    rows = [small[name] for name in ("png", "jpg", "bmp", "gif")] * 5
    plain = pyarrow.table({"image": rows, "label": [number % 3 for number in range(len(rows))]})
    nested = pyarrow.table(
        {"image": [{"bytes": row, "path": "x"} for row in rows], "label": pyarrow.array([1] * len(rows))}
    )
    metadata = '{"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}'
    nested = nested.replace_schema_metadata({"huggingface": metadata})
    files = {}
    for name, table, options in (
        ("plain", plain, {"compression": "none", "use_dictionary": False}),
        ("snappy", plain, {"compression": "snappy", "row_group_size": 7}),
        ("zstd", nested, {"compression": "zstd"}),
        ("gzip", nested, {"compression": "gzip", "data_page_version": "2.0"}),
    ):
        pyarrow.parquet.write_table(table, path / "made.parquet", **options)
        files[name] = (path / "made.parquet").read_bytes()
    return files


def opened(source: str, path: Path, lines: list[str] | None = None) -> Dataset | None:
    """The data, or None for an error of one line."""
    packing = DataConfig(cache_dir=str(path / "cache"), image_size=16)
    try:
        return open_dataset(source, path, packing, (lines if lines is not None else []).append)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 700, error
        return None


def read_parquet_in(path: Path) -> Callable[[str, bytes], None]:
    def read(_name: str, content: bytes) -> None:
        (path / "set.parquet").write_bytes(content)
        opened(f"parquet:{path / 'set.parquet'}", path)
        shutil.rmtree(path / "cache", ignore_errors=True)

    return read


def test_damaged_parquet_is_packed_or_one_line(tmp_path: Path) -> None:
    assert tried(parquet_files(tmp_path), read_parquet_in(tmp_path), iter(range(40))) == 40


# Files of torchvision's sets


def idx_files(path: Path) -> dict[str, bytes]:
    """The four files of MNIST, plain and compressed."""
    files = {}
    for part, count in (("train", 12), ("t10k", 6)):
        arrays = {"images-idx3": np.ones((count, 8, 8), np.uint8), "labels-idx1": np.arange(count, dtype=np.uint8) % 10}
        for kind, array in arrays.items():
            write_idx(path / "made", array)
            files[f"{part}-{kind}-ubyte"] = (path / "made").read_bytes()
    return files | {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


def read_idx_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    raw, whole = path / "MNIST/raw", idx_files(path)

    def read(name: str, content: bytes) -> None:
        shutil.rmtree(raw, ignore_errors=True)
        raw.mkdir(parents=True)
        for other, kept in whole.items():
            if other.endswith(".gz") == name.endswith(".gz"):
                (raw / other).write_bytes(content if other == name else kept)
        opened("mnist", path)
        shutil.rmtree(path / "cache", ignore_errors=True)

    monkeypatch.setitem(sys.modules, "torchvision", None)  # nothing is downloaded
    return read


def test_damaged_idx_files_are_packed_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = idx_files(tmp_path)
    assert tried(files, read_idx_in(tmp_path, monkeypatch), iter(range(30))) == 30


# The packed cache


def read_cache_in(path: Path) -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Files of a packed cache, and a reader that checks that the data are the same whatever is damaged."""
    (path / "images/a").mkdir(parents=True)
    for number in range(6):
        Image.effect_noise((16, 16), 90).save(path / f"images/a/{number}.png")
    source = f"folder:{path / 'images'}"
    whole = opened(source, path)
    assert whole is not None
    (directory,) = [entry for entry in (path / "cache").iterdir() if entry.is_dir()]
    files = {entry.name: entry.read_bytes() for entry in directory.iterdir()}

    def read(name: str, content: bytes) -> None:
        (directory / name).unlink()  # maps of the whole file stay valid
        (directory / name).write_bytes(content)
        lines: list[str] = []
        dataset = opened(source, path, lines)
        assert dataset is not None and dataset.digest == whole.digest and dataset.class_names == ("a",)
        assert np.array_equal(dataset.train.images, whole.train.images)
        assert np.array_equal(dataset.test.images, whole.test.images)
        assert not lines or "are damaged" in lines[0]

    return files, read


def test_a_damaged_cache_changes_no_data(tmp_path: Path) -> None:
    files, read = read_cache_in(tmp_path)
    assert tried(files, read, iter(range(40))) == 40


def test_every_flipped_bit_of_a_description_is_found(tmp_path: Path) -> None:
    files, read = read_cache_in(tmp_path)
    content = files["meta.json"]
    for place in range(0, len(content), 47):
        bit = 1 << place % 8
        read("meta.json", content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])


# For minutes


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
@pytest.mark.parametrize("reader", ["images", "parquet", "idx", "cache"])
def test_a_reader_is_fuzzed_for_minutes(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, read = {
        "images": lambda: (images(), read_image),
        "parquet": lambda: (parquet_files(tmp_path), read_parquet_in(tmp_path)),
        "idx": lambda: (idx_files(tmp_path), read_idx_in(tmp_path, monkeypatch)),
        "cache": lambda: read_cache_in(tmp_path),
    }[reader]()
    with image_warnings_as_intended():
        for_minutes(reader, files, read)
