"""A crash of the machine is judged by the order of writes, syncs, removals and renames."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.durable import problems_of_events

RUN = "run/checkpoints"
SAVED = (
    *(f"W1 {RUN}/.partial/.tmpX", f"S1 {RUN}/.partial/averaged", f"S9 {RUN}/.partial"),
    *(f"R {RUN}/.partial {RUN}/step_2", f"S8 {RUN}", f"U {RUN}/step_1/averaged"),
)
"""Events of a checkpoint that is saved before an older one is removed."""


def _problems(*events: str) -> list[str]:
    words = [event.split(" ") for event in events]
    text = "".join(kind + "".join(f"/root/{path}\0" for path in paths) for kind, *paths in words)
    return problems_of_events(text.encode(), Path("/root"))


def test_a_checkpoint_that_is_synced_in_order_survives_a_crash() -> None:
    assert not _problems(*SAVED)


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        (1, f"{RUN}/step_2 is in place before these are on disk: {RUN}/.partial/.tmpX"),
        (4, f"{RUN}/step_1/averaged is removed before {RUN}/step_2 is sure to stay"),
    ],
)
def test_a_sync_that_is_left_out_is_a_problem(left_out: int, expected: str) -> None:
    assert _problems(*SAVED[:left_out], *SAVED[left_out + 1 :]) == [expected]


def test_a_file_that_is_written_after_its_sync_is_a_problem() -> None:
    assert _problems("W1 a/new", "S1 a/new", "W1 a/new", "R a/new a/old") == [
        "a/old is in place before these are on disk: a/new"
    ]
    assert not _problems("W1 a/new", "U a/new")


def test_only_the_log_may_be_written_in_place() -> None:
    assert _problems(f"W1 {RUN}/step_2/state.json", f"S1 {RUN}/step_2/state.json", "W2 run/metrics.jsonl") == [
        f"{RUN}/step_2/state.json is written in place"
    ]


PROGRAM = """
import ctypes, mmap, os, sys
library = ctypes.CDLL(None)
library.fail_call(15, ctypes.c_long(0), 0, 0, 0, os.fsencode(sys.argv[1]))
here = lambda name: os.path.join(sys.argv[1], name)
file = os.open(here("a"), os.O_RDWR | os.O_CREAT)
os.write(file, bytes(8))
os.fsync(file)
mmap.mmap(file, 8)[0] = 1
os.rename(here("a"), here("b"))
os.unlink(here("b"))
library.events.restype, library.bytes_of_events.restype = ctypes.c_void_p, ctypes.c_long
sys.stdout.write(ctypes.string_at(library.events(), library.bytes_of_events()).decode())
"""


def test_writes_syncs_renames_and_removals_are_noted(failing_calls: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, tmp_path],
        env={**os.environ, "LD_PRELOAD": str(failing_calls)},
        capture_output=True,
        text=True,
        check=True,
    )
    events = [word.replace(f"{tmp_path}/", " ") for word in ended.stdout.split("\0")]
    assert ["".join(filter(lambda one: not one.isdigit(), event)) for event in events] == [
        *("W a", "S a", "W a", "R a", " b", "U b", "")
    ]
    assert problems_of_events(ended.stdout.encode(), tmp_path) == ["b is in place before these are on disk: a"]


READER = """
import ctypes, errno, os, sys
library = ctypes.CDLL(None)
library.fail_call(5, ctypes.c_long(2), errno.EIO, int(sys.argv[2]), 0, os.fsencode(sys.argv[1]))
def is_read(name):
    file = os.open(os.path.join(sys.argv[1], name), os.O_RDONLY)
    try:
        return os.read(file, 1) == b"x"
    except OSError as error:
        assert error.errno == errno.EIO
        return False
print([is_read(name) for name in "abbab"])
"""


@pytest.mark.parametrize(
    ("later", "expected"),
    [("0", [1, 0, 1, 1, 1]), ("1", [1, 0, 0, 0, 0]), ("2", [1, 0, 0, 1, 0])],
    ids=["once", "lasting", "on the file"],
)
def test_later_calls_fail_as_asked(later: str, expected: list[int], failing_calls: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("x")
    ended = subprocess.run(
        [sys.executable, "-S", "-c", READER, tmp_path, later],
        env={**os.environ, "LD_PRELOAD": str(failing_calls)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ended.stdout.lower()) == [bool(one) for one in expected]
