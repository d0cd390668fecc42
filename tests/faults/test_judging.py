"""Ends of commands that met a fault are judged: what is lost, and what differs without a word."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest

from tests.faults.commands import Commands, Ended, Fault, Kept
from tests.faults.inject import Undisturbed, faults_of, losses, problems_of
from tests.faults.kill import SHARED_MEMORY, left_in_shared_memory, shared_memory
from tests.faults.scenarios import Scenario

BEFORE = Kept({"step_2": True, "step_4": True}, {"fid", "nll"})
LINE = "step 4/4  99 images/s\n"
FILES = {"out/grid.png": "a", "cache/reference": "a"}
FAULT = Fault("read", 1, 5)


class Played:
    """Commands whose ends and files are given."""

    scenarios = {name: Scenario([name], "done") for name in ("sample", "train", "data")}  # noqa: RUF012

    def __init__(self, line: str, files: dict[str, str], code: int = 0) -> None:
        self._line, self._files, self._code = line, files, code
        self._starts = 0

    def run(self, *_: Any, **__: Any) -> Ended:
        self._starts += 1
        return Ended(self._code if self._starts == 1 else 0, "", self._line, {}, "/run/state.json", b"")

    def contents(self) -> dict[str, str]:
        return self._files if self._starts == 1 else FILES  # the second start mends all

    def printed(self, ended: Ended) -> str:
        return ended.out

    def kept(self) -> Kept:
        return BEFORE

    def exact(self) -> dict[str, str]:
        return {}

    def restore(self, _state: str) -> None:
        self._starts = 0


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (BEFORE, []),
        (Kept({"step_4": True, "step_6": True}, {"fid", "nll", "kid"}), []),
        (Kept({"step_4": True, "step_6": False}, BEFORE.measured), ["is not whole"]),
        (Kept({"step_2": True}, BEFORE.measured), ["a checkpoint is lost"]),
        (Kept(BEFORE.checkpoints, {"kid", "nll"}), ["figures of an evaluation are lost: ['fid']"]),
    ],
)
def test_what_is_lost_is_a_problem(after: Kept, expected: list[str]) -> None:
    found = losses(BEFORE, after, "resume")
    assert len(found) == len(expected)
    assert all(part in one for part, one in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        (LINE, FILES, []),
        ("step 4/4  98 images/s\n", {**FILES, "out/grid.png": "b"}, ["in silence, out/grid.png is another"]),
        (LINE + "step_4 is damaged\n", {**FILES, "out/grid.png": "b"}, []),
        (LINE, {**FILES, "cache/reference": "b"}, []),
    ],
    ids=["the same", "in silence", "told", "a cache"],
)
def test_another_result_needs_a_line(line: str, files: dict[str, str], expected: list[str]) -> None:
    usual = Undisturbed(Ended(0, "", LINE, {}, "", b""), [], FILES, FILES)
    commands = cast(Commands, Played(line, files))
    assert problems_of(commands, "sample", FAULT, usual, {})[1] == expected


@pytest.mark.parametrize(
    ("command", "code", "is_right"),
    [("train", 0, True), ("train", 2, False), ("sample", 0, False), ("data", 0, False), ("data", 2, False)],
)
def test_only_a_finished_training_may_leave_the_cache_with_less(command: str, code: int, is_right: bool) -> None:
    line = "error: the disk is full\n" if code else "the cache could not be written\n"
    expected = FILES | {"cache/more": "a"}
    usual = Undisturbed(Ended(0, "", LINE, {}, "", b""), [], expected, expected)
    commands = cast(Commands, Played(line, FILES, code))
    found = problems_of(commands, command, FAULT, usual, {})[1]
    assert found == ([] if is_right else ["cache/more: a -> absent"])


def test_a_fault_names_which_later_calls_fail() -> None:
    found = [fault for named in ("read:EIO", "read:EIO:file") for fault in faults_of({"read": 9}, named, 3)]
    assert [(fault.nth, fault.later) for fault in found] == [
        (nth, later) for later in ("", "file") for nth in (1, 4, 7)
    ]


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="the system has no /dev/shm")
def test_shared_memory_that_a_program_has_is_not_left_behind() -> None:
    before = shared_memory()
    with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY, prefix="gen_dist-judged-", delete=False) as file:
        name = Path(file.name).name
        file.write(bytes(4096))
        file.flush()
        try:
            assert name not in left_in_shared_memory(before)
            mapped = mmap.mmap(file.fileno(), 4096)
            file.close()
            assert name not in left_in_shared_memory(before)
            mapped.close()
            assert name in left_in_shared_memory(before)
        finally:
            os.unlink(file.name)
    assert name not in left_in_shared_memory(before)
