"""Trackers get what a run logs, once, under one identity, and none can stop it."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

import gen_dist
from gen_dist.errors import ConfigError
from gen_dist.records.metrics_file import metrics_of_run, read_metrics
from gen_dist.records.trackers import base, tracker_kinds
from tests.support.trackers import make_tracker

FIGURES: dict[str, Any] = {
    "train/loss": 2.5,
    "samples/class_shares": [0.25, float("nan"), 0.75],
    "scores/real": [1.0] * 20,
}


class _Recording(base.RunTracker):
    """A tracker of a plug-in, which fails at a step."""

    def __init__(self, run: base.RunToTrack) -> None:
        self.run = run
        self.calls: list[Any] = []

    def log(self, step: int, values: base.Values) -> None:
        if step == 100:
            raise RuntimeError("its service\nis gone")
        self.calls.append((step, dict(values)))

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[_Recording]:
    """Trackers that were opened by the name `mine`."""
    tracker_kinds()
    monkeypatch.setattr(base._KINDS, "parts", dict(base._KINDS.parts))
    opened: list[_Recording] = []

    def open_one(run: base.RunToTrack) -> _Recording:
        opened.append(_Recording(run))
        return opened[-1]

    base.register("mine", open_one)
    return opened


def _events(directory: Path) -> Iterator[Any]:
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def _shown_by_tensorboard(directory: Path) -> Mapping[str, list[tuple[int, Any]]]:
    """Values by name; a start hides those of its own and later steps that stand before it."""
    shown: dict[str, list[tuple[int, Any]]] = {}
    for event in _events(directory):
        if event.HasField("session_log"):
            shown = {name: [one for one in values if one[0] < event.step] for name, values in shown.items()}
        for value in event.summary.value:
            shown.setdefault(value.tag, []).append((event.step, value))
    return shown


def _picture(path: Path) -> Path:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(path)
    return path


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path: Path) -> None:
    killed = make_tracker(tmp_path, track=("tensorboard",))
    for step in (50, 100, 150):
        killed.log(step, FIGURES)
    with make_tracker(tmp_path, start_step=100, track=("tensorboard",)) as resumed:
        resumed.log(150, FIGURES)
        resumed.pictures(150, {"samples": _picture(tmp_path / "one.png")})
    shown = _shown_by_tensorboard(tmp_path / "tensorboard")
    assert [(step, value.simple_value) for step, value in shown["train/loss"]] == [(50, 2.5), (100, 2.5), (150, 2.5)]
    bins = shown["samples/class_shares"][0][1].histo
    assert (list(bins.bucket_limit), list(bins.bucket)) == ([-0.5, 0.5, 1.5, 2.5], [0, 0.25, 0, 0.75])
    assert (shown["samples"][0][1].image.width, shown["samples"][0][1].image.height) == (5, 4)
    assert any("global_batch_size" in str(value) for _, value in shown["config/text_summary"])
    killed.close()


def test_mlflow_has_each_step_once_in_one_run_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("alembic")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tmp_path = tmp_path / "odd?b=c #%20"  # its database has a URL
    tmp_path.mkdir()
    killed = make_tracker(tmp_path, track=("mlflow",))
    for step in (50, 100, 150):
        killed.log(step, FIGURES)
    with make_tracker(tmp_path, start_step=100, track=("mlflow",)) as resumed:
        for step in (150, 200):
            resumed.log(step, FIGURES)
        resumed.pictures(150, {"samples": _picture(tmp_path / "one.png")})
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{quote(str(tmp_path))}/mlflow/runs.db")
    assert (tmp_path / "mlflow/runs.db").exists()
    (run,) = client.search_runs([client.get_experiment_by_name("gen_dist").experiment_id])
    assert [one.step for one in client.get_metric_history(run.info.run_id, "train/loss")] == [50, 100, 150, 200]
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert run.data.params["objective.kind"] == "vae"
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {"histograms", "pictures"}
    killed.close()


def test_a_tracker_that_fails_costs_one_warning(tmp_path: Path, recording: list[_Recording]) -> None:
    screen = io.StringIO()
    with make_tracker(tmp_path, stream=screen, track=("mine",)) as run:
        for step in (50, 100, 150):
            run.log(step, {"train/loss": 1.0})
    warnings = [line for line in screen.getvalue().splitlines() if "warning" in line]
    assert warnings == ["warning: mine failed, the run goes on without it: its service is gone"]
    assert [call[0] for call in recording[0].calls] == [50]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_tracker_is_told_how_the_run_ended(tmp_path: Path, recording: list[_Recording]) -> None:
    with pytest.raises(KeyError), make_tracker(tmp_path, track=("mine",)):
        raise KeyError
    assert recording[0].calls == [1]
    assert (recording[0].run.run_id, recording[0].run.start_step) == ("abc12345", 0)


def test_unknown_trackers_are_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'tensorbord'; there are wandb, mlflow, tensorboard"):
        make_tracker(tmp_path, track=("tensorbord",))
    with pytest.raises(ConfigError, match="is registered already, by gen_dist"):
        base.register("wandb", _Recording)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("tracker", "module", "package"),
    [
        ("tensorboard", "tensorboardX", "tensorboardX"),
        ("mlflow", "mlflow.tracking", "mlflow-skinny sqlalchemy alembic"),
    ],
)
def test_a_package_that_is_not_installed_is_one_line(
    tracker: str,
    module: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recording: list[_Recording],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"--track {tracker} needs the package .*`pip install {package}`"):
        make_tracker(tmp_path, track=("mine", tracker))
    assert recording[0].calls == [1]  # what was opened before is closed
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_callback_gets_what_metrics_jsonl_has(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "steps": 4,
        "global_batch_size": 16,
        "hidden_sizes": (8,),
        "latent_dim": 3,
        "log_every": 2,
    }
    config = gen_dist.preset("vae-mnist").with_options(**options, device="cpu", run_dir=tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
    config = config.with_options(cache_dir=tmp_path / "cache")
    seen: list[dict[str, Any]] = []
    outcome = gen_dist.train(
        config, data=images, say=lambda _line: None, on_log=lambda step, values: seen.append({"step": step, **values})
    )
    assert seen == metrics_of_run(outcome.run_path)
