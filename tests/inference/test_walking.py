"""Walks end where they begin, keep to the prior's sphere, and are the same for one seed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_dist
from gen_dist.cli import run_subcommand
from gen_dist.errors import ConfigError, UserError
from gen_dist.inference.model import GenerativeModel
from gen_dist.inference.prior_fitting import fit_prior
from gen_dist.inference.walking import Walk, frames_of, walk_latents
from gen_dist.model_commands import walk as walk_command
from gen_dist.pictures.animation import check_animation, save_animation
from gen_dist.training.run import train
from tests.support.runs import make_trainer, small_config

SHORT = Walk(images=3, stops=4, frames_per_stop=5)


def _silent(_line: str) -> None:
    pass


def _model(objective: str) -> GenerativeModel:
    trainer = make_trainer(small_config(objective))
    data = trainer.dataset
    return GenerativeModel(trainer.best_objective, trainer.config, data.image_shape, data.labels, data.scale)


def test_a_walk_passes_keyed_latents_and_loops() -> None:
    model = _model("gan")
    found = walk_latents(model, SHORT)
    assert found.shape == (20, 3, *model.objective.latent_shape)
    stops = model.prior_latents(12).view(4, 3, -1)
    torch.testing.assert_close(found[::5], stops)
    steps = (found - found.roll(1, dims=0)).norm(dim=2)  # the first is from the last frame to the first
    assert float(steps.max()) < 3 * float(steps.median())
    assert torch.equal(walk_latents(model, SHORT), found)
    assert not torch.equal(walk_latents(model, SHORT._replace(seed=1)), found)


def test_a_walk_stays_as_far_from_the_origin_as_its_ends() -> None:
    model = _model("gan")
    found = walk_latents(model, SHORT).norm(dim=2)
    ends = found[::5]
    assert float(found.min()) > 0.6 * float(ends.min())  # a straight line would come near to it
    torch.testing.assert_close(found[2], (found[0] + found[5]) / 2, rtol=0.25, atol=0.2)


@pytest.mark.parametrize("objective", ["vae", "conditional gan", "conditional vae"])
def test_frames_are_the_decoded_latents(objective: str) -> None:
    model = _model(objective)
    frames = list(frames_of(model, SHORT))
    assert len(frames) == SHORT.frames and frames[0].shape == (3, *model.image_shape)
    labels = model.labels_in_turn(3) if model.conditional else None
    assert torch.equal(frames[7], model.images(walk_latents(model, SHORT)[7], labels))


@pytest.mark.parametrize("objective", ["conditional gan", "conditional vae"])
def test_labels_are_walked_from_one_to_the_next(objective: str) -> None:
    model = _model(objective)
    rows = [(2.0,), (7.0,)]
    frames, latents = list(frames_of(model, SHORT, rows, walk_labels=True)), walk_latents(model, SHORT)
    for place, label in ((0, 2), (10, 7)):
        assert torch.equal(frames[place], model.images(latents[place], torch.full((3,), label)))
    between = [model.images(latents[5], torch.full((3,), label)) for label in (2, 7)]
    assert not any(torch.equal(frames[5], one) for one in between)
    assert torch.equal(model.images(latents[5], torch.full((3,), 2)), between[0])  # nothing stays mixed


def test_walks_that_cannot_be_are_one_line() -> None:
    gan, autoencoder = _model("gan"), _model("autoencoder")
    for model, walk, options, message in (
        (gan, SHORT, {"rows": [(1.0,)]}, "is not conditional on classes; leave out the labels"),
        (gan, SHORT, {"walk_labels": True}, "is not conditional on classes; leave out walk_labels"),
        (gan, SHORT._replace(stops=1), {}, "stops 1 is less than 2"),
        (gan, SHORT._replace(images=0), {}, "images 0 is less than 1"),
        (gan, SHORT._replace(truncation=0.5), {}, "truncation needs a generator with styles"),
        (gan, SHORT._replace(prior="fitted"), {}, "no prior is fitted"),
        (autoencoder, SHORT, {}, "cannot generate"),
    ):
        with pytest.raises(UserError, match=message):
            list(frames_of(model, walk, **options))


@pytest.mark.parametrize("option", ["count 0", "columns 0", "stops 1", "frames -2"])
def test_the_command_refuses_by_the_names_of_its_options(option: str, tmp_path: Path) -> None:
    words = f"walk {tmp_path} --out {tmp_path / 'walk.webp'} --{option}".split()
    with pytest.raises(ConfigError, match=f"{option} is less than [12]"):
        run_subcommand([walk_command, walk_command], words, "gen-dist")


def test_truncated_styles_walk_nearer_to_the_mean() -> None:
    model = _model("stylegan2, lazy, projection")

    def spread(truncation: float) -> float:
        frames = torch.stack(list(frames_of(model, SHORT._replace(truncation=truncation), [(1.0,)]))).float()
        return float(frames.std(dim=0).mean())

    assert spread(0.0) < 1e-3 < spread(1.0)


@pytest.mark.slow
def test_a_walk_is_an_animation_that_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "walk.webp"
    train(small_config("autoencoder", steps=150, data="mnist5k", run_dir=str(run)), say=_silent)
    fit_prior(run, 2, announce=_silent)
    words = f"walk {run} --out {out} --count 4 --columns 2 --stops 2 --frames 3 --prior fitted"
    run_subcommand([walk_command, walk_command], words.split(), "gen-dist")
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as opened:
        assert (opened.n_frames, opened.info["loop"]) == (6, 0)  # type: ignore[attr-defined]
        shown = np.asarray(opened.convert("L"))
    model = gen_dist.load(run)
    first = next(frames_of(model, Walk(images=4, stops=2, frames_per_stop=3, prior="fitted")))
    scale = (shown.shape[1] - 2) // (2 * 28)
    assert np.abs(shown[: 28 * scale : scale, : 28 * scale : scale].astype(int) - first[0, 0].numpy()).mean() < 12


def test_frames_of_any_channels_are_animated(tmp_path: Path) -> None:
    frames = [np.full((9, 7, channels), 80 * place, np.uint8) for channels in (3,) for place in range(3)]
    save_animation(tmp_path / "a.webp", frames, 12.5)
    with Image.open(tmp_path / "a.webp") as opened:
        opened.seek(1)
        opened.load()
        assert opened.info["duration"] == 80
    with pytest.raises(ConfigError, match=r"name a file of \.webp or \.mp4"):
        save_animation(tmp_path / "a.gif", frames, 10)


def test_mp4_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install av`, or name a \.webp file"):
        check_animation(tmp_path / "walk.mp4")


def test_what_cannot_be_written_is_told_before_the_walk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.webp")
    for name, message in (("none/walk.webp", "there is no directory"), ("pipe.webp", "it is a pipe, socket or device")):
        words = ["walk", "no_run", "--out", str(tmp_path / name)]
        with pytest.raises(ConfigError, match=message):
            run_subcommand([walk_command, walk_command], words, "gen-dist")


@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
def test_a_directory_that_takes_no_file_is_told_before_the_walk(
    lacking: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def access(path: object, asked: int, **_options: bool) -> bool:  # as of a user who is not root
        return path != tmp_path or not asked & lacking

    monkeypatch.setattr(os, "access", access)
    words = ["walk", "no_run", "--out", str(tmp_path / "walk.webp")]
    with pytest.raises(ConfigError, match=r"walk\.webp cannot be written: this user may not write in .*; name another"):
        run_subcommand([walk_command, walk_command], words, "gen-dist")


def test_mp4_has_every_frame_at_its_rate(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames = [np.full((9, 7, 1), 25 * place, np.uint8) for place in range(10)]
    save_animation(tmp_path / "a.mp4", frames, 20)
    with av.open(str(tmp_path / "a.mp4")) as opened:
        (stream,) = opened.streams.video
        assert (stream.width, stream.height, float(stream.average_rate)) == (8, 10, 20.0)
        seen = [frame.to_ndarray(format="gray")[4, 3] for frame in opened.decode(stream)]
    assert len(seen) == 10 and seen == sorted(seen) and seen[-1] > 200
