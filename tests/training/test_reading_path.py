"""The files that a reader opens to follow one image from the command line to the moved weights."""

from __future__ import annotations

import inspect
import runpy
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

from gen_dist.training.run import _Run
from gen_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY

MOST_FILES = 18
MOST_LINES = 250


def test_a_step_takes_few_files_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[int, set[str]] = {}
    run_step = Trainer.run_step

    def watched_step(trainer: Trainer, step: int) -> dict[str, Tensor]:
        frame: FrameType | None = sys._getframe()
        found = read[step] = set()
        while frame:
            found.add(frame.f_code.co_filename)
            frame = frame.f_back

        def note(frame: FrameType, event: str, _value: Any) -> None:
            if event == "call":
                found.add(frame.f_code.co_filename)

        previous = sys.getprofile()
        sys.setprofile(note)
        try:
            return run_step(trainer, step)
        finally:
            sys.setprofile(previous)

    monkeypatch.setattr(Trainer, "run_step", watched_step)
    words = ["vae-mnist", "--steps", "3", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "launch/train.py"), run_name="__main__")
    assert stop.value.code == 0

    # The first step also draws the order of its epoch and makes the optimizer's state.
    files = sorted(_ours(read[1]))
    assert "launch/train.py" in files
    assert "gen_dist/training/optimizers.py" in files
    assert len(files) <= MOST_FILES, "\n".join(files)


@pytest.mark.parametrize("part", [Trainer, _Run], ids=["trainer", "loop"])
def test_the_trainer_and_the_loop_are_short_and_know_no_mode_of_parallelism(part: type) -> None:
    code = inspect.getsource(part)
    assert len(code.splitlines()) <= MOST_LINES
    modes = ("shards", "split_state", "gloo", "nccl", "ddp", "Reduction")
    assert not [word for word in modes if word in code]


def _ours(names: set[str]) -> set[str]:
    """Paths in the repository of those files that belong to the product."""
    paths = (Path(name).resolve() for name in names if not name.startswith("<"))
    relative = {path.relative_to(REPOSITORY).as_posix() for path in paths if path.is_relative_to(REPOSITORY)}
    return {path for path in relative if path.startswith(("gen_dist/", "kernels/", "launch/"))}
