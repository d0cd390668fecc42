"""Gradients in flat buckets, over two processes without shared weights: recorded turns, and DistributedDataParallel."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.support.runs import LEFT_OUT, OBJECTIVES
from tests.support.warm_python import in_two_ranks

QUICK = ("vae", "gan", "dcgan")
"""One phase, two phases, and statistics over the processes with a carried graph."""


def _results(out: Path, objectives: Sequence[str], timeout: float = 240) -> dict[str, Any]:
    done = subprocess.run(
        [*in_two_ranks(), "tests/parallel/flat_worker.py", str(out / "results.json"), *objectives],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found | {"unused weight of the last": (out / "results.1").read_text()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _results(tmp_path_factory.mktemp("flat"), QUICK)


def _assert_recorded_as_launched(found: dict[str, Any]) -> None:
    assert found["losses"]
    assert found["different"] == []
    assert max(found["buckets"]) > 1
    assert found["unreduced"] == []
    assert found["collectives"] >= 2 * sum(found["buckets"])  # each is sent and awaited
    assert found["one order"]
    assert found["spread"] == 0


@pytest.mark.parametrize("objective", QUICK)
def test_recorded_reductions_have_the_bits_of_launched(quick: dict[str, Any], objective: str) -> None:
    _assert_recorded_as_launched(quick[objective])


@pytest.mark.parametrize("objective", [*QUICK, "vae, accumulated"])
def test_flat_gradients_equal_ddp(quick: dict[str, Any], objective: str) -> None:
    assert quick["twins"][objective] <= 1e-7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_objective_is_recorded_and_equals_ddp(tmp_path: Path) -> None:
    objectives = [name for name in OBJECTIVES if name not in QUICK]
    assert set(objectives) > LEFT_OUT
    found = _results(tmp_path, objectives, timeout=850)
    for objective in objectives:
        _assert_recorded_as_launched(found[objective])
        assert found["twins"][objective] <= 1e-7, objective


def test_two_exchanged_buckets_are_noticed(quick: dict[str, Any]) -> None:
    """Each process computes what it recorded, so only a comparison of the processes can tell."""
    found = quick["swapped"]
    assert not found["one order"]
    assert found["spread"] > 0
    with pytest.raises(AssertionError):
        _assert_recorded_as_launched(found)


def test_a_weight_that_one_process_does_not_use_is_named(quick: dict[str, Any]) -> None:
    """Else it moves in the other process alone, and the weights of the processes part in silence."""
    own, other = quick["unused weight of the last"], quick["unused weight"]
    assert own.startswith("GeneratorPhase trains generator.2.bias, on which its loss does not depend in this process")
    assert other.startswith("another process of this run has ended or cannot be reached")


def test_processes_agree_on_the_accumulation_that_fits_in_all(quick: dict[str, Any]) -> None:
    """Each tries by itself, another number of times, with batch normalization over the processes."""
    assert quick["accumulations"] == [3, 3]


def test_processes_start_from_the_draws_of_the_main_one(quick: dict[str, Any]) -> None:
    """Processors of another kind draw other numbers from one seed."""
    assert quick["other draws"] == 0
