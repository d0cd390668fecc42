"""Each planted fault is found by the check that is meant to find it, in words of the faulty code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gen_dist.config import NetworkConfig, RoleName
from gen_dist.testing import beside, two_processes
from gen_dist.testing.objectives import OBJECTIVE_CHECKS, SLOW_OBJECTIVE_CHECKS
from gen_dist.testing.report import Check, Failure, Result, run_checks
from gen_dist.testing.trial import ObjectiveTrial
from gen_dist.testing.two_processes import as_json, read_trial
from tests.support.runs import SMALL_CONV, SMALL_DCGAN, SMALL_MLP
from tests.testing import faults
from tests.testing.faults import Fault, FaultyConfig, FaultyGanConfig

FOUND: dict[Fault, tuple[str, str]] = {
    "term under no_grad": ("every term of the loss has a gradient", "phase elbo"),
    "detached reparameterization": ("every term of the loss has a gradient", "phase elbo"),
    "graph of the generator": ("no gradient reaches another phase", "phase generator carries 'fake' with the graph"),
    "forward past the wrapper": ("the forward pass stays within the networks", "calls a Linear"),
    "torch's generator": ("noise is keyed", "a draw from a global generator"),
    "changing number": ("a recorded step equals a launched one", "aten.mul"),
    "mean over the local batch": ("micro batches equal the batch", "a mean over images"),
    "bf16 weights": ("updates are larger than the spacing of the weights", "decoder.layers.0.weight is bfloat16"),
    "unsaved buffer": ("changing buffers are saved", "buffer running of FaultyVae"),
    "state on the module": ("modules keep no state", "FaultyPhase.last"),
    "branch on data": ("a recorded step equals a launched one", "the host waits"),
}


def _failures(fault: Fault, *more: Check) -> list[Result]:
    config = FaultyGanConfig if fault == "graph of the generator" else FaultyConfig
    return [
        one
        for one in run_checks(fault, [*OBJECTIVE_CHECKS, *more], ObjectiveTrial(config(fault=fault)))
        if one.outcome == "failed"
    ]


@pytest.mark.parametrize("fault", FOUND)
def test_a_fault_is_found_by_its_check(fault: Fault) -> None:
    found = _failures(fault)
    check, words = FOUND[fault]
    assert [one.check for one in found] == [check], found
    assert words in found[0].reason
    source = Path(faults.__file__).read_text().splitlines()
    if lines := [number for number, line in enumerate(source, 1) if line.endswith(f"# FAULT: {fault}")]:
        assert f"faults.py:{lines[0]}" in found[0].reason


@pytest.mark.parametrize("config", [FaultyConfig(), FaultyGanConfig()])
def test_without_a_fault_nothing_is_found(config: FaultyConfig) -> None:
    results = run_checks("none", OBJECTIVE_CHECKS, ObjectiveTrial(config))
    assert {one.outcome for one in results} == {"passed"}, results


def test_other_processes_make_the_same_trial() -> None:
    roles: dict[RoleName, NetworkConfig] = {"generator": SMALL_MLP, "discriminator": SMALL_CONV}
    trial = ObjectiveTrial(FaultyGanConfig(), SMALL_DCGAN, (3, 8, 16), roles)
    made = read_trial(json.loads(json.dumps(as_json(trial))))
    assert made.config == trial.config and made.image_shape == (3, 8, 16)
    assert type(made.config.objective) is FaultyGanConfig


def test_a_rank_that_fails_is_named_though_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nif [ "$RANK" = 1 ]; then echo "its own words" >&2; exit 3; fi\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(Failure, match="two processes failed: rank 1: its own words"):
        two_processes.check_two_processes_equal_one(ObjectiveTrial(FaultyConfig()))
    monkeypatch.setattr(beside, "_SECONDS", 0.1)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(Failure, match=r"did not end in 0\.1 seconds"):
        two_processes.check_two_processes_equal_one(ObjectiveTrial(FaultyConfig()))


SLOW: dict[Fault, tuple[Check, str]] = {
    "wrong sign on one rank": (SLOW_OBJECTIVE_CHECKS[0], "with two processes"),
    "branch on the compiler": (SLOW_OBJECTIVE_CHECKS[1], "with compiled phases"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW)
def test_a_fault_is_found_by_its_slow_check(fault: Fault) -> None:
    check, words = SLOW[fault]
    found = _failures(fault, check)
    assert [one.check for one in found] == [check.name]
    assert words in found[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("config", [FaultyConfig(), FaultyGanConfig()])
def test_without_a_fault_the_slow_checks_pass(config: FaultyConfig) -> None:
    results = run_checks("none", SLOW_OBJECTIVE_CHECKS, ObjectiveTrial(config))
    assert {one.outcome for one in results} == {"passed"}, results
