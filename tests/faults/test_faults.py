"""Faults of the system under every command: each ends right, or with one line, and nothing is lost.

`make test` takes a sample, `make test-all` the rest.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.flip import COMMANDS, RIGHT
from tests.faults.inject import FAULTS

Rows = list[dict[str, Any]]

SCENARIOS = (
    "pack",
    "train",
    "resume",
    "finish",
    "fresh",
    "sample",
    "evaluate",
    "replay",
    "report",
    "compare",
    "export",
)
CALLS_OF_A_KIND = "12"
"""Calls of a kind that fail in `make test-all`, spread over those of a command. 0 is all of them, in hours."""


def problems_of(rows: Rows) -> Rows:
    """Rows with a problem."""
    return [row for row in rows if row["problems"]]


def test_a_failing_call_is_harmless_or_one_line(faults: Callable[..., Rows]) -> None:
    rows = faults("inject", "resume", "1", "write:ENOSPC:lasting", "fsync:EIO", "rename:EACCES", "read:EIO")
    rows += faults("inject", "sample", "1", "open to read:EMFILE", "open to write:EACCES")
    assert not problems_of(rows)
    assert sum(bool(row["file"]) for row in rows) == 6


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_kind_of_failing_call_is_harmless_or_one_line(scenario: str, faults: Callable[..., Rows]) -> None:
    rows = faults("inject", scenario, CALLS_OF_A_KIND)
    print(f"{scenario}: {sum(bool(row['file']) for row in rows)} failed calls of {len(FAULTS)} kinds")
    assert not problems_of(rows)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_is_never_used_in_silence(command: str, faults: Callable[..., Rows]) -> None:
    rows = faults("flip", command, "6")
    print(f"{command}: {dict(collections.Counter(row['verdict'] for row in rows))}")
    assert not [row for row in rows if row["verdict"] not in RIGHT]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["pack", "train", "resume", "fresh", "evaluate", "report", "export"])
def test_killed_at_random_moments_a_command_ends_as_undisturbed(scenario: str, faults: Callable[..., Rows]) -> None:
    rows = faults("kill", scenario, "12", "0")
    assert sum(len(row["killed after"]) for row in rows) >= 12
    assert not problems_of(rows)
