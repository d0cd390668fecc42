"""Commands that read a run while it trains, and evaluations at once, get whole results and lose none."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gen_dist import commands
from gen_dist.errors import DamagedError, UnreadableError
from gen_dist.evaluation import record
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.record import UnwrittenError, add_evaluation, read_evaluation
from gen_dist.files import file_lock
from gen_dist.inference import loading
from gen_dist.inference.export import export
from gen_dist.inference.loading import load
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import Checkpoint, checkpoint_paths, load_newest, newest, save
from gen_dist.reports import write_report
from gen_dist.reports.run_record import read_run, with_evaluation
from tests.records.test_run_mark import OLD_RUN, _config


def _silent(_line: str) -> None:
    pass


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    return tmp_path / "run"


def _at_step(run: Path, step: int) -> Checkpoint:
    checkpoint, _ = checkpoints.load(checkpoint_paths(run)[0])
    return dataclasses.replace(checkpoint, step=step)


def test_readers_of_a_run_that_keeps_one_checkpoint_always_find_one(run: Path, tmp_path: Path) -> None:
    first, done, said = _at_step(run, 12), threading.Event(), list[str]()

    def train() -> None:
        for step in range(13, 10_000):
            if done.is_set():
                return
            marked = {"steps": torch.tensor([step]), **first.tensors["networks"]}
            tensors = {**first.tensors, "optimizer-x": {"steps": marked["steps"]}}
            save(run, dataclasses.replace(first, step=step, tensors=tensors), _config(run), keep=1)

    writer = threading.Thread(target=train)
    writer.start()
    try:
        steps, until = list[int](), time.monotonic() + 60
        while len(steps) < 10 or (steps[-1] == 12 and time.monotonic() < until):  # the writer may be slow to begin
            found = load_newest(run, said.append)
            assert found is not None
            assert found[0].step == 12 or found[0].tensors["optimizer-x"]["steps"].item() == found[0].step
            steps.append(found[0].step)
            assert read_run(run).step >= found[0].step
        load(run, announce=said.append).sample(2)
        export(run, "safetensors", tmp_path / "export", announce=_silent)
        write_report(tmp_path / "report.html", [read_run(run)], [None])
    finally:
        done.set()
        writer.join()
    assert steps == sorted(steps) and steps[-1] > steps[0]
    assert not said


def test_a_checkpoint_that_goes_while_it_is_read_is_looked_for_again(run: Path) -> None:
    later = [_at_step(run, step) for step in (13, 14, 15)]

    def read(path: Path) -> int:
        if later:
            save(run, later.pop(0), _config(run), keep=1)
        return checkpoints.load(path)[0].step

    assert newest(run, read, _silent) == 15


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_damaged(run: Path) -> None:
    """A run that resumed from an older checkpoint writes the same step again."""
    again = [_at_step(run, 12)]

    def read(path: Path) -> int:
        if again:
            save(run, again.pop(), _config(run), keep=1)
            raise DamagedError("state.json has another digest")
        return checkpoints.load(path)[0].step

    assert newest(run, read, _silent) == 12


def test_checkpoints_that_never_hold_still_are_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_LOOKS", 3)
    content = _at_step(run, 12)

    def read(path: Path) -> int:
        save(run, dataclasses.replace(content, step=checkpoints.step_of(path) + 1), _config(run), keep=1)
        return checkpoints.load(path)[0].step

    with pytest.raises(UnreadableError, match=r"replaced faster than they can be read; .*--keep-checkpoints 2"):
        newest(run, read, _silent)


def test_evaluations_at_once_lose_no_figure(run: Path) -> None:
    before = read_evaluation(run)
    assert before is not None

    def add(place: int) -> None:
        add_evaluation(run, dataclasses.replace(before, metrics={f"figure_{place}": float(place)}), _silent)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    after = read_evaluation(run)
    assert after is not None
    assert after.metrics == before.metrics | {f"figure_{place}": float(place) for place in range(24)}


def test_figures_that_come_while_one_evaluates_are_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_evaluation(run)
    assert before is not None

    def another_comes_first(*args: object, **kwargs: object) -> object:
        monkeypatch.setattr(record, "file_lock", file_lock)
        add_evaluation(run, dataclasses.replace(before, metrics={"fid_10": 3.0}), _silent)
        return file_lock(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(record, "file_lock", another_comes_first)
    found = evaluate(run, ["sharpness"], samples=10, announce=_silent)
    assert found.metrics["fid_10"] == 3.0 and "sharpness_10" in found.metrics


def test_processes_evaluate_the_main_processs_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, _at_step(run, 13), _config(run), keep=2)
    monkeypatch.setattr(loading, "from_main", lambda step, processes: 12)
    assert evaluate(run, ["sharpness"], samples=10, announce=_silent).checkpoint_step == 12
    monkeypatch.setattr(loading, "from_main", lambda step, processes: 11)
    with pytest.raises(DamagedError, match=r"step_00000011 is gone: was it replaced by a newer one\?"):
        evaluate(run, ["sharpness"], samples=10, announce=_silent)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_figures_that_cannot_be_written_are_printed(
    code: int, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "refused by a test")

    monkeypatch.setattr(record, "write_object", refuse)
    before = (run / "evaluation.json").read_bytes()
    with pytest.raises(UnwrittenError, match=r"evaluation.json cannot be written: refused by a test; fix that"):
        commands.evaluate(run, ("sharpness", "diversity"), samples=10)
    printed = capsys.readouterr().out
    assert "sharpness_10 " in printed and "diversity_10 " in printed
    assert (run / "evaluation.json").read_bytes() == before


def test_a_report_has_the_figures_that_cannot_be_written(run: Path) -> None:
    evaluation = read_evaluation(run)
    (run / "evaluation.json").unlink()
    read = read_run(run)
    assert read.evaluation is None
    assert with_evaluation(read, evaluation).evaluation == evaluation
    save(run, _at_step(run, 13), _config(run), keep=1)  # the run has gone on meanwhile
    found = with_evaluation(read, evaluation)
    assert (found.step, found.evaluation) == (12, evaluation)
