"""Work of all processes that fails in some of them: they go on together, or the one that failed ends with its line."""

from __future__ import annotations

import os
import subprocess

import pytest

from gen_dist.config import TrainConfig
from gen_dist.errors import PluginError
from gen_dist.parallel.collectives import FailureVote
from gen_dist.parallel.processes import start_processes
from tests.conftest import REPOSITORY
from tests.support.warm_python import in_two_ranks

WORKER = """
import torch
from gen_dist.config import TrainConfig
from gen_dist.errors import PluginError
from gen_dist.parallel.collectives import FailureVote, sum_over_processes
from gen_dist.parallel.processes import end_process, start_processes

processes = start_processes(TrainConfig(device="cpu"))
vote, rank = FailureVote(processes), processes.rank
vote.SECONDS = 3
for failing in ((), (0, 1), (1,), (0,)):
    print(rank, *vote.count(PluginError(f"line of {rank}") if rank in failing else None), flush=True)
if rank == 0:  # it waits for the other one within the work
    try:
        sum_over_processes(torch.ones(1))
    except RuntimeError:
        print(rank, "left", flush=True)
    end_process(0)
try:
    vote.count(PluginError("early"))
except PluginError as error:
    print(rank, "raised", error, flush=True)
end_process(0)
"""


@pytest.mark.slow
def test_processes_agree_on_what_failed_where() -> None:
    done = subprocess.run(
        [*in_two_ranks(), "-c", WORKER],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    counts = ["0 None", "2 line of 0", "1 line of 1", "1 line of 0"]
    for rank, last in ((0, "0 left"), (1, "1 raised early")):
        lines = [line for line in done.stdout.splitlines() if line.startswith(str(rank))]
        assert lines == [*(f"{rank} {count}" for count in counts), last], done.stdout + done.stderr


def test_one_process_counts_its_own_failure() -> None:
    vote = FailureVote(start_processes(TrainConfig(device="cpu")))
    assert vote.count(None) == (0, None)
    assert vote.count(PluginError("it failed")) == (1, "it failed")
