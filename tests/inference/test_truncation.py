"""Truncated styles: their arithmetic, the mean style, exports, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gen_dist
from gen_dist import commands
from gen_dist.cli import run_subcommand
from gen_dist.errors import ConfigError, UserError
from gen_dist.inference.export import export
from gen_dist.inference.fitted_prior import networks_digest
from gen_dist.inference.model import GenerativeModel
from gen_dist.inference.truncation import LATENTS_OF_THE_MEAN, truncating_decoder
from gen_dist.kernels import Key, normal
from gen_dist.networks.stylegan2 import Stylegan2Decoder
from gen_dist.objectives import build_objective
from gen_dist.randomness import Stream
from gen_dist.training.run import train
from tests.support.runs import small_config

CLASSES = 10


def model_of(objective: str) -> GenerativeModel:
    """An untrained model for images of 28 x 28."""
    torch.manual_seed(0)
    config = small_config(objective)
    made = build_objective(config, (1, 28, 28), CLASSES).eval()
    return GenerativeModel(made, config, (1, 28, 28), [str(each) for each in range(CLASSES)])


def decoder_of(model: GenerativeModel) -> Stylegan2Decoder:
    decoder = truncating_decoder(model.objective)
    assert decoder is not None
    return decoder


@pytest.fixture(scope="module")
def model() -> GenerativeModel:
    return model_of("stylegan2, lazy, projection")


def test_truncation_makes_no_fitted_prior_stale() -> None:
    """The mean style is computed in place when it is first needed, as by a truncated sample."""
    model = model_of("stylegan2, lazy, projection")
    networks = model.objective.networks
    before = networks_digest(networks)
    model.sample(1, truncation=0.5)
    assert decoder_of(model).mean_style.any() and networks_digest(networks) == before
    next(decoder_of(model).parameters()).data += 1.0
    assert networks_digest(networks) != before


def test_styles_move_towards_the_mean_of_keyed_latents(model: GenerativeModel) -> None:
    plain = model.sample(6, seed=3)
    truncated = model.sample(6, seed=3, truncation=0.5)
    decoder = decoder_of(model)
    latents = normal(Key(torch.tensor([0, 0]), Stream.MEAN_STYLE, 0), LATENTS_OF_THE_MEAN, 5)
    labels = torch.nn.functional.one_hot(torch.arange(LATENTS_OF_THE_MEAN) % CLASSES)
    with torch.no_grad():
        mean = decoder.mapping(torch.cat([latents, labels], dim=1)).double().mean(dim=0)
        torch.testing.assert_close(decoder.mean_style.double(), mean, rtol=1e-5, atol=1e-6)
        given = torch.cat([model.prior_latents(6, seed=3), labels[:6]], dim=1)
        styles = 0.5 * mean.float() + 0.5 * decoder.mapping(given)
        decoded = decoder.synthesize(styles, decoder.fixed_noise)
    images = model.scale.values(model.objective.pixels(decoded))
    assert int((truncated.int() - images.int()).abs().max()) <= 1  # rounding to 8 bits
    assert not torch.equal(truncated, plain)
    assert torch.equal(model.sample(6, seed=3), plain)  # the next sample is whole again


def test_no_distance_gives_every_latent_one_image(model: GenerativeModel) -> None:
    images = model.sample(4, seed=1, truncation=0.0)
    assert torch.equal(images, images[:1].expand_as(images))


@pytest.mark.parametrize("truncation", [-0.1, 1.5, float("nan")])
def test_a_truncation_outside_its_range_is_refused(model: GenerativeModel, truncation: float) -> None:
    with pytest.raises(UserError, match=r"is not in 0\.\.1"):
        model.sample(1, truncation=truncation)


def test_models_without_styles_are_not_truncated() -> None:
    with pytest.raises(UserError, match="needs a generator with styles, which network stylegan2 has"):
        model_of("gan").sample(1, truncation=0.7)


@pytest.mark.slow
def test_an_export_has_the_mean_style(tmp_path: Path) -> None:
    config = small_config("stylegan2, lazy, projection", steps=2, global_batch_size=8, run_dir=str(tmp_path / "run"))
    train(config, say=lambda _line: None)
    run = gen_dist.load(tmp_path / "run")
    expected = run.sample(4, truncation=0.6)
    directory = export(tmp_path / "run", "safetensors", announce=lambda _line: None)
    loaded = gen_dist.load(directory)
    assert torch.equal(decoder_of(loaded).mean_style, decoder_of(run).mean_style)
    assert torch.equal(loaded.sample(4, truncation=0.6), expected)
    assert "| styles | their mean is `decoder.mean_style`;" in (directory / "README.md").read_text()
    out = tmp_path / "samples.png"
    given = ["--truncation", "0.6", "--out", str(out)]
    run_subcommand([commands.sample, commands.export], ["sample", str(directory), *given], "gen-dist")
    assert out.exists()
    with pytest.raises(ConfigError, match="format safetensors holds weights, to which no truncation belongs"):
        export(tmp_path / "run", "safetensors", announce=lambda _line: None, truncation=0.6)


@pytest.mark.slow
def test_an_exported_program_is_truncated(tmp_path: Path) -> None:
    config = small_config("stylegan2, lazy, projection", steps=2, global_batch_size=8, run_dir=str(tmp_path / "run"))
    train(config, say=lambda _line: None)
    run = gen_dist.load(tmp_path / "run")
    latents, labels = run.prior_latents(4), torch.arange(4)
    directory = export(tmp_path / "run", "torch-export", announce=lambda _line: None, truncation=0.6)
    program = torch.export.load(directory / "decoder.pt2").module()
    images = (program(latents, labels) * 255).round()
    assert float((images - run.sample(4, truncation=0.6)).abs().max()) <= 1
    assert float((images - run.sample(4)).abs().max()) > 1
    assert "truncated to 0.6 of the distance from the mean style" in (directory / "README.md").read_text()
