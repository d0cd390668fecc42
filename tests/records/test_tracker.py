"""The record of a run is whole, valid and exact after any kill."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gen_dist.errors import CheckpointError
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
from tests.support.trackers import make_tracker
from tests.support.warm_python import warm_python


def test_each_log_is_one_line_that_is_on_disk_at_once(tmp_path):
    with make_tracker(tmp_path) as run:
        run.log(50, {"train/loss": 540.25, "train/kl": 1.5})
        run.log(100, {"train/loss": 220.0, "test/loss": 221.0})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert list(first) == ["step", "images_seen", "images_per_second", "train/loss", "train/kl"]
    assert (first["step"], first["images_seen"], first["train/loss"], first["train/kl"]) == (50, 6400, 540.25, 1.5)
    assert (second["step"], second["images_seen"], second["test/loss"]) == (100, 12_800, 221.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [first, second]


def test_floats_are_recorded_exactly(tmp_path):
    with make_tracker(tmp_path) as run:
        run.log(1, {"train/loss": 0.1 + 0.2})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 0.1 + 0.2


def test_infinite_scalars_are_recorded_as_null(tmp_path):
    with make_tracker(tmp_path) as run:
        run.log(1, {"train/loss": float("nan"), "train/kl": float("inf"), "train/nll": -float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [record[f"train/{name}"] for name in ("loss", "kl", "nll")] == [None, None, None]


def test_lists_are_recorded_with_null_for_infinite_numbers(tmp_path):
    with make_tracker(tmp_path) as run:
        run.log(1, {"samples/class_shares": [0.25, 0.75], "scores/real": (1, float("nan"), float("inf")), "empty": []})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record == {
        "step": 1,
        "images_seen": 128,
        "images_per_second": record["images_per_second"],
        "samples/class_shares": [0.25, 0.75],
        "scores/real": [1.0, None, None],
        "empty": [],
    }


def test_throughput_counts_neither_pauses_nor_the_first_step(tmp_path, monkeypatch):
    passed = [100.0]
    monkeypatch.setattr("gen_dist.records.training_clock.time", SimpleNamespace(perf_counter=lambda: passed[0]))

    def take(seconds):
        passed[0] += seconds

    with make_tracker(tmp_path) as run:
        take(0.25)  # in place of compiling
        run.advance(1)
        take(0.125)
        with run.pause(), run.pause():
            take(0.5)
            assert run.training_seconds == 0.375
        assert run.training_seconds == 0.375
        run.log(11, {"train/loss": 1.0})
        run.log(11, {"test/loss": 1.0})
    timed, without_steps = read_metrics(tmp_path / "metrics.jsonl")
    assert timed["images_per_second"] == 10 * 128 / 0.125
    assert "images_per_second" not in without_steps


def test_resuming_drops_torn_lines_and_later_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with make_tracker(tmp_path) as run:
        for step in range(50, 301, 50):
            run.log(step, {"train/loss": float(step)})
    whole = path.read_text()
    path.write_text(whole + '{"step": 350, "images_se')
    with make_tracker(tmp_path, start_step=200) as run:
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])
        run.log(250, {"train/loss": -250.0})
    assert [record["step"] for record in read_metrics(path)] == [50, 100, 150, 200, 250]
    assert read_metrics(path)[-1]["train/loss"] == -250.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_starts_the_file_afresh(tmp_path):
    for loss in (1.0, 2.0):
        with make_tracker(tmp_path / "run") as run:
            run.log(50, {"train/loss": loss})
    assert [record["train/loss"] for record in read_metrics(tmp_path / "run/metrics.jsonl")] == [2.0]


def test_resuming_without_a_file_goes_on(tmp_path):
    with make_tracker(tmp_path, start_step=200) as run:
        run.log(250, {"train/loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [250]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_file_torn_in_its_last_line_is_read_up_to_there(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0 / step}) + "\n" for step in (1, 2, 3)]
    text = "".join(lines)
    path.write_text(text[:-cut])
    left = 3 if cut == 1 else 2  # the first cut removes only the line end
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3][:left]
    with make_tracker(tmp_path, start_step=3) as run:
        run.log(4, {})
    assert [record["step"] for record in read_metrics(path)] == [*[1, 2, 3][:left], 4]


@pytest.mark.parametrize("line", ['{"step": 2, "tra', "[]", "{}", "", "\0\0\0"])
def test_a_damaged_line_before_the_last_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (lambda: read_metrics(path), lambda: make_tracker(tmp_path, start_step=3)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is not a record") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*metrics\.jsonl: No such file or directory$"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_killed_process_loses_no_line_that_it_logged(tmp_path):
    code = (
        "import sys, io, pathlib; from gen_dist.config import TrainConfig\n"
        "from gen_dist.records.tracker import Tracker\n"
        f"run = Tracker(pathlib.Path({str(tmp_path)!r}), TrainConfig(), start_step=0, images_per_step=1, wandb_id='a',"
        " stream=io.StringIO())\n"
        "for step in range(1, 10**9):\n"
        "    run.log(step, {'train/loss': 1.0 / step}); print(step, flush=True)\n"
    )
    process = subprocess.Popen([*warm_python(), "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read().split("\n")
    process.wait()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= 200 + len([line for line in said[:-1] if line])


def test_a_full_disk_is_one_line_that_says_how_to_go_on(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(CheckpointError, match="No space left on device; free some space"),
        make_tracker(tmp_path) as run,
    ):
        run.log(1, {"train/loss": 1.0})


def test_logging_costs_little(tmp_path):
    scalars = {f"train/{name}": 1.0 for name in ("loss", "nll", "kl", "learning_rate")}
    with make_tracker(tmp_path, steps=10**9) as run:
        seconds = []
        for step in range(1, 501):
            started = time.thread_time()  # without the time of other programs
            run.log(step, scalars)
            seconds.append(time.thread_time() - started)
        advance_seconds = []
        for block in range(100):
            started = time.thread_time()
            for step in range(100):
                run.advance(501 + 100 * block + step)
            advance_seconds.append((time.thread_time() - started) / 100)
    assert sorted(seconds)[250] < 200e-6
    assert sorted(advance_seconds)[50] < 5e-6
