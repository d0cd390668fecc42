"""--keep-best: the checkpoint of the best evaluation stays beside the newest ones, through kills and resumes."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gen_dist
from gen_dist.commands import sample
from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError, ConfigError, UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.record import read_evaluation
from gen_dist.inference.export import export
from gen_dist.records.best import Best, best_of_facts, better, measured_on
from gen_dist.records.checkpoint import checkpoint_paths, keep_newest, load, step_of
from gen_dist.training.run import _Run
from tests.support.runs import small_config

METRIC = "test/kl"


def quiet(_line: str) -> None:
    pass


def config_of(path: Path, **changes: Any) -> TrainConfig:
    """A run whose first evaluation has the least KL divergence: training raises it."""
    every: dict[str, Any] = {"checkpoint_every": 10, "evaluate_every": 5, "sample_every": 40}
    return small_config("vae", **{"steps": 40, "run_dir": str(path), "keep_best": "kl", **every, **changes})


def values_of(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {one["step"]: one[METRIC] for one in records if METRIC in one}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gen_dist.train(config_of(tmp_path_factory.mktemp("best") / "run"), say=quiet).run_path


def files_of(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for checkpoint in checkpoint_paths(run)
        for path in checkpoint.glob("*.safetensors")
    }


def test_the_best_stays_beside_the_newest_two(whole: Path) -> None:
    values = values_of(whole)
    best = min(values, key=lambda step: values[step])
    assert best < 30, "the test needs a run that becomes worse"
    assert [step_of(path) for path in checkpoint_paths(whole)] == [40, 30, best]
    for path in checkpoint_paths(whole):
        assert load(path)[0].facts["best"] == {"metric": METRIC, "step": best, "value": values[best]}


def test_every_command_takes_the_best_checkpoint(whole: Path, tmp_path: Path) -> None:
    *_, best = checkpoint_paths(whole)
    expected = gen_dist.load(best).sample(4)
    assert torch.equal(gen_dist.load(whole, checkpoint="best").sample(4), expected)
    assert not torch.equal(gen_dist.load(whole).sample(4), expected)
    export(whole, "safetensors", tmp_path / "export", announce=quiet, checkpoint="best")
    assert torch.equal(gen_dist.load(tmp_path / "export").sample(4), expected)
    sample(whole, count=4, out=tmp_path / "best.png", checkpoint="best")
    sample(best, count=4, out=tmp_path / "same.png")
    for one in (best, tmp_path / "export"):
        with pytest.raises(CheckpointError, match="holds one checkpoint: leave out --checkpoint best"):
            gen_dist.load(one, checkpoint="best")
    assert (tmp_path / "best.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    found = evaluate(run, ["sharpness"], announce=quiet, checkpoint="best")
    assert found.checkpoint_step == step_of(best)


@pytest.mark.parametrize("killed_at", [5, 10, 20, 35])
def test_a_killed_run_has_the_checkpoints_of_one_that_was_not(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    class Killed(Exception):
        pass

    save = _Run._save

    def dying(run: _Run) -> Path | None:
        found = save(run)
        if run.step == killed_at:
            raise Killed
        return found

    config = config_of(tmp_path / "run")
    monkeypatch.setattr(_Run, "_save", dying)
    with contextlib.suppress(Killed):
        gen_dist.train(config, say=quiet)
    monkeypatch.undo()
    gen_dist.train(config, say=quiet)
    assert files_of(tmp_path / "run") == files_of(whole)


def test_a_run_that_ended_keeps_its_best_when_started_again(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = checkpoint_paths(run)
    gen_dist.train(config_of(run), say=quiet)
    assert checkpoint_paths(run) == before
    # Nothing is removed if nobody can tell which one is the best.
    (before[0] / "state.json").write_text("{")
    keep_newest(run, 40, 1)
    assert checkpoint_paths(run) == before


def test_a_resume_without_the_option_keeps_the_best(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(checkpoint_paths(run)[0])
    gen_dist.train(config_of(run, keep_best=None), say=quiet)
    assert files_of(run) == files_of(whole)
    assert load(checkpoint_paths(run)[0])[0].facts["best"] == load(checkpoint_paths(whole)[0])[0].facts["best"]


def test_figures_of_the_best_leave_those_of_the_newest(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = evaluate(run, ["sharpness"], samples=20, announce=quiet)
    best = evaluate(run, ["sharpness"], samples=20, announce=quiet, checkpoint="best")
    assert (
        evaluate(run, ["diversity"], samples=20, announce=quiet, checkpoint="best").metrics.items()
        > best.metrics.items()
    )
    assert read_evaluation(run) == newest and newest.checkpoint_step == 40
    found = read_evaluation(run, "best")
    assert found and found.checkpoint_step == best.checkpoint_step == step_of(checkpoint_paths(run)[-1])
    for which, step in (("newest", 40), ("best", best.checkpoint_step)):
        path = export(run, "safetensors", tmp_path / which, announce=quiet, checkpoint=which)  # type: ignore[arg-type]
        assert f"step {step}" in (card := (path / "README.md").read_text()) and "evaluation of the test split" in card
    gen_dist.train(config_of(run, steps=5), say=quiet, fresh=True)
    assert not (run / "evaluation_best.json").exists()


def test_more_or_less_is_better_and_the_first_of_equals() -> None:
    best = Best(METRIC, 5, 2.0)
    assert better(None, best) is best
    assert better(best, Best(METRIC, 10, 2.0)) is best
    assert better(best, Best(METRIC, 10, float("nan"))) is best
    assert better(best, less := Best(METRIC, 10, 1.5)) is less
    more = Best("samples/diversity_ratio", 5, 0.5)
    assert better(more, most := more._replace(value=0.6)) is most
    assert better(more, more._replace(value=0.4)) is more
    assert better(None, Best(METRIC, 5, float("inf"))) is None


def test_a_best_of_other_samples_is_refused(tmp_path: Path) -> None:
    asked = {"evaluate_metrics": ("fid",), "evaluate_samples": 80, "keep_best": "fid"}
    config = config_of(tmp_path / "run", **asked)
    facts = json.loads(
        json.dumps({"best": Best("evaluation/fid", 5, 2.0, measured_on(config, "evaluation/fid"))._asdict()})
    )
    assert best_of_facts(config, facts, config) == Best("evaluation/fid", 5, 2.0, (80, None))
    for change in ({"evaluate_samples": 90}, {"evaluate_features": "efficientnet-lite0"}):
        with pytest.raises(ConfigError, match="of step 5, was measured on 80 samples with features None, and others"):
            best_of_facts(config_of(tmp_path / "run", **{**asked, **change}), facts, config)
        unasked = best_of_facts(config_of(tmp_path / "run", **{**change, "keep_best": None}), facts, config)
        assert unasked and unasked.measured_on == (80, None)
    facts["best"].pop("measured_on")  # as in old checkpoints, whose config says it
    with pytest.raises(ConfigError, match="of step 5, was measured on 80 samples"):
        best_of_facts(config_of(tmp_path / "run", **{**asked, "evaluate_samples": 90}), facts, config)
    unasked = best_of_facts(config_of(tmp_path / "run", evaluate_samples=90, keep_best=None), facts, config)
    assert unasked and unasked.measured_on == (80, None)  # which later checkpoints record


def test_a_metric_that_evaluations_lack_is_told_and_keeps_none(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", steps=5, keep_best="samples/label_accuracy")
    lines: list[str] = []
    outcome = gen_dist.train(config, say=lines.append)
    assert any("evaluations have no samples/label_accuracy" in line for line in lines)
    with pytest.raises(UserError, match="checkpoint 'last' is not one of newest, best"):
        gen_dist.load(outcome.run_path, checkpoint="last")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="trained without --keep-best, or its evaluations lack that metric"):
        gen_dist.load(outcome.run_path, checkpoint="best")
