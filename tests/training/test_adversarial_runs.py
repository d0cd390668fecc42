"""Runs of adversarial objectives: their files, bit-exact resumption, and divergence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from gen_dist.config import OptimizerConfig, TrainConfig
from gen_dist.objectives import Batch, TurnResult
from gen_dist.objectives.gan import GanDiscriminatorPhase, GanGeneratorPhase
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import MACHINE_USE, read_metrics
from gen_dist.records.score_bins import SCORE_EDGES
from gen_dist.training.outcome import DivergenceError, Outcome
from gen_dist.training.run import train
from tests.support.digits import read_png
from tests.support.runs import assert_same_bits, small_config

STEPS, CHECKPOINT_EVERY = 14, 7
RUNS = ("conditional gan", "sngan", "wgan-gp, lazy", "vae-gan")
"""They cover labels; singular vectors as buffers; turns and penalties at some steps; batch statistics and three
optimizers."""


def _config(objective: str, run_dir: Path, **changes: Any) -> TrainConfig:
    intervals = {"checkpoint_every": CHECKPOINT_EVERY, "sample_every": 7, "evaluate_every": 7, "log_every": 4}
    return small_config(objective, **{"steps": STEPS, "run_dir": str(run_dir), **intervals, **changes})


def _train(config: TrainConfig) -> Outcome:
    return train(config, say=lambda _line: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of uninterrupted runs by objective."""
    directory = tmp_path_factory.mktemp("finished")
    for number, objective in enumerate(RUNS):
        _train(_config(objective, directory / f"run{number}"))
    return {objective: directory / f"run{number}" for number, objective in enumerate(RUNS)}


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name not in MACHINE_USE}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def _pictures(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*.png")}


def _pictures_of_no_times(run_dir: Path) -> dict[str, bytes]:
    return {name: content for name, content in _pictures(run_dir).items() if name != "curves.png"}


@pytest.mark.parametrize("objective", RUNS)
def test_a_run_draws_all_of_its_pictures(objective: str, finished: dict[str, Path]) -> None:
    expected = {f"samples/step_{step:08d}.png" for step in (7, 14)}
    expected |= {"interpolations.png", "curves.png", "scores.png", "class_shares.png"}
    if objective == "vae-gan":
        expected |= {f"reconstructions/step_{step:08d}.png" for step in (7, 14)}
        expected |= {"latent_scatter.png", "latent_manifold.png"}
    assert _pictures(finished[objective]).keys() == expected
    for name in expected:
        picture = read_png(finished[objective] / name)
        assert min(picture.shape[:2]) > 80, name
        assert picture.std() > 5, name


@pytest.mark.parametrize("objective", RUNS)
def test_a_run_records_losses_histograms_and_checks(objective: str, finished: dict[str, Path]) -> None:
    records = _records(finished[objective])
    assert [record["step"] for record in records] == [4, 7, 8, 12, 14]
    players = ["critic" if "wgan" in objective else "discriminator", "generator"]
    if objective == "vae-gan":
        players.append("encoder")
    for record in records:
        assert (record["step"] in (7, 14)) == ("samples/diversity" in record)
        if record["step"] == 7:
            continue
        for player in players:
            assert np.isfinite(record[f"train/{player}/loss"]) and record[f"train/{player}/gradient_norm"] > 0
        for kind in ("real", "fake"):
            shares = record[f"scores/{kind}"]
            assert len(shares) == len(SCORE_EDGES) - 1
            assert sum(shares) == pytest.approx(1.0, abs=1e-6)
            assert not any("scores" in name for name in record if name.startswith("train/"))
    checks = {"diversity", "diversity_ratio", "class_shares", "classes_found", "class_variation"}
    if objective == "conditional gan":
        checks.add("label_accuracy")
    assert {name[8:] for name in records[-1] if name.startswith("samples/")} == checks
    assert sum(records[-1]["samples/class_shares"]) == pytest.approx(1.0)
    tested = {name for name in records[-1] if name.startswith("test/")}
    assert tested == ({"test/reconstruction_error", "test/kl"} if objective == "vae-gan" else set())


@pytest.mark.parametrize("objective", RUNS)
def test_a_resumed_run_has_the_same_bits_lines_and_pictures(
    objective: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished[objective], path)
    shutil.rmtree(checkpoint_paths(path)[0])
    for picture in path.rglob("*00000014.png"):
        picture.unlink()
    said: list[str] = []
    train(_config(objective, path), say=said.append)
    assert f"resuming {path} at step {CHECKPOINT_EVERY} of {STEPS}" in said
    (expected, _), (resumed, _) = (checkpoints.load(checkpoint_paths(p)[0]) for p in (finished[objective], path))
    assert expected.step == resumed.step == STEPS
    assert {"networks", "averaged", "optimizer-generator"} < expected.tensors.keys() == resumed.tensors.keys()
    for group in expected.tensors:
        assert expected.tensors[group]
        assert_same_bits(dict(resumed.tensors[group]), dict(expected.tensors[group]))
    assert _records(path) == _records(finished[objective])
    assert _pictures_of_no_times(path) == _pictures_of_no_times(finished[objective])


@pytest.mark.parametrize(
    ("phase", "name", "broken"),
    [
        (GanDiscriminatorPhase, "discriminator", "discriminator"),
        (GanGeneratorPhase, "generator", "generator"),
    ],
)
def test_a_nan_loss_names_step_phase_and_network(phase: Any, name: str, broken: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    forward = phase.forward

    def fail_at_step_10(self: Any, batch: Batch) -> TurnResult:
        loss, logs, carried = forward(self, batch)
        loss = loss * torch.where(batch.rng[1] == 9, torch.nan, 1.0)
        return TurnResult(loss, logs | {"loss": loss.detach()}, carried)

    with (
        mock.patch.object(phase, "forward", fail_at_step_10),
        pytest.raises(
            DivergenceError, match=rf"^{name}/loss is nan at step 10; the weights of {broken} are broken"
        ) as error,
    ):
        _train(_config("gan", path, steps=10, log_every=1))
    newest = checkpoint_paths(path)[0]
    assert f"(newest good checkpoint: {newest})" in str(error.value)
    checkpoint, _ = checkpoints.load(newest)
    assert checkpoint.step == CHECKPOINT_EVERY
    assert all(bool(tensor.isfinite().all()) for group in checkpoint.tensors.values() for tensor in group.values())


@pytest.mark.parametrize("objective", ["gan", "wgan-gp, lazy", "r3gan"])
def test_a_diverged_gan_keeps_its_last_finite_checkpoint(objective: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    optimization = OptimizerConfig(optimizer="sgd", betas=(0.0, 0.0), warmup_steps=10**6)
    # The rate is large at the first step and grows until every network diverges.
    wild = _config(objective, path, optimization=optimization, learning_rate=1e13, checkpoint_every=1, steps=60)
    with pytest.raises(DivergenceError, match=r"(critic|discriminator|generator)/\w+ is .* at step \d+|update of step"):
        _train(wild)
    checkpoint, _ = checkpoints.load(checkpoint_paths(path)[0])
    assert all(bool(t.isfinite().all()) for group in checkpoint.tensors.values() for t in group.values())
