"""Faults of the system under every command: each ends right, or with one line, and nothing is lost.

`make test` takes a sample, `make test-all` the rest.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.faults.commands import Commands
from tests.faults.flip import COMMANDS, RIGHT
from tests.faults.inject import FAULTS, differences
from tests.faults.kill import left_in_shared_memory, shared_memory
from tests.faults.scenarios import PLUGIN, scenarios_of
from tests.support.children import end_with_parent
from tests.support.warm_python import in_two_ranks

Rows = list[dict[str, Any]]

SCENARIOS = tuple(scenarios_of(Path()))
KILLED = (
    *("pack", "data", "train", "resume", "fresh", "evaluate", "encode", "report", "export", "train in shards"),
    *("train from a run", "encode to one file", "export for diffusers", "train a plug-in", "report a plug-in", "check"),
)
"""Commands that are killed at random moments."""
CALLS_OF_A_KIND = os.environ.get("GEN_DIST_FAULTS", "1")
"""Calls of each kind that fail in `make test-all`, spread over those of a command. 0 is all of them, in hours."""


def problems_of(rows: Rows) -> Rows:
    """Rows with a problem."""
    return [row for row in rows if row["problems"]]


def test_a_failing_call_is_harmless_or_one_line(faults: Callable[..., Rows]) -> None:
    rows = faults("inject", "resume,data", "1", "write:ENOSPC:lasting", "read:EIO")
    assert not problems_of(rows)
    assert sum(bool(row["file"]) for row in rows) == 4


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_kind_of_failing_call_is_harmless_or_one_line(scenario: str, faults: Callable[..., Rows]) -> None:
    rows = faults("inject", scenario, CALLS_OF_A_KIND)
    print(f"{scenario}: {sum(bool(row['file']) for row in rows)} failed calls of {len(FAULTS)} kinds")
    assert not problems_of(rows)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_is_never_used_in_silence(command: str, faults: Callable[..., Rows]) -> None:
    rows = faults("flip", command, "1")
    print(f"{command}: {dict(collections.Counter(row['verdict'] for row in rows))}")
    assert not [row for row in rows if row["verdict"] not in RIGHT]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", KILLED)
def test_killed_at_random_moments_a_command_ends_as_undisturbed(scenario: str, faults: Callable[..., Rows]) -> None:
    rows = faults("kill", scenario, "12", "0")
    assert sum(len(row["killed after"]) for row in rows) >= 12
    assert not problems_of(rows)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["train", "train in shards", "train a plug-in"])
def test_two_processes_killed_at_random_moments_end_as_undisturbed(scenario: str, tmp_path: Path) -> None:
    commands, chance = Commands(tmp_path), random.Random(0)
    program = [*in_two_ranks(), "launch/train.py", *commands.scenarios[scenario].words[1:]]
    (commands.root / "tmp").mkdir(parents=True)
    (commands.root / "mine.py").write_text(PLUGIN)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            program,
            cwd=REPOSITORY,
            env=os.environ | {"TMPDIR": str(commands.root / "tmp")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def ends() -> None:
        with start() as process:
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    began = time.monotonic()
    ends()
    seconds = time.monotonic() - began
    expected, killed = commands.contents(), 0
    while killed < 10:
        shutil.rmtree(commands.run_path)
        before = shared_memory()
        for _ in range(chance.randrange(1, 4)):
            with start() as process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, seconds))
                killed += process.poll() is None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        ends()
        assert not differences(expected, commands.contents())
        assert not left_in_shared_memory(before)
