"""Runs that a supervisor starts, stops and restarts."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, TakenOverError
from gen_dist.parallel.processes import start_processes
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from gen_dist.records.run_directory import hold
from gen_dist.training.run import train
from gen_dist.training.supervisor import Supervisor
from tests.support.runs import small_config

Records = list[tuple[int, Mapping[str, float | Sequence[float]], Path | None]]


def _config(path: Path, **changes: object) -> TrainConfig:
    return small_config("vae", steps=12, checkpoint_every=4, evaluate_every=6, run_dir=str(path), **changes)


def _supervisor(name: str, records: Records, stop: threading.Event | None = None, stop_at: int = 0) -> Supervisor:
    event = stop or threading.Event()

    def recorded(step: int, metrics: Mapping[str, float | Sequence[float]], saved: Path | None) -> None:
        records.append((step, metrics, saved))
        if step == stop_at:
            event.set()

    return Supervisor(name, event, recorded)


def _train(config: TrainConfig, supervisor: Supervisor, fresh: bool = False) -> bool:
    return train(config, fresh=fresh, say=lambda _line: None, supervisor=supervisor).finished


def test_a_supervisor_follows_a_run_and_can_stop_it(tmp_path: Path) -> None:
    records: Records = []
    assert not _train(_config(tmp_path / "run"), _supervisor("first", records, stop_at=6))
    assert [(step, saved and saved.name) for step, _, saved in records] == [
        (4, "step_00000004"),
        (6, None),
        (7, "step_00000007"),
    ]
    assert "test/negative_elbo" in records[1][1] and "test/negative_elbo" not in records[0][1]
    assert _train(_config(tmp_path / "run"), _supervisor("first", records))
    assert [step for step, *_ in records[3:]] == [8, 12]
    assert _train(_config(tmp_path / "alone"), _supervisor("alone", []))
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "run"))
    assert [record["train/loss"] for record in parts] == [record["train/loss"] for record in whole]


def test_a_run_started_again_by_its_supervisor_is_fresh_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    _train(_config(path, seed=1), _supervisor("old", []))
    records: Records = []
    fresh = _config(path)
    _train(fresh, _supervisor("new", records, stop_at=4), fresh=True)
    assert [step for step, *_ in records] == [4, 5]
    _train(fresh, _supervisor("new", records), fresh=True)
    assert [step for step, *_ in records[2:]] == [6, 8, 12]


def test_a_fresh_run_killed_before_removal_is_still_fresh(tmp_path: Path) -> None:
    path = tmp_path / "run"
    old, new = _config(path, seed=1), _config(path)
    _train(old, _supervisor("old", []))
    processes = start_processes(new)
    with hold(path, new, processes, True, "new") as holding:
        assert holding.fresh  # the process is killed here
    with hold(path, new, processes, True, "new") as holding:
        assert holding.fresh
        assert checkpoint_paths(path)
        holding.begin()
        assert not checkpoint_paths(path)
    with hold(path, new, processes, True, "new") as holding:
        assert not holding.fresh


def test_only_the_same_launch_takes_a_run_directory_over(tmp_path: Path) -> None:
    config = _config(tmp_path)
    processes = start_processes(config)
    with hold(tmp_path, config, processes, False, "launch") as cut_off:
        cut_off.begin()
        cut_off.assert_held()
        with pytest.raises(ConfigError, match="another process is training"):
            hold(tmp_path, config, processes, False, "another launch").__enter__()
        with pytest.raises(ConfigError, match="another process is training"):
            hold(tmp_path, config, processes, False).__enter__()
        cut_off.assert_held()
        with hold(tmp_path, config, processes, False, "launch") as successor:
            cut_off.assert_held()  # the successor may still be refused
            successor.begin()
            successor.assert_held()
            with pytest.raises(TakenOverError, match="this one stops"):
                cut_off.assert_held()


def test_a_run_that_was_taken_over_writes_no_checkpoint(tmp_path: Path) -> None:
    config = _config(tmp_path / "run")
    processes = start_processes(config)
    successors = []

    def taken_over(step: int, metrics: object, saved: Path | None) -> None:
        successor = hold(tmp_path / "run", config, processes, False, "launch")
        successors.append(successor)
        successor.__enter__().begin()

    supervisor = replace(_supervisor("launch", []), recorded=taken_over)
    with pytest.raises(TakenOverError):
        _train(config, supervisor)
    assert len(successors) == 1
    assert [path.name for path in checkpoint_paths(tmp_path / "run")] == ["step_00000004"]
