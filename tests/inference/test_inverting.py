"""Projection of images into a generator's latents: what it drew itself is found again, and equal calls are equal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.cli import run_subcommand
from gen_dist.errors import DataError, UserError
from gen_dist.inference.inverting import invert, read_images
from gen_dist.inference.model import GenerativeModel
from gen_dist.model_commands import invert as invert_command
from gen_dist.networks import efficientnet_lite
from gen_dist.training.run import train
from tests.support.runs import make_trainer, small_config


def _silent(_line: str) -> None:
    pass


def _model(objective: str) -> GenerativeModel:
    trainer = make_trainer(small_config(objective))
    for parameter in trainer.best_objective.parameters():
        parameter.data.mul_(1.7)  # new networks draw nearly one image
    data = trainer.dataset
    return GenerativeModel(trainer.best_objective, trainer.config, data.image_shape, data.labels, data.scale)


@pytest.mark.parametrize("objective", ["gan", "conditional gan", "vae", "autoencoder"])
def test_what_a_model_drew_is_found_again(objective: str) -> None:
    model = _model(objective)
    labels = torch.tensor([3, 8]) if model.conditional else None
    images = model.images(model.prior_latents(2, seed=77), labels)
    found = invert(model, images, labels, steps=150, perceptual_weight=0, announce=_silent)
    assert found.space == "latents" and found.latents.shape == (2, *model.objective.latent_shape)
    variance = (images.double() / 255).var(dim=(1, 2, 3))
    assert bool((found.errors < 0.05 * variance).all()), found.errors / variance
    assert torch.equal(found.images, model.images(found.latents, labels))
    assert not any(parameter.grad is not None for parameter in model.objective.parameters())
    again = invert(model, images, labels, steps=150, perceptual_weight=0, announce=_silent)
    assert torch.equal(again.latents, found.latents)


@pytest.mark.parametrize("objective", ["conditional gan", "vae"])
def test_images_in_parts_have_the_latents_of_all_at_once(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(objective)
    labels = torch.tensor([3, 8, 1]) if model.conditional else None
    images = model.images(model.prior_latents(3, seed=77), labels)
    whole = invert(model, images, labels, steps=12, perceptual_weight=0, announce=_silent)
    monkeypatch.setattr("gen_dist.inference.inverting.IMAGES_AT_ONCE", 2)
    parts = invert(model, images, labels, steps=12, perceptual_weight=0, announce=_silent)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parts.errors, whole.errors, rtol=1e-3, atol=1e-5)


def test_candidates_are_decoded_few_at_a_time_where_images_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("conditional gan")
    images = model.images(model.prior_latents(1, seed=77), torch.tensor([3]))
    at_once: list[int] = []
    decode = model.objective.decode

    def counted(latents: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        at_once.append(len(latents))
        return decode(latents, labels)

    monkeypatch.setattr(model.objective, "decode", counted)
    whole = invert(model, images, torch.tensor([3]), steps=3, perceptual_weight=0, announce=_silent)
    assert max(at_once) == 200
    at_once.clear()
    monkeypatch.setattr("gen_dist.objectives.evaluating.SMALL_PASS", 0)
    monkeypatch.setattr("gen_dist.objectives.evaluating.MOST_BYTES", 2**20)
    some = invert(model, images, torch.tensor([3]), steps=3, perceptual_weight=0, announce=_silent)
    assert max(at_once) < 200
    torch.testing.assert_close(some.latents, whole.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_styles_are_found_where_there_are_any() -> None:
    model = _model("stylegan2, lazy, projection")
    labels = torch.tensor([3, 8])
    images = model.images(model.prior_latents(2, seed=77), labels)
    one, many = (
        invert(model, images, labels, steps=steps, perceptual_weight=0, announce=_silent) for steps in (1, 120)
    )
    assert many.space == "styles" and many.latents.shape == (2, 6)
    assert bool((many.errors < 0.7 * one.errors).all())
    of_latents = invert(model, images, labels, steps=5, space="latents", perceptual_weight=0, announce=_silent)
    assert of_latents.latents.shape == (2, *model.objective.latent_shape)


@pytest.mark.slow
@pytest.mark.skipif(not efficientnet_lite.is_installed(), reason="needs the extra perceptual")
def test_a_perceptual_term_is_part_of_the_error() -> None:
    model = _model("gan")
    images = model.sample(1, seed=5)
    with_it, without = (
        invert(model, images, steps=3, perceptual_weight=weight, announce=_silent) for weight in (None, 0)
    )
    assert not torch.equal(with_it.latents, without.latents)


def test_what_cannot_be_inverted_is_one_line(tmp_path: Path) -> None:
    model, conditional, codes = _model("gan"), _model("conditional gan"), _model("latent autoencoder, fsq")
    images = model.sample(2)
    for some, options, message in (
        (model, {"steps": 0}, "steps 0 is less than 1"),
        (model, {"rate": -1.0}, "rate -1.0 is not a positive number"),
        (model, {"rate": float("inf")}, "rate inf is not a positive number"),
        (
            model,
            {"steps": 3, "rate": 1e30, "perceptual_weight": 0.0},
            "has left all finite latents at rate 1e\\+30; use a lower",
        ),
        (model, {"space": "styles"}, "space styles needs a generator with styles"),
        (model, {"labels": torch.tensor([1, 2])}, "is not conditional on classes"),
        (model, {"perceptual_weight": -1.0}, "perceptual_weight -1.0 is not a number"),
        (codes, {}, "codes of a codebook have no gradients"),
        (conditional, {}, "give the label of each image"),
        (conditional, {"labels": torch.tensor([1])}, r"2 latents take int64 \[2\]"),
    ):
        with pytest.raises(UserError, match=message):
            invert(some, images, announce=_silent, **options)
    with pytest.raises(UserError, match="there are no images to invert"):
        invert(model, images[:0], announce=_silent)
    with pytest.raises(UserError, match="the model's are uint8"):
        invert(model, images.float(), announce=_silent)
    (tmp_path / "none.png").write_bytes(b"none")
    for file, message in (
        ("missing.png", "cannot be read: No such file"),
        ("none.png", "is no image that can be read"),
    ):
        with pytest.raises(DataError, match=message):
            read_images(model, [tmp_path / file])


@pytest.mark.slow
def test_the_command_writes_latents_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "found"
    train(small_config("conditional gan", steps=2, data="mnist5k", run_dir=str(run)), say=_silent)
    for place in range(2):
        noise = np.random.default_rng(place).integers(0, 256, (40, 30, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{place}.png")
    words = f"invert {run} {tmp_path / '0.png'} {tmp_path / '1.png'} --labels 4 9 --steps 3 --out {out}.npz"
    run_subcommand([invert_command, invert_command], [*words.split(), "--perceptual-weight", "0"], "gen-dist")
    said = capsys.readouterr().out.split()
    assert said[-2:] == [f"{out}.npz", f"{out}.png"]
    kept = np.load(f"{out}.npz")
    assert kept["latents"].shape == (2, 5) and kept["labels"].tolist() == [4, 9]
    assert kept["images"].shape == kept["originals"].shape == (2, 1, 28, 28)
    assert str(kept["space"]) == "latents" and len(kept["errors"]) == 2
    with Image.open(f"{out}.png") as picture:
        assert picture.width > 3 * 28 and picture.height > 2 * 28


def test_files_that_cannot_be_written_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("seven.png", "eight.png"):
        (tmp_path / name).write_bytes(b"mine")
    os.mkfifo("pipe.npz")
    os.mkfifo("nine.png")
    for out, message in (
        ("pipe.npz", r"pipe\.npz cannot be written: it is a pipe, socket or device, not a regular file; name another"),
        ("nine.npz", r"nine\.png cannot be written: it is a pipe"),
        ("seven.npz", r"seven\.png, the picture of seven\.npz, is one of the images; name another --out"),
        ("eight.npz", r"eight\.png, the picture of eight\.npz, is there without it, and is not overwritten"),
        ("none/found.npz", "there is no directory none; make it"),
    ):
        words = ["invert", "no_run", str(tmp_path / "seven.png"), "--out", out]
        with pytest.raises(UserError, match=message):
            run_subcommand([invert_command, invert_command], words, "gen-dist")
    assert all((tmp_path / name).read_bytes() == b"mine" for name in ("seven.png", "eight.png"))
