"""Files of more than 8 bits a channel keep their values, whatever format, colour and byte order they have."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gen_dist.config import DataConfig, TrainConfig
from gen_dist.data import Dataset, open_dataset, survey_source
from gen_dist.data.decoding import decode_image
from gen_dist.data.deep_files import Keeping
from gen_dist.data.headers import read_header
from gen_dist.errors import ConfigError, DataError

GRAY = np.random.default_rng(0).integers(0, 65_536, (6, 5), np.uint16)
RGB = np.random.default_rng(1).integers(0, 65_536, (6, 5, 3), np.uint16)
RGBA = np.concatenate([RGB, np.full((6, 5, 1), 65_535, np.uint16)], axis=2)
DEEP = Keeping(deep=True)


def png(values: NDArray[np.uint16]) -> bytes:
    """A 16-bit PNG by its specification, independent of PIL: gray, RGB or RGBA."""
    height, width = values.shape[:2]
    colour = {1: 0, 3: 2, 4: 6}[values[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: NDArray[Any], order: str = "<", deflated: bool = False, orientation: int = 1) -> bytes:
    """A TIFF of one strip by its specification (TIFF 6.0), independent of PIL."""
    samples = values[0, 0].size
    data = values.astype(values.dtype.newbyteorder(">" if order == ">" else "<")).tobytes()
    data = zlib.compress(data) if deflated else data
    bits, form = 8 * values.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = [
        (256, values.shape[1]),
        (257, values.shape[0]),
        (258, [bits] * samples),
        (259, 8 if deflated else 1),
        (262, 1 if samples == 1 else 2),
        (273, 8),
        (274, orientation),
        (277, samples),
        (278, values.shape[0]),
        (279, len(data)),
        *([(338, 2)] if samples == 4 else []),
        (339, [form] * samples),
    ]
    start = 8 + len(data) + len(data) % 2
    beyond, tables = start + 2 + 12 * len(entries) + 4, b""
    directory = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        if isinstance(value, list) and len(value) > 2:
            directory += struct.pack(order + "HHII", tag, 3, len(value), beyond + len(tables))
            tables += struct.pack(f"{order}{len(value)}H", *value)
        elif isinstance(value, list):
            directory += struct.pack(order + "HHIHH", tag, 3, len(value), *value, *[0] * (2 - len(value)))
        elif tag in (273, 279):
            directory += struct.pack(order + "HHII", tag, 4, 1, value)
        else:
            directory += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return head + data + b"\0" * (len(data) % 2) + directory + struct.pack(order + "I", 0) + tables


def pgm(values: NDArray[np.uint16], maximum: int = 65_535) -> bytes:
    return b"P5 %d %d %d\n" % (*values.shape[::-1], maximum) + values.astype(">u2").tobytes()


SIGNED, FLOATS = GRAY.astype(np.int32).__sub__(32_768).astype(np.int16), (GRAY / 977 - 20).astype(np.float32)
FILES: dict[str, tuple[bytes, NDArray[Any]]] = {
    "PNG gray": (png(GRAY), GRAY),
    "PNG RGB": (png(RGB), RGB),
    "PNG RGBA": (png(RGBA), RGB),
    "PGM": (pgm(GRAY), GRAY),
    "PGM of 12 bits": (pgm(GRAY // 16, 4095), GRAY // 16),
    "PGM of 1,000 levels": (pgm(GRAY // 66, 1000), GRAY // 66),
    **{
        f"TIFF {name} {order}{' deflated' if deflated else ''}": (tiff(stored, order, deflated), values)
        for name, stored, values in (
            ("gray", GRAY, GRAY),
            ("RGB", RGB, RGB),
            ("RGBA", RGBA, RGB),
            ("int16", SIGNED, SIGNED),
            ("float32", FLOATS, FLOATS),
        )
        for order in "<>"
        for deflated in (False, True)
    },
}


def as_channels(values: NDArray[Any]) -> NDArray[Any]:
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_decoded_file_has_every_bit_of_its_values(name):
    content, values = FILES[name]
    decoded = decode_image(content, None, 1 if values.ndim == 2 else None, DEEP)
    assert decoded.pixels.dtype == values.dtype
    assert np.array_equal(decoded.pixels, as_channels(values))
    assert not decoded.losses
    header = read_header(content, DEEP)
    assert (header.dtype, header.converted if "RGBA" not in name else "") == (str(values.dtype), "")
    reduced = decode_image(content, None, None)
    assert reduced.pixels.dtype == np.uint8
    assert reduced.losses["depth"] == str(values.dtype)


def test_colours_of_16_bits_in_a_ppm_file_are_told_to_be_lost():
    content = b"P6 %d %d 65535\n" % RGB.shape[1::-1] + RGB.astype(">u2").tobytes()
    decoded, header = decode_image(content, None, None, DEEP), read_header(content, DEEP)
    assert (str(decoded.pixels.dtype), header.dtype, header.converted) == ("uint8", "uint8", "become 8-bit")
    assert decoded.losses["ppm"] == header.losses["ppm"] == "0..65535"
    assert np.abs(decoded.pixels - as_channels(RGB / 257)).max() <= 1


def test_half_transparent_16_bit_images_lie_on_white():
    half = RGBA.copy()
    half[..., 3] = 32_768
    decoded = decode_image(png(half), None, None, DEEP).pixels
    expected = (RGB.astype(float) * 32_768 + 65_535.0 * 32_767) / 65_535
    assert np.abs(decoded - as_channels(expected)).max() <= 0.5


def test_deep_images_are_turned_upright():
    for values in (GRAY, RGB):
        decoded = decode_image(tiff(values, orientation=6), None, None if values.ndim == 3 else 1, DEEP).pixels
        assert np.array_equal(decoded, as_channels(np.rot90(values, -1)))


def test_16_bits_become_8_bits_as_they_did():
    """A run that began with 8-bit images goes on with their bits."""
    decoded = decode_image(png(GRAY), None, 1)
    assert np.array_equal(decoded.pixels[0], (GRAY.astype(int) * 255 + 32_767) // 65_535)


def folder(path: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def opened(path: Path, lines: list[str] | None = None, **options: Any) -> Dataset:
    packing = DataConfig(cache_dir=str(path.parent / "cache"), **options)
    return open_dataset(f"folder:{path}", "", packing, (lambda _line: None) if lines is None else lines.append)


def narrow(count: int = 12) -> dict[str, bytes]:
    """Images with 12 of 16 bits, which 8 bits would spoil."""
    draws = np.random.default_rng(0).integers(150, 2600, (count, 24, 20), np.uint16)
    return {f"{place:02}.png": png(values) for place, values in enumerate(draws)}


def test_a_folder_of_16_bit_images_keeps_its_levels(tmp_path):
    lines: list[str] = []
    dataset = opened(folder(tmp_path / "set", narrow()), lines)
    assert dataset.train.images.dtype == np.uint16
    assert dataset.image_shape == (1, 24, 20)
    assert dataset.train.images.min() >= 150 and dataset.train.images.max() < 2600
    assert not any("lose" in line or "reduced" in line for line in lines)
    assert opened(tmp_path / "set").digest == dataset.digest


def test_a_folder_reduced_to_8_bits_says_so(tmp_path):
    lines: list[str] = []
    dataset = opened(folder(tmp_path / "set", narrow()), lines, dtype="uint8")
    assert dataset.train.images.dtype == np.uint8
    assert any("are reduced to 8" in line for line in lines)
    assert any("lose most of their grey levels" in line for line in lines)
    assert opened(tmp_path / "set").train.images.dtype == np.uint16


def test_images_of_several_types_become_8_bit_with_a_line(tmp_path):
    eight = io.BytesIO()
    Image.fromarray(np.zeros((24, 20), np.uint8)).save(eight, "PNG")
    lines: list[str] = []
    dataset = opened(folder(tmp_path / "set", {**narrow(), "99.png": eight.getvalue()}), lines)
    assert dataset.train.images.dtype == np.uint8
    assert any(line.split(": ", 1)[1].startswith("12 images have more than 8 bits and are reduced") for line in lines)


def test_gray_and_coloured_16_bit_images_become_RGB(tmp_path):
    dataset = opened(folder(tmp_path / "set", {"a.png": png(GRAY), "b.png": png(RGB), "c.png": png(RGB)}))
    assert dataset.image_shape == (3, 6, 5)
    both = np.concatenate([dataset.train.images, dataset.test.images])
    assert any(np.array_equal(image, np.repeat(GRAY[None], 3, axis=0)) for image in both)


def pages(count: int = 3) -> bytes:
    """A TIFF of several 16-bit pages."""
    images = [Image.fromarray(GRAY + np.uint16(place)) for place in range(count)]
    file = io.BytesIO()
    images[0].save(file, "TIFF", save_all=True, append_images=images[1:])
    return file.getvalue()


def test_pages_are_channels_or_images_as_the_config_says(tmp_path):
    path = folder(tmp_path / "set", {f"{place}.tif": pages() for place in range(4)})
    with pytest.raises(DataError, match=r"0.tif has 3 pages of uint16: say --pages images .* --pages first"):
        opened(path)
    of_channels = opened(path, pages="channels")
    assert of_channels.image_shape == (3, 6, 5)
    assert len(of_channels.train.images) + len(of_channels.test.images) == 4
    assert np.array_equal(of_channels.train.images[0], np.stack([GRAY, GRAY + 1, GRAY + 2]))
    of_images = opened(path, pages="images")
    assert of_images.image_shape == (1, 6, 5)
    assert len(of_images.train.images) + len(of_images.test.images) == 12
    assert of_images.train.names is not None
    names = [*of_images.train.names, *(of_images.test.names or ())]
    assert {"0.tif page 1", "3.tif page 3"} < set(names)
    for split in (of_images.train, of_images.test):
        for name, image in zip(split.names or (), split.images, strict=True):
            assert np.array_equal(image[0], GRAY + np.uint16(int(name[-1]) - 1))
    lines: list[str] = []
    assert len(opened(path, lines, pages="first").train.images) == 3
    assert any("several pages" in line for line in lines)


def test_pages_that_differ_are_no_channels(tmp_path):
    first, other = Image.fromarray(GRAY), Image.fromarray(GRAY[:4])
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=[other])
    path = folder(tmp_path / "set", {f"{place}.tif": file.getvalue() for place in range(3)})
    with pytest.raises(DataError, match="pages that are no channels of one image"):
        opened(path, pages="channels")


def test_pages_behind_damage_are_not_missed_in_silence(tmp_path):
    path = folder(tmp_path / "set", {**{f"{place}.tif": pages() for place in range(4)}, "9.tif": pages(5)[:600]})
    for what in ("images", "channels"):
        lines: list[str] = []
        dataset = opened(path, lines, pages=what)
        assert any("left out 1 unreadable image: 9.tif" in line for line in lines)
        assert len(dataset.train.images) + len(dataset.test.images) == (12 if what == "images" else 4)


def test_pages_reduced_to_8_bits_say_so(tmp_path):
    path = folder(tmp_path / "set", {f"{place}.tif": pages() for place in range(4)})
    lines: list[str] = []
    dataset = opened(path, lines, pages="channels", dtype="uint8")
    assert dataset.train.images.dtype == np.uint8 and dataset.image_shape == (3, 6, 5)
    assert any("4 images have more than 8 bits and are reduced" in line for line in lines)
    with pytest.raises(ConfigError, match="channels 1 with pages channels"):
        opened(path, pages="channels", channels=1)


def test_a_survey_says_that_nothing_is_lost(tmp_path):
    found = survey_source(f"folder:{folder(tmp_path / 'set', narrow())}", "", DataConfig(cache_dir=str(tmp_path)))
    text = "\n".join(found.lines()).replace(str(tmp_path), "")
    assert "12 PNG 16-bit gray" in text
    assert "uint16 [1, 24, 20] each" in text
    assert "losses" not in text and "8-bit" not in text
    of_8_bits = survey_source(f"folder:{tmp_path / 'set'}", "", DataConfig(cache_dir=str(tmp_path), dtype="uint8"))
    assert "lose most of their grey levels" in "\n".join(of_8_bits.lines())


def test_configs_without_dtype_are_of_8_bit_files():
    for source, dtype in (("folder:a", "uint8"), ("parquet:a", "uint8"), ("mnist5k", "source")):
        values = json.loads(TrainConfig(data=source).to_json())
        assert TrainConfig.from_json(json.dumps(values), "").packing.dtype == "source"
        del values["packing"]["dtype"]
        assert TrainConfig.from_json(json.dumps(values), "").packing.dtype == dtype
