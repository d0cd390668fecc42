"""Images of any size and proportions are brought to one, as configured and with a line that says so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from gen_dist.config import DataConfig, Fit, TrainConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.decoding import decode_image
from gen_dist.data.fitting import Fitting
from gen_dist.errors import ConfigError, DataError
from gen_dist.presets import get_preset
from tests.data.test_sources import encode, save

BICUBIC = Image.Resampling.BICUBIC


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise without fine grain, so that an error of a pixel's place shows and one of rounding does not."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), BICUBIC)


def packed(source: str, tmp_path: Path, **options: Any) -> tuple[Dataset, list[str]]:
    """The data and the lines at a second opening."""
    lines: list[str] = []
    for _ in range(2):
        lines.clear()
        dataset = open_dataset(source, ".", DataConfig(cache_dir=str(tmp_path / "cache"), **options), lines.append)
    return dataset, lines


def folder_of(tmp_path: Path, *sizes: tuple[int, int]) -> str:
    for place, size in enumerate(sizes):
        save(tmp_path / "images", ".", photo(*size, seed=place))
    return f"folder:{tmp_path / 'images'}"


@pytest.mark.parametrize("size", [(120, 40), (40, 120), (50, 50), (61, 37), (20, 9)], ids=str)
@pytest.mark.parametrize("target", [(32, 32), (48, 20), (20, 48)], ids=str)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fits_equal_those_of_pillow(size: tuple[int, int], target: tuple[int, int], fit: Fit) -> None:
    image = photo(*size)
    expected = {
        "crop": lambda: ImageOps.fit(image, target, BICUBIC),
        "pad": lambda: ImageOps.pad(image, target, BICUBIC, color="white"),
        "stretch": lambda: image.resize(target, BICUBIC),
    }[fit]()
    decoded = decode_image(encode(image, "png"), Fitting(*target, fit), None)
    assert decoded.size == size
    difference = np.abs(decoded.pixels.transpose(1, 2, 0).astype(int) - np.asarray(expected).astype(int))
    # A large image is first reduced by a whole factor, which changes its finest grain.
    assert np.quantile(difference, 0.95) <= (12 if max(size) > 3 * min(target) else 1)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_large_jpegs_are_reduced_along_their_own_axes(orientation: int, fit: Fit) -> None:
    image, exif = photo(960, 320), Image.Exif()
    exif[0x0112] = orientation
    upright = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_270)
    target = (72, 24) if orientation == 1 else (24, 72)
    decoded = decode_image(encode(image, "jpg", quality=95, exif=exif), Fitting(*target, fit), None)
    assert decoded.size == upright.size
    difference = decoded.pixels.transpose(1, 2, 0).astype(int) - np.asarray(upright.resize(target, BICUBIC)).astype(int)
    assert np.abs(difference).mean() < 4


def test_alike_images_of_a_folder_keep_their_size(tmp_path: Path) -> None:
    source = folder_of(tmp_path, *[(30, 18)] * 4)
    (tmp_path / "images" / "damaged.png").write_bytes(b"no image")
    dataset, lines = packed(source, tmp_path)
    assert dataset.image_shape == (3, 18, 30)
    assert len(lines) == 1  # about the damaged one
    first = next(iter(sorted((tmp_path / "images").iterdir())))
    images = np.concatenate([dataset.train.images, dataset.test.images])
    assert any((image == np.asarray(Image.open(first)).transpose(2, 0, 1)).all() for image in images)


def test_a_line_says_that_images_are_resized(tmp_path: Path) -> None:
    source = folder_of(tmp_path, (64, 64), (128, 64), (30, 30), (30, 64))
    dataset, lines = packed(source, tmp_path)
    assert dataset.image_shape == (3, 64, 64)
    assert lines == [
        f"{source}: 3 are resized to 64x64; 2 are cropped at their centre to its proportions; 2 are smaller than that "
        "and are enlarged"
    ]
    again, _ = packed(source, tmp_path, image_size=64)
    assert again.digest == dataset.digest
    wide, lines = packed(source, tmp_path, image_size="128x64", fit="pad")
    assert wide.image_shape == (3, 64, 128)
    assert lines == [
        f"{source}: 3 are resized to 128x64; 3 are padded with white to its proportions; 1 is smaller than that and "
        "is enlarged"
    ]


def test_sizes_of_one_square_are_one(tmp_path: Path) -> None:
    assert DataConfig(image_size="64x64") == DataConfig(image_size="64") == DataConfig(image_size=64)
    assert DataConfig(image_size="64X32").size == (64, 32)
    assert DataConfig(image_size=64).size == (64, 64)
    assert DataConfig().size is None
    config = get_preset("vae-mnist").with_options(image_size="24x16", fit="stretch")
    assert TrainConfig.from_json(config.to_json(), "a test") == config


def test_caches_of_squares_keep_their_keys(tmp_path: Path) -> None:
    packed("synthetic", tmp_path, synthetic_images=70, image_size=16)
    decisive = json.dumps([2, {"image_size": 16, "channels": None}, [1, 70, 16, 1]], sort_keys=True)
    assert (tmp_path / "cache" / f"synthetic-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}").is_dir()


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("64x", "image_size '64x' is no side such as 64, or width x height as 480x270"),
        ("x", "image_size 'x' is no side"),
        ("64x3", "image_size 3 is less than 4"),
        ("0x64", "image_size 0 is less than 4"),
        (3, "image_size 3 is less than 4"),
    ],
)
def test_a_size_that_is_none_is_refused(size: int | str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataConfig(image_size=size)


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        (
            [(30, 18)] * 3,
            {"image_size": 64},
            "0.png is 30x18, not 64, and --fit none refuses that; give --image-size 30x18",
        ),
        ([(64, 64), (64, 32)], {"image_size": 64}, "images differ in size"),
        ([(64, 64), (64, 32)], {}, "give --fit crop, pad or stretch with --image-size to bring them to one"),
    ],
)
def test_fit_none_refuses_other_sizes(
    sizes: list[tuple[int, int]], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = folder_of(tmp_path, *sizes)
    with pytest.raises(DataError) as refused:
        packed(source, tmp_path, fit="none", **options)
    assert words in str(refused.value)
    kept, lines = packed(folder_of(tmp_path / "alike", *[(30, 18)] * 3), tmp_path, fit="none", image_size="30x18")
    assert kept.image_shape == (3, 18, 30)
    assert not lines


def test_arrays_of_another_size_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is 28x28 gray, not 32, and --fit none refuses that"):
        packed("mnist5k", tmp_path, fit="none", image_size=32)
    wide, lines = packed("mnist5k", tmp_path, fit="stretch", image_size="40x20")
    assert wide.image_shape == (1, 20, 40)
    assert lines[0].startswith("mnist5k: 5,000 are resized to 40x20; 5,000 are stretched to its proportions")


def test_a_run_of_an_older_version_keeps_its_64_pixels(tmp_path: Path) -> None:
    def read(data: str, **packing: Any) -> DataConfig:
        values = json.loads(get_preset("vae-mnist").to_json()) | {"data": data}
        old = {name: value for name, value in values["packing"].items() if name != "fit"} | packing
        return TrainConfig.from_json(json.dumps(values | {"packing": old}), "config.json").packing

    assert read("folder:x").image_size == 64
    assert read("folder:x", image_size=32).image_size == 32
    assert read("folder:x", fit="crop").image_size is None
    assert read("parquet:x").image_size is None
