"""Metrics measured while training are those of `gen-dist evaluate`, and the best of them is kept."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import gen_dist
from gen_dist.config import DataConfig, TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import ConfigError
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.records.checkpoint import checkpoint_paths, load, step_of
from gen_dist.training.run import _Run
from tests.conftest import REPOSITORY
from tests.support.runs import small_config, write_config
from tests.support.warm_python import in_two_ranks

NAMES = ("fid", "kid", "precision", "class_shares")


def quiet(_line: str) -> None:
    pass


def config_of(path: Path, objective: str = "gan", **changes: Any) -> TrainConfig:
    every: dict[str, Any] = {"checkpoint_every": 4, "evaluate_every": 2, "sample_every": 40, "log_every": 4}
    asked: dict[str, Any] = {"evaluate_metrics": NAMES, "evaluate_samples": 80, "keep_best": "fid", "data": "mnist5k"}
    return small_config(objective, **{"steps": 8, "run_dir": str(path), **every, **asked, **changes})


def measured(run: Path) -> dict[int, dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = {one["step"]: {name: value for name, value in one.items() if "evaluation/" in name} for one in records}
    return {step: values for step, values in found.items() if values}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    lines: list[str] = []
    path = tmp_path_factory.mktemp("measured") / "run"
    gen_dist.train(config_of(path), say=lines.append)
    return path, lines


@pytest.mark.slow
def test_figures_are_those_of_the_evaluator(run: tuple[Path, list[str]]) -> None:
    path, _ = run
    found = measured(path)
    assert list(found) == [2, 4, 6, 8]
    assert set(found[8]) == {f"evaluation/{name}_80" for name in NAMES}
    later = evaluate(path, NAMES, samples=80, announce=quiet)
    for name in NAMES:
        assert found[8][f"evaluation/{name}_80"] == pytest.approx(later.metrics[f"{name}_80"], rel=1e-5)
    assert found[2]["evaluation/fid_80"] != found[8]["evaluation/fid_80"]


@pytest.mark.slow
def test_their_time_is_told_once(run: tuple[Path, list[str]]) -> None:
    told = [line for line in run[1] if line.startswith("measuring fid kid precision class_shares took ")]
    assert len(told) == 1 and told[0].endswith("and will at each evaluation (--evaluate-every)")


@pytest.mark.slow
def test_the_best_by_a_measured_metric_is_kept(run: tuple[Path, list[str]]) -> None:
    values = {step: figures["evaluation/fid_80"] for step, figures in measured(run[0]).items()}
    best = min(values, key=lambda step: values[step])
    assert best in [step_of(path) for path in checkpoint_paths(run[0])]
    newest = load(checkpoint_paths(run[0])[0])[0].facts
    kept = {"metric": "evaluation/fid", "step": best, "value": values[best], "measured_on": [80, None]}
    assert newest["best"] == kept


def test_more_precision_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rising = iter([0.1, 0.4, 0.2, 0.3])
    monkeypatch.setattr(
        "gen_dist.training.measured.MeasuredMetrics.measure", lambda _self: {"evaluation/precision_80": next(rising)}
    )
    gen_dist.train(config_of(tmp_path / "run", keep_best="precision"), say=quiet)
    assert load(checkpoint_paths(tmp_path / "run")[0])[0].facts["best"]["step"] == 4


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(
    run: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _Run._record

    def killed(self: _Run, stopping: bool) -> None:
        record(self, stopping)
        if self.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            gen_dist.train(config_of(tmp_path / "run"), say=quiet)
    gen_dist.train(config_of(tmp_path / "run"), say=quiet)
    assert measured(tmp_path / "run") == measured(run[0])
    facts = [load(checkpoint_paths(path)[0])[0].facts["best"] for path in (tmp_path / "run", run[0])]
    assert facts[0] == facts[1]


@pytest.mark.slow
def test_measuring_changes_no_weight(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    plain = config_of(tmp_path / "run", evaluate_metrics=(), keep_best=None)
    gen_dist.train(plain, say=quiet)
    first, second = (load(checkpoint_paths(path)[0])[0].tensors for path in (run[0], tmp_path / "run"))
    assert first.keys() == second.keys()
    assert all(bool((one == second[group][name]).all()) for group in first for name, one in first[group].items())


@pytest.mark.slow
def test_what_cannot_be_measured_is_told_before_the_start(tmp_path: Path) -> None:
    for changes, message in (
        ({"evaluate_metrics": ("fud",), "keep_best": None}, "unknown metrics fud"),
        ({"keep_best": "class_shares"}, "no value of it is the best"),
        ({"evaluate_metrics": ("fid", "psnr"), "keep_best": "psnr"}, "keep_best psnr cannot be measured: a GAN"),
        ({"evaluate_metrics": ("nll",), "keep_best": None}, "evaluate_metrics nll takes minutes"),
    ):
        with pytest.raises(ConfigError, match=message):
            gen_dist.train(config_of(tmp_path / "run", **changes), say=quiet)
        assert not (tmp_path / "run" / "checkpoints").exists()
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"keep_best": "recall"}, r"keep_best 'recall' is not recorded .*evaluation/class_shares, or name it in"),
        ({"evaluate_samples": 3}, "evaluate_samples 3 is less than 10"),
    )
    for changes, message in bad:
        with pytest.raises(ConfigError, match=message):
            config_of(tmp_path / "run", **changes)


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    file = write_config(tmp_path / "config.json", config_of(tmp_path / "two"))
    done = subprocess.run(
        [*in_two_ranks(), "-m", "gen_dist.launch.train", "--config", str(file)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two, one = measured(tmp_path / "two"), measured(run[0])
    assert two.keys() == one.keys()
    for step, figures in one.items():
        for name, value in figures.items():
            assert two[step][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (step, name)


@pytest.mark.slow
def test_copies_are_told_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_dataset("mnist5k", "data", DataConfig(), quiet).train.images
    monkeypatch.setattr(Context, "_samples", lambda _self, first, last: torch.from_numpy(images[first:last]))
    lines: list[str] = []
    changes: dict[str, Any] = {"evaluate_metrics": ("memorization",), "keep_best": None, "steps": 2}
    gen_dist.train(config_of(tmp_path / "run", **changes), say=lines.append)
    assert [line for line in lines if line.startswith("warning: memorization: it copies training images: 100.0%")]


@pytest.mark.slow
def test_what_shows_to_be_unavailable_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the classes of images that are no digits: the first evaluation finds that out."""
    monkeypatch.setattr("gen_dist.evaluation.metrics.classes.LEAST_ACCURACY", 2.0)
    lines: list[str] = []
    changes: dict[str, Any] = {"evaluate_metrics": ("class_variation",), "keep_best": None, "steps": 4}
    gen_dist.train(config_of(tmp_path / "run", **changes), say=lines.append)
    told = [line for line in lines if line.startswith("evaluations have no class_variation_80: the digit network is")]
    assert len(told) == 1


@pytest.mark.slow
def test_metrics_of_reconstructions_are_measured_too(tmp_path: Path) -> None:
    names = tuple(name for name in measured_metrics() if name in ("psnr", "active_units", "fid"))
    gen_dist.train(config_of(tmp_path / "run", "vae", evaluate_metrics=names, steps=2), say=quiet)
    found = measured(tmp_path / "run")[2]
    assert set(found) == {"evaluation/psnr", "evaluation/active_units", "evaluation/fid_80"}
