"""Use of a trained model: load, sample, encode, decode, and the commands for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_dist
from gen_dist import commands
from gen_dist.cli import run_subcommand
from gen_dist.config import LatentAutoencoderConfig
from gen_dist.errors import CheckpointError, ConfigError, UserError
from gen_dist.inference.model import GenerativeModel
from gen_dist.pictures.grids import save_grid
from gen_dist.presets import presets
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from gen_dist.training.run import train
from gen_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.support.runs import (
    ADVERSARIAL,
    OBJECTIVES,
    WITH_DISCRIMINATOR,
    each_of,
    make_trainer,
    run_steps,
    small_config,
)
from tests.support.warm_python import warm_python

SHAPE = (1, 28, 28)
WITHOUT_ENCODER = [name for name, (config, _) in OBJECTIVES.items() if "encoder" in config.lacks]
WITHOUT_POSTERIOR = [
    name
    for name, (config, _) in OBJECTIVES.items()
    if config.kind == "autoencoder" or (isinstance(config, LatentAutoencoderConfig) and config.bottleneck != "kl")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Function from the name of an objective to a finished run of it, which is made at the first call."""
    return tmp_path_factory.mktemp("runs")


def _run_of(runs: Path, objective: str) -> Path:
    path = runs / str(list(OBJECTIVES).index(objective))
    if not path.exists():
        config = small_config(objective, steps=12, checkpoint_every=5, sample_every=6, run_dir=str(path))
        train(config, say=lambda _line: None)
    return path


@each_of(OBJECTIVES)
def test_every_objective_makes_the_pictures_that_it_can(objective: str, runs: Path) -> None:
    path = _run_of(runs, objective)
    generates = "samples" not in OBJECTIVES[objective][0].lacks
    encodes = objective not in WITHOUT_ENCODER
    assert (path / "samples").exists() == (path / "interpolations.png").exists() == generates
    assert (path / "reconstructions").exists() == (path / "latent_manifold.png").exists() == encodes
    assert (path / "scores.png").exists() == (objective in WITH_DISCRIMINATOR)
    pictures = [*path.glob("*.png"), *path.glob("*/*.png")]
    assert path / "curves.png" in pictures
    for file in pictures:
        with Image.open(file) as picture:
            assert np.asarray(picture.convert("L")).std() > 2


def _trained_and_loaded(objective: str, runs: Path) -> tuple[Trainer, GenerativeModel]:
    trainer = make_trainer(small_config(objective, steps=12))
    run_steps(trainer, 0, 12)
    return trainer, gen_dist.load(_run_of(runs, objective))


@each_of(ADVERSARIAL)
def test_a_loaded_generator_is_the_trained_one(objective: str, runs: Path) -> None:
    trainer, model = _trained_and_loaded(objective, runs)
    latents = model.prior_latents(25)
    labels = torch.arange(25) % 10 if model.conditional else None
    with torch.no_grad():
        assert torch.equal(model.decode(latents, labels), trainer.best_objective.decode(latents, labels))
    assert model.conditional == ("conditional" in objective or "projection" in objective)
    assert torch.equal(model.sample(25), model.images(latents, labels))  # all classes in turn by default
    assert model.images(latents).shape == (25, *SHAPE)


@each_of([name for name in OBJECTIVES if name not in WITHOUT_ENCODER])
def test_a_loaded_model_is_the_trained_one(objective: str, runs: Path) -> None:
    trainer, model = _trained_and_loaded(objective, runs)
    images = torch.from_numpy(trainer.dataset.test.images[:7])
    mean, logvar = model.encode(images)
    expected_mean, _ = trainer.best_objective.encode(images)
    assert torch.equal(mean, expected_mean)
    assert mean.shape == (7, *trainer.objective.latent_shape)
    assert (logvar is None) == (objective in WITHOUT_POSTERIOR)
    decoded = model.decode(mean)
    assert decoded.shape == (7, *SHAPE)
    assert decoded.dtype == torch.float32
    labels = model.labels_in_turn(len(images)) if model.conditional else None
    assert model.reconstruct(images, labels).dtype == torch.uint8
    assert not model.objective.training


def test_averaged_weights_are_the_ones_that_are_loaded(runs: Path) -> None:
    trainer = make_trainer(small_config("vae", steps=12))
    run_steps(trainer, 0, 12)
    loaded = gen_dist.load(_run_of(runs, "vae")).objective.networks.state_dict()
    name = "decoder.layers.0.weight"
    assert trainer.averaged is not None
    assert torch.equal(loaded[name], trainer.averaged.networks.state_dict()[name])
    assert not torch.equal(loaded[name], trainer.objective.networks.state_dict()[name])


def test_samples_are_a_function_of_the_seed_and_of_nothing_else(runs: Path) -> None:
    model = gen_dist.load(_run_of(runs, "vae"))
    first = model.sample(20)
    torch.manual_seed(5)
    assert torch.equal(gen_dist.load(_run_of(runs, "vae")).sample(20), first)
    assert torch.equal(model.sample(5), first[:5])
    assert not torch.equal(model.sample(20, seed=1), first)
    assert first.shape == (20, *SHAPE)
    assert first.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in first}) == 20


def test_a_checkpoint_directory_loads_as_well_as_its_run(runs: Path) -> None:
    path = _run_of(runs, "vae")
    newest, before = checkpoint_paths(path)
    assert torch.equal(gen_dist.load(newest).sample(3), gen_dist.load(path).sample(3))
    assert not torch.equal(gen_dist.load(before).sample(3), gen_dist.load(path).sample(3))


def test_an_autoencoder_says_why_it_cannot_sample(runs: Path) -> None:
    with pytest.raises(UserError, match="cannot generate: it has no prior"):
        gen_dist.load(_run_of(runs, "autoencoder")).sample(3)


def test_wrong_inputs_are_refused_with_the_right_shape(runs: Path) -> None:
    model = gen_dist.load(_run_of(runs, "vae"))
    with pytest.raises(UserError, match=r"takes uint8 \[N, 1, 28, 28\]"):
        model.encode(torch.zeros(2, 1, 28, 28))
    with pytest.raises(UserError, match=r"takes uint8 \[N, 1, 28, 28\]"):
        model.encode(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"takes \[N, 5\]"):
        model.decode(torch.zeros(2, 6))
    with pytest.raises(UserError, match="count 0"):
        model.sample(0)
    with pytest.raises(UserError, match="is not conditional on classes"):
        model.sample(2, labels=torch.tensor([0, 1]))
    conditional = gen_dist.load(_run_of(runs, "conditional gan"))
    with pytest.raises(UserError, match="labels are 0 to 10; the model's are 0 to 9"):
        conditional.sample(2, labels=torch.tensor([0, 10]))
    with pytest.raises(UserError, match=r"2 latents take int64 \[2\]"):
        conditional.sample(2, labels=torch.tensor([0.0, 1.0]))
    with pytest.raises(UserError, match="has no encoder"):
        conditional.encode(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))


def test_directories_of_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run or checkpoint directory"):
        gen_dist.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        gen_dist.load(tmp_path)


def _gen_dist(*words: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [*warm_python(), "-m", "gen_dist.commands", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd, env=environment)


def test_the_sample_command_writes_a_grid(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    done = _gen_dist("sample", _run_of(runs, "vae"), "--count", 12, "--columns", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    with Image.open(out) as picture:
        assert picture.width > picture.height


@pytest.mark.parametrize("name", ["a.gif", "b", "c.tiff"])
def test_the_sample_command_refuses_other_formats_at_once(name: str, tmp_path: Path) -> None:
    words = ["sample", "no-run", "--out", str(tmp_path / name)]
    with pytest.raises(ConfigError, match=r"cannot be written: name a file of \.png"):
        run_subcommand([commands.sample, commands.report], words, "gen-dist")


@pytest.mark.parametrize("name", ["a.jpg", "b.pdf", "c"])
def test_the_report_command_refuses_other_formats_at_once(name: str, tmp_path: Path) -> None:
    words = ["report", "no-run", "--out", str(tmp_path / name)]
    with pytest.raises(ConfigError, match="a report is an HTML file; name it"):
        run_subcommand([commands.sample, commands.report], words, "gen-dist")


def test_the_report_command_does_not_replace_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "page.html")
    words = ["report", "no-run", "--out", str(tmp_path / "page.html")]
    with pytest.raises(ConfigError, match=r"page\.html cannot be written: it is a pipe"):
        run_subcommand([commands.sample, commands.report], words, "gen-dist")
    assert (tmp_path / "page.html").is_fifo()


def test_the_sample_command_draws_the_requested_classes(runs: Path, tmp_path: Path) -> None:
    path, out = _run_of(runs, "conditional gan"), tmp_path / "grid.png"
    done = _gen_dist("sample", path, "--count", 7, "--labels", 3, 1, "--columns", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    expected = gen_dist.load(path).sample(7, torch.tensor([3, 1, 3, 1, 3, 1, 3]))
    save_grid(tmp_path / "expected.png", expected.numpy(), columns=2)
    assert out.read_bytes() == (tmp_path / "expected.png").read_bytes()


@pytest.mark.parametrize("step", [1, 3, 11])
def test_replay_prints_the_losses_of_the_run(step: int, runs: Path) -> None:
    path = _run_of(runs, "iwae")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    done = _gen_dist("replay", path, "--step", step)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    record = next(record for record in read_metrics(path / "metrics.jsonl") if record["step"] == step)
    assert float(words[words.index("loss") + 1]) == pytest.approx(record["train/loss"], abs=1e-6)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["sample", "none"], "none is not a run"),
        (["sample", "{run}", "--count", "0"], "count 0"),
        (["sample", "{run}", "--count", "x"], "--count"),
        (["sample", "{run}", "--seed", "-1"], "seed -1"),
        (["sample", "{run}", "--labels", "3"], "is not conditional on classes"),
        (["sample", "{run}", "--seed", str(2**63)], f"seed {2**63}"),
        (["sample", "{run}", "--out", "/proc/none.png"], "cannot be written"),
        (["sample", "{run}", "--device", "cuda"], "no GPU"),
        (["replay", "{run}", "--step", "99"], "1 to 12"),
        (["replay", "none", "--step", "1"], "does not exist"),
        (["replay", "{run}"], "--step"),
        (["simple"], "simple"),
    ],
)
def test_bad_commands_give_one_line_and_exit_code_2(
    words: list[str],
    mentioned: str,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gen-dist", *(word.format(run=_run_of(runs, "vae")) for word in words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert mentioned in told.err


def test_a_bad_command_ends_its_process_with_code_2() -> None:
    done = _gen_dist("sample", "none")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_presets_are_listed() -> None:
    done = _gen_dist("presets")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(presets())


def test_latents_are_the_callers_to_write_to(runs: Path) -> None:
    model = gen_dist.load(_run_of(runs, "vae"))
    expected = model.prior_latents(8)
    model.prior_latents(8).fill_(3.0)
    assert torch.equal(model.prior_latents(8), expected)
