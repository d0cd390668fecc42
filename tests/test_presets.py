"""Every preset runs as it is, to its pictures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gen_dist.presets import DESCRIPTIONS, PRESETS, get_preset
from gen_dist.run import train


def _quiet(_line: str) -> None:
    pass


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_on_the_embedded_digits_and_makes_its_pictures(preset: str, tmp_path: Path) -> None:
    outcome = train(replace(get_preset(preset), steps=2, run_dir=str(tmp_path / "run")), say=_quiet)
    assert outcome.finished
    pictures = {"reconstructions", "latent_manifold", "latent_scatter", "curves"}
    assert set(outcome.pictures) == pictures | ({"samples"} if preset != "ae-mnist" else set())
    for path in outcome.pictures.values():
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    final = json.loads((tmp_path / "run/summary.json").read_text())["final"]
    headline = "test/reconstruction_error" if preset == "ae-mnist" else "test/negative_elbo"
    assert 50 < final[headline] < 600


def test_two_latents_show_the_whole_plane(tmp_path: Path) -> None:
    """20 by 20 digits of 28 pixels, where more latents show ten walks along a line each."""
    run = replace(get_preset("vae-2d-mnist"), steps=1, run_dir=str(tmp_path / "run"))
    with Image.open(train(run, say=_quiet).pictures["latent_manifold"]) as picture:
        width, height = picture.size
    assert width >= 20 * 28
    assert abs(width - height) < 60  # as many rows as columns, and a title


def test_every_preset_is_described() -> None:
    assert DESCRIPTIONS.keys() == PRESETS.keys()
