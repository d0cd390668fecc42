"""Every preset trains and makes its pictures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gen_dist.config import DataConfig, GanConfig, R3ganConfig, VaeGanConfig, WganGpConfig
from gen_dist.presets import get_preset, presets
from gen_dist.training.run import train


def _quiet(_line: str) -> None:
    pass


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=() if preset.config.data == "mnist5k" else pytest.mark.slow)
        for name, preset in presets().items()
    ],
)
def test_a_preset_trains_and_makes_its_pictures(preset: str, tmp_path: Path) -> None:
    """The data are the embedded digits; for presets of colour images, synthetic ones of their size."""
    config = replace(get_preset(preset), steps=2, run_dir=str(tmp_path / "run"))
    if config.data != "mnist5k":
        packing = DataConfig(synthetic_images=128, channels=3, image_size=config.packing.image_size or 32)
        config = replace(config, data="synthetic", packing=packing, global_batch_size=8)
    outcome = train(config, say=_quiet)
    assert outcome.finished
    adversarial = isinstance(config.objective, GanConfig | WganGpConfig | R3ganConfig | VaeGanConfig)
    generates = preset != "ae-mnist"
    encodes = not adversarial or preset == "vae-gan-mnist"
    assert set(outcome.pictures) == {
        "curves",
        *(("samples", "interpolations", "class_shares") if generates else ()),
        *(("reconstructions", "latent_manifold", "latent_scatter") if encodes else ()),
        *(("scores",) if adversarial else ()),
    }
    for path in outcome.pictures.values():
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    final = json.loads((tmp_path / "run/summary.json").read_text())["final"]
    if generates:
        assert 0 <= final["samples/diversity_ratio"] < 2
    if encodes:
        headline = "test/reconstruction_error" if adversarial or not generates else "test/negative_elbo"
        assert 50 < final[headline] < 600


def test_two_latents_show_the_whole_plane(tmp_path: Path) -> None:
    """The picture has 20 by 20 digits of 28 pixels for two latents, and ten walks in a row each for more."""
    run = replace(get_preset("vae-2d-mnist"), steps=1, run_dir=str(tmp_path / "run"))
    with Image.open(train(run, say=_quiet).pictures["latent_manifold"]) as picture:
        width, height = picture.size
    assert width >= 20 * 28
    assert abs(width - height) < 60  # as many rows as columns, and a title
