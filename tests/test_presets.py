"""Every preset trains and makes its pictures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gen_dist.config import GanConfig, LatentAutoencoderConfig, R3ganConfig, VaeGanConfig, WganGpConfig
from gen_dist.presets import get_preset, presets
from gen_dist.training.run import train
from tests.support.runs import brief_preset

SLOW = pytest.mark.slow


def _quiet(_line: str) -> None:
    pass


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(
            name, marks=() if preset.config.data == "mnist5k" and "latent" not in preset.config.objective.kind else SLOW
        )
        for name, preset in presets().items()
    ],
)
def test_a_preset_trains_and_makes_its_pictures(preset: str, tmp_path: Path) -> None:
    """The data are the embedded digits; for presets of colour images, synthetic ones of their size."""
    config = replace(brief_preset(preset), run_dir=str(tmp_path / "run"))
    outcome = train(config, say=_quiet)
    assert outcome.finished
    objective = config.objective
    adversarial = isinstance(objective, GanConfig | WganGpConfig | R3ganConfig | VaeGanConfig)
    latent = isinstance(objective, LatentAutoencoderConfig)
    generates = preset != "ae-mnist" and not latent
    encodes = not adversarial or preset == "vae-gan-mnist"
    scored = adversarial or (isinstance(objective, LatentAutoencoderConfig) and objective.adversarial_weight > 0)
    assert set(outcome.pictures) == {
        "curves",
        *(("samples", "interpolations", "class_shares") if generates else ()),
        *(("reconstructions", "latent_manifold", "latent_scatter") if encodes else ()),
        *(("scores",) if scored else ()),
    }
    for path in outcome.pictures.values():
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    final = json.loads((tmp_path / "run/summary.json").read_text())["final"]
    if generates:
        assert 0 <= final["samples/diversity_ratio"] < 2
    if encodes:
        headline = "test/reconstruction_error" if adversarial or not generates else "test/negative_elbo"
        assert 50 < final[headline] < (3000 if latent else 600)


def test_two_latents_show_the_whole_plane(tmp_path: Path) -> None:
    """The picture has 20 by 20 digits of 28 pixels for two latents, and ten walks in a row each for more."""
    run = replace(get_preset("vae-2d-mnist"), steps=1, run_dir=str(tmp_path / "run"))
    with Image.open(train(run, say=_quiet).pictures["latent_manifold"]) as picture:
        width, height = picture.size
    assert width >= 20 * 28
    assert abs(width - height) < 60  # as many rows as columns, and a title
