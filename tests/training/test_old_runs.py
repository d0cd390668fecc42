"""Runs of commit 61fab54, which had all modules in one folder, can be loaded, resumed, evaluated and reported.

`old_runs/NAME` is a run directory without pictures, after 12 steps and an evaluation. `going-on.jsonl` has the later
lines of metrics.jsonl, up to step 18, by the same commit.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gen_dist
from gen_dist.config import DataConfig, TrainConfig
from gen_dist.errors import CheckpointError, ConfigError, DamagedError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.objectives.vae import Vae
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import MACHINE_USE, read_metrics
from gen_dist.records.run_paths import RunPaths
from gen_dist.reports import write_report
from gen_dist.reports.run_record import read_run
from gen_dist.training.run import train
from tests.support.fuzzing import write_sums
from tests.support.runs import small_config

OLD_RUNS = Path(__file__).parent / "old_runs"


def _silent(_line: str) -> None:
    pass


@pytest.fixture(params=["vae", "gan"])
def old_run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(OLD_RUNS / request.param, tmp_path / "run")
    return tmp_path / "run"


def test_an_old_run_resumes_with_the_same_metrics(old_run: Path) -> None:
    paths = RunPaths(old_run)
    config = TrainConfig.from_json(paths.config.read_text(), "config.json")
    assert train(dataclasses.replace(config, run_dir=str(old_run), steps=18), say=_silent).finished
    expected = [json.loads(line) for line in (old_run / "going-on.jsonl").read_text().splitlines()]
    found = [record for record in read_metrics(paths.metrics) if record["step"] > 12]
    for before, after in zip(expected, found, strict=True):
        assert after.keys() - set(MACHINE_USE) == before.keys()
        for name, value in before.items():
            if not isinstance(value, list):  # a sample near the edge of a bin or a class may be on either side
                assert after[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_an_old_run_is_loaded_reported_on_and_evaluated(old_run: Path, tmp_path: Path) -> None:
    assert gen_dist.load(old_run).sample(3).shape == (3, 1, 28, 28)
    record = read_run(old_run)
    assert record.step == 12 and record.finished and record.evaluation
    write_report(tmp_path / "report.html", [record], [None])
    assert (tmp_path / "report.html").stat().st_size > 10_000
    before = record.evaluation.metrics
    after = evaluate(old_run, ["sharpness", "diversity"], samples=10, announce=_silent).metrics
    assert after.keys() == before.keys()
    assert after["sharpness_10"] == pytest.approx(before["sharpness_10"], rel=1e-3)


def test_a_run_on_a_range_that_is_now_refused_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discretized logistics of ranges whose ends are no whole numbers were trained before they were refused."""
    config = small_config(
        "vae, discretized logistic",
        packing=DataConfig(synthetic_images=64, value_range="0.5:200", cache_dir=str(tmp_path)),
        run_dir=str(tmp_path / "run"),
        steps=4,
        **dict.fromkeys(("checkpoint_every", "sample_every", "evaluate_every"), 2),
    )
    with pytest.raises(ConfigError, match="whose ends are none"):
        train(config, say=_silent)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with monkeypatch.context() as patched:
        patched.setattr(Vae, "refuse_new", lambda *_: None)
        train(config, say=_silent)
    newest = RunPaths(tmp_path / "run").checkpoint(4)
    before = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    assert gen_dist.load(tmp_path / "run").sample(2).dtype == torch.uint8
    assert "psnr" in evaluate(tmp_path / "run", ["psnr"], announce=_silent).metrics
    shutil.rmtree(newest)
    assert train(config, say=_silent).finished
    assert {path.name: path.read_bytes() for path in newest.glob("*.safetensors")} == before


def _another_version(run: Path) -> None:
    """Make the weights of a run those of networks with another first layer of the decoder."""
    for checkpoint in checkpoint_paths(run):
        for file in (checkpoint / "networks.safetensors", checkpoint / "averaged.safetensors"):
            if file.exists():
                weights = load_file(file)
                weights["decoder.layers.0.weight"] = weights["decoder.layers.0.weight"][:, 1:].contiguous()
                save_file(weights, file)
        write_sums(checkpoint)


def test_a_run_of_other_networks_of_another_version_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = small_config("vae", steps=4, checkpoint_every=2, run_dir=str(run))
    train(config, say=_silent)
    shutil.rmtree(checkpoint_paths(run)[0])
    _another_version(run)
    shapes = r"decoder\.layers\.0\.weight is \[32, 4\] there and \[32, 5\] here"
    before = {path: path.read_bytes() for path in (*checkpoint_paths(run)[0].iterdir(), RunPaths(run).environment)}
    with pytest.raises(CheckpointError, match=rf"{shapes}; resume it with the version .* with --fresh$"):
        train(config, say=_silent)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(DamagedError, match=rf"{shapes}; .*, else use the version that environment\.json names$"):
        gen_dist.load(run)
    following = dataclasses.replace(config, start_from=str(run), run_dir=str(tmp_path / "next"))
    with pytest.raises(ConfigError, match=rf"{shapes}; use its preset, .* another version made it$"):
        train(following, say=_silent)
    assert train(config, fresh=True, say=_silent).finished
