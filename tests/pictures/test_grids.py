"""Pictures are whole PNG files of a readable size, with the images in their places."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gen_dist.errors import ConfigError
from gen_dist.pictures import grids
from gen_dist.pictures.figures import figure_of, save_figure
from tests.support.digits import digits as read_digits
from tests.support.digits import read_png


@pytest.fixture
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return read_digits()


def test_a_grid_shows_every_image_enlarged_in_order(tmp_path, digits):
    images = digits[0][:20]
    grids.save_grid(tmp_path / "grid.png", images)
    shown = read_png(tmp_path / "grid.png")
    margin, gap, scale = grids.MARGIN, 2, 3
    assert shown.shape == (2 * margin + 3 * 84 + 2 * gap, 2 * margin + 8 * 84 + 7 * gap)
    assert 500 <= shown.shape[1] <= 1000
    for index, image in enumerate(images[:, 0]):
        top, left = margin + index // 8 * (84 + gap), margin + index % 8 * (84 + gap)
        np.testing.assert_array_equal(shown[top : top + 84 : scale, left : left + 84 : scale], image)
    assert (shown[:, margin + 84 : margin + 84 + gap] == grids.PAPER).all()
    assert (shown[margin + 2 * (84 + gap) :, margin + 4 * (84 + gap) :] == grids.PAPER).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 32, 64, 96])
def test_a_row_of_images_comes_near_a_pleasant_width(tmp_path, side, channels):
    images = np.random.default_rng(0).integers(0, 256, (9, channels, side, side), dtype=np.uint8)
    grids.save_grid(tmp_path / "grid.png", images)
    shown = read_png(tmp_path / "grid.png")
    assert 480 <= shown.shape[1] <= 1000
    assert shown.ndim == (2 if channels == 1 else 3)


def test_colours_keep_their_channels(tmp_path):
    images = np.zeros((1, 3, 4, 4), np.uint8)
    images[0, 0], images[0, 1], images[0, 2] = 10, 20, 30
    grids.save_grid(tmp_path / "grid.png", images)
    assert read_png(tmp_path / "grid.png")[100, 100].tolist() == [10, 20, 30]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 24), (3, 96, 96), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("count", [3, 16])
def test_pairs_are_cut_out_of_their_picture_again(tmp_path, shape, count):
    both = np.random.default_rng(0).integers(0, 256, (2, count, *shape), dtype=np.uint8)
    grids.save_reconstructions(tmp_path / "pairs.png", *both)
    shown = read_png(tmp_path / "pairs.png").reshape((*read_png(tmp_path / "pairs.png").shape[:2], -1))
    found = grids.split_pairs(shown, shape)
    assert found is not None
    np.testing.assert_array_equal(np.stack(found), both)
    assert grids.split_pairs(shown[1:], shape) is None
    assert grids.split_pairs(shown, (4 - shape[0], *shape[1:])) is None


def test_originals_are_left_of_their_reconstructions(tmp_path, digits):
    originals = digits[0][:11]
    reconstructions = 255 - originals
    grids.save_reconstructions(tmp_path / "pairs.png", originals, reconstructions, pairs_per_row=4)
    shown = read_png(tmp_path / "pairs.png")
    scale = 3
    side = 28 * scale
    width = 8 * side + 4 * 1 + 3 * 12
    assert shown.shape[1] == width + 2 * grids.MARGIN
    left = grids.MARGIN + 2 * (2 * side + 1 + 12)
    top = shown.shape[0] - grids.MARGIN - side  # the last row's third pair
    np.testing.assert_array_equal(shown[top : top + side : scale, left : left + side : scale], originals[10, 0])
    beside = left + side + 1
    np.testing.assert_array_equal(
        shown[top : top + side : scale, beside : beside + side : scale], reconstructions[10, 0]
    )


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 28, 28), np.uint8),
        np.zeros((4, 1, 28, 28), np.float32),
        np.zeros((4, 2, 28, 28), np.uint8),
        np.zeros((0, 1, 28, 28), np.uint8),
    ],
)
def test_arrays_of_no_image_batch_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="expected uint8"):
        grids.save_grid(tmp_path / "grid.png", images)
    assert not list(tmp_path.iterdir())


def test_pairs_of_different_shapes_are_refused(tmp_path, digits):
    with pytest.raises(ValueError, match="differ in shape"):
        grids.save_reconstructions(tmp_path / "pairs.png", digits[0][:4], digits[0][:3])


def test_a_failed_write_leaves_the_picture_before_and_no_rest(tmp_path, digits, monkeypatch):
    path = tmp_path / "grid.png"
    grids.save_grid(path, digits[0][:4])
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        grids.save_grid(path, digits[0][4:8])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_captions_stand_beside_the_rows_of_a_grid(tmp_path, digits):
    grids.save_grid(tmp_path / "grid.png", digits[0][:30], captions=["zero", "one", "two", "three"])
    shown = read_png(tmp_path / "grid.png")
    side = 3 * 28
    grid = shown[:, -grids.MARGIN - (8 * side + 7 * 2) : -grids.MARGIN]
    np.testing.assert_array_equal(grid[grids.MARGIN : grids.MARGIN + side : 3, : 28 * 3 : 3], digits[0][0, 0])
    for row in range(4):
        top = grids.MARGIN + row * (side + 2)
        assert (shown[top : top + side, : -grid.shape[1] - grids.MARGIN] < 128).sum() > 20, f"row {row}"
    with pytest.raises(ValueError, match="3 captions for 4 rows"):
        grids.save_grid(tmp_path / "grid.png", digits[0][:30], captions=["zero", "one", "two"])


def test_a_manifold_is_one_surface(tmp_path, digits):
    images = np.concatenate([digits[0][:100]] * 4)
    grids.save_manifold(tmp_path / "plain.png", images, 20)
    plain = read_png(tmp_path / "plain.png")
    assert plain.shape == (20 * 28 + 2 * grids.MARGIN,) * 2
    surface = images[:, 0].reshape(20, 20, 28, 28).transpose(0, 2, 1, 3).reshape(560, 560)
    np.testing.assert_array_equal(plain[12:-12, 12:-12], surface)


def test_strips_stand_apart_and_captions_beside_them(tmp_path, digits):
    captions = [f"direction {row + 1}, 12% of variance" for row in range(10)]
    grids.save_strips(tmp_path / "rows.png", digits[0][:110], 11, captions, "a title")
    shown = read_png(tmp_path / "rows.png")
    assert 700 <= shown.shape[1] <= 1000
    row_height = 2 * 28 + 4
    first_row = shown.shape[0] - grids.MARGIN - 10 * row_height + 4
    for row in range(10):
        top = first_row + row * row_height
        assert (shown[top : top + 56, : shown.shape[1] - 11 * 56 - 24] < 128).sum() > 50, f"row {row} has no caption"
    with pytest.raises(ValueError, match="9 captions for 10 rows"):
        grids.save_strips(tmp_path / "rows.png", digits[0][:110], 11, captions[:9])


@pytest.mark.parametrize(
    ("name", "format"), [("a.jpg", "JPEG"), ("b.JPEG", "JPEG"), ("c.png", "PNG"), ("d.webp", "WEBP")]
)
def test_a_picture_is_of_the_format_that_its_name_says(tmp_path, digits, name, format):
    grids.save_grid(tmp_path / name, digits[0][:8])
    with Image.open(tmp_path / name) as picture:
        assert picture.format == format
        size = picture.size
    grids.save_grid(tmp_path / "same.png", digits[0][:8])
    assert read_png(tmp_path / "same.png").shape[1::-1] == size


@pytest.mark.parametrize("name", ["a.gif", "b.pdf", "c", "d.jpg.txt", ".png"])
def test_a_name_of_another_format_is_refused_in_one_line(tmp_path, digits, name):
    with pytest.raises(ConfigError, match=r"name a file of \.png, \.jpg"):
        grids.save_grid(tmp_path / name, digits[0][:8])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "most"), [("a.jpg", 65_500), ("a.webp", 16_383)])
def test_a_picture_too_large_for_its_format_is_refused(tmp_path, name, most):
    canvas = np.full((most - 2 * grids.MARGIN, 8, 1), grids.PAPER, np.uint8)
    grids._save_canvas(tmp_path / name, canvas)
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (32, most)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=f"would be 32 x {most + 1} pixels, and .* at most {most}; name a .png"):
        grids._save_canvas(tmp_path / name, np.concatenate([canvas, canvas[:1]]))
    assert not list(tmp_path.iterdir())


def test_a_chart_of_another_format_is_refused(tmp_path):
    for name in ("a.jpg", "b.svg", "c"):
        with figure_of(1, 1) as figure, pytest.raises(ConfigError, match="charts are PNG files; name it"):
            save_figure(tmp_path / name, figure)


def test_captions_of_any_letters_stand_beside_the_rows(tmp_path, digits):
    grids.save_grid(tmp_path / "grid.png", digits[0][:16], captions=["é" * 3, "Ж猫"])
    grids.save_grid(tmp_path / "plain.png", digits[0][:16], captions=["e" * 3, "ab"])
    assert read_png(tmp_path / "grid.png").shape[0] == read_png(tmp_path / "plain.png").shape[0]
