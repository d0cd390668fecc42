"""Charts show every class in a colour of its own, and the records of samples."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from gen_dist.pictures import charts
from gen_dist.pictures.figures import CLASS_COLOURS
from tests.conftest import REPOSITORY
from tests.support.digits import codes, digits, read_png
from tests.support.warm_python import warm_python

NAMES = [str(digit) for digit in range(10)]


@pytest.mark.parametrize("latents", [1, 2, 20])
@pytest.mark.parametrize("classes", [1, 10, 30])
def test_a_scatter_shows_every_class_in_its_colour(tmp_path, latents, classes):
    images, labels = digits()
    labels = labels * (classes // 10) if classes > 1 else np.zeros_like(labels)
    names = [f"class {i}" for i in range(classes)] if classes != 10 else NAMES
    charts.save_scatter(tmp_path / "scatter.png", codes(images, latents), labels, names)
    shown = read_png(tmp_path / "scatter.png")
    assert shown.shape[0] == 726 and shown.shape[1] == (924 if classes == 10 else 770)
    colourful = np.ptp(shown[:, :750, :3].astype(int), axis=2) > 40
    assert colourful.sum() > 5 * len(images)
    if classes == 10:
        colours = {tuple(pixel) for pixel in shown[:, :, :3].reshape(-1, 3).tolist()}
        for colour in CLASS_COLOURS:
            assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours


def test_labels_that_do_not_go_with_the_points_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not go together"):
        charts.save_scatter(tmp_path / "scatter.png", np.zeros((5, 2)), np.zeros(4, np.int64), NAMES)


def test_class_colours_stay_apart_for_colour_blind_eyes():
    # Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as seen without L, M or S cones.
    seen_by: dict[str, Any] = {
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    srgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in CLASS_COLOURS])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for eyes, matrix in seen_by.items():
        xyz = np.clip(linear @ np.transpose(matrix), 0, 1) @ to_xyz.T / [0.9505, 1.0, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
        assert min(np.linalg.norm(a - b) for a, b in combinations(lab, 2)) > 24, eyes


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def share_records(classes: int, steps: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    checked = [
        {"step": 100 * (i + 1), "samples/class_shares": rng.dirichlet(np.full(classes, 5.0)).tolist()}
        for i in range(steps)
    ]
    return [{"step": 1, "train/loss": 1.0}, *checked]


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_class_shares_fill_the_chart_in_class_colours(tmp_path, classes, steps, recwarn):
    names = [f"class {label}" for label in range(classes)]
    charts.save_class_shares(tmp_path / "shares.png", share_records(classes, steps), names)
    shown = read_png(tmp_path / "shares.png")[:, :, :3]
    assert not recwarn.list
    column = shown[:, int((0.85 + 3.1) * 110)]  # the middle of the axes
    coloured = np.ptp(column.astype(int), axis=1) > 20
    assert coloured.sum() > 0.8 * 3.55 * 110
    if classes == 10:
        present = {tuple(pixel) for pixel in shown.reshape(-1, 3).tolist()}
        assert all(rgb(colour) in present for colour in CLASS_COLOURS)


def test_a_class_takes_the_part_of_the_height_that_is_its_share(tmp_path):
    records = [{"step": step, "samples/class_shares": [0.25, 0.75]} for step in (1, 2)]
    charts.save_class_shares(tmp_path / "shares.png", records, ["zero", "one"])
    column = read_png(tmp_path / "shares.png")[:, int((0.85 + 3.1) * 110), :3]
    first, second = ((column == rgb(colour)).all(axis=1).sum() for colour in CLASS_COLOURS[:2])
    assert first / (first + second) == pytest.approx(0.25, abs=0.01)


def test_long_class_names_stay_on_the_page(tmp_path):
    names = [f"a class with quite a long name {label}" for label in range(10)]
    charts.save_class_shares(tmp_path / "shares.png", share_records(10, 5), names)
    assert (read_png(tmp_path / "shares.png")[:, -10:, :3] == 255).all()


def test_infinite_shares_and_those_of_other_classes_are_ignored(tmp_path):
    broken = [{"step": 5, "samples/class_shares": [None, 1.0]}, {"step": 6, "samples/class_shares": [1.0]}]
    with pytest.raises(ValueError, match="no record has the shares of 2 classes"):
        charts.save_class_shares(tmp_path / "shares.png", broken, ["zero", "one"])
    assert not any(charts.has_class_shares(record, ["zero", "one"]) for record in broken)
    good = {"step": 7, "samples/class_shares": [0.5, 0.5]}
    charts.save_class_shares(tmp_path / "shares.png", [*broken, good], ["zero", "one"])
    charts.save_class_shares(tmp_path / "good.png", [good], ["zero", "one"])
    assert (tmp_path / "shares.png").read_bytes() == (tmp_path / "good.png").read_bytes()


def test_scores_show_the_last_check_of_both_kinds_of_image(tmp_path):
    def shares(place: int) -> list[float]:
        return [1.0 if bin == place else 0.0 for bin in range(20)]

    records: list[dict[str, Any]] = [
        {"step": 10, "scores/real": shares(15), "scores/fake": shares(2)},
        {"step": 20, "scores/real": shares(12), "scores/fake": shares(6)},
        {"step": 30, "scores/real": shares(12), "scores/fake": [None] * 20},
        {"step": 40, "train/loss": 1.0},
    ]
    charts.save_scores(tmp_path / "scores.png", records)
    charts.save_scores(tmp_path / "second.png", records[1:2])
    assert (tmp_path / "scores.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    shown = read_png(tmp_path / "scores.png")[:, :, :3].astype(int)
    row = shown[int((4.2 - 0.6 - 1.0) * 110)]  # an inch above the axis
    left, inch = 0.75 * 110, 6.25 * 110 / 20
    real, fake = (np.array(row[int(left + inch * (place + 0.5))]) for place in (12, 6))
    assert real[2] - real[0] > 60 and fake[0] - fake[2] > 60  # blue and orange
    assert np.ptp(row[int(left + inch * 9.25)]) == 0


def test_records_without_both_scores_make_no_chart(tmp_path):
    for record in ({"step": 1, "scores/real": [0.05] * 20}, {"step": 1, "scores/real": [1.0], "scores/fake": [1.0]}):
        assert not charts.has_scores(record)
        with pytest.raises(ValueError, match="no record has the scores"):
            charts.save_scores(tmp_path / "scores.png", [record])


def test_importing_pictures_charts_and_tracking_stays_light():
    code = (
        "import sys, gen_dist.pictures.grids, gen_dist.pictures.charts, gen_dist.pictures.curves; "
        "import gen_dist.records.tracker; "
        "print([m for m in ('matplotlib', 'wandb', 'tqdm', 'torchvision', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("backend", [None, "module://matplotlib_inline.backend_inline", "Qt4Agg"])
def test_no_picture_depends_on_pyplot_or_its_settings(backend, tmp_path):
    """Jupyter exports MPLBACKEND to other programs, at whose value the import of matplotlib fails."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: no such font\nbackend: Qt4Agg\n")
    code = (
        "import os, sys, pathlib, gen_dist.pictures.curves as p; "
        f"p.save_curves(pathlib.Path({str(tmp_path / 'curves.png')!r}), [{{'step': 1, 'train/loss': 1.0}}]); "
        "print('matplotlib.pyplot' in sys.modules, os.environ.get('MPLBACKEND'))"
    )
    settings = {"MATPLOTLIBRC": str(tmp_path), **({"MPLBACKEND": backend} if backend else {})}
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | settings
    words = [*warm_python(), "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.stdout.split() == ["False", str(backend)], done.stderr
    assert (tmp_path / "curves.png").exists()
