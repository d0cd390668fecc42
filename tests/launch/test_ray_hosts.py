"""A Ray cluster of two hosts, one of which is cut off in mid-run and comes back."""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
from tests.launch.network_hosts import Host, two_hosts
from tests.support.runs import make_trainer, run_steps, small_config, write_config

PORT = 6479
EVERY = 250
"""Steps between checkpoints."""


def _wait(what: str, for_it: Callable[[], bool], seconds: float, log: Path) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    while not for_it():
        assert time.monotonic() - started < seconds, f"{what} took longer than {seconds} s:\n{log.read_text()}"
        time.sleep(0.2)
    return time.monotonic() - started


def _newest(run: Path) -> int:
    paths = checkpoint_paths(run)
    return int(paths[0].name.removeprefix("step_")) if paths else 0


def _processes(run: Path) -> list[int]:
    """Number of processes of each start of the run."""
    last = json.loads((run / "environment.json").read_text())
    return [start["processes"] for start in [*reversed(last["earlier"]), last]]


@pytest.mark.slow
def test_a_run_continues_without_a_lost_host_and_takes_it_back(tmp_path: Path) -> None:
    """Either host may have the main worker: the other one takes the run directory over."""
    never = 10**6
    config = small_config(
        "vae", steps=never, checkpoint_every=EVERY, evaluate_every=never, log_every=50, sample_every=never
    )
    # Rounding differs with the number of processes. Even at this small rate it grows: of one process, the same steps
    # accumulated in two are 1e-5 off after 4,000.
    optimization = dataclasses.replace(config.optimization, epsilon=1e-3)
    config = dataclasses.replace(config, learning_rate=1e-4, optimization=optimization)
    file, run, log = write_config(tmp_path / "config.json", config), tmp_path / "runs" / "small", tmp_path / "log"
    environment = {
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "GEN_DIST_CACHE": str(tmp_path / "packed"),
    }
    log.touch()
    with two_hosts() as (first, second):

        def start(host: Host, script: str, *words: object) -> subprocess.Popen[bytes]:
            own = {"RAY_TMPDIR": str(host.directory)}
            command = [sys.executable, str(REPOSITORY / "launch" / script), *map(str, words)]
            return host.start(command, environment | own, log)

        head = f"{first.address}:{PORT}"
        start(first, "ray_cluster.py", "head", "--address", first.address, "--port", PORT, "--cpus", 1)
        _wait("the head", lambda: _answers(first, PORT), 60, log)
        start(second, "ray_cluster.py", "join", head, "--address", second.address, "--cpus", 1)
        words = ["--config", file, "--storage", run.parent, "--run-dir", run.name, "--min-workers", 1]
        training = start(first, "ray_train.py", *words, "--workers", 2, "--address", head)
        _wait("training", lambda: _newest(run) >= EVERY, 150, log)
        _wait("training on both", lambda: _processes(run)[-1] == 2, 90, log)
        before = _newest(run)
        _wait("training on both", lambda: _newest(run) > before, 30, log)

        before = _newest(run)
        second.set_cable(plugged=False)
        alone_after = _wait("going on alone", lambda: _processes(run)[-1] == 1 and _newest(run) > before, 60, log)
        second.set_cable(plugged=True)
        back_after = _wait("taking the host back", lambda: _processes(run)[-1] == 2, 150, log)
        before = _newest(run)
        _wait("training on both again", lambda: _newest(run) > before, 60, log)
        training.send_signal(signal.SIGTERM)
        assert training.wait(timeout=60) == 0, log.read_text()
    print(f"went on alone {alone_after:.0f} s after the cable was pulled, on both {back_after:.0f} s after it was back")
    assert _processes(run)[-3:] == [2, 1, 2], log.read_text()
    trainer = make_trainer(config)
    records = read_metrics(run / "metrics.jsonl")
    losses = run_steps(trainer, 0, records[-1]["step"])
    assert records[-1]["step"] == 50 * len(records)
    expected = [statistics.fmean(losses[end - 50 : end]) for end in range(50, len(losses) + 1, 50)]
    assert [record["train/loss"] for record in records] == pytest.approx(expected, rel=1e-4)


def _answers(host: Host, port: int) -> bool:
    """Return True if a program on the host takes connections."""
    code = f"import socket; socket.create_connection(({host.address!r}, {port}), 1)"
    return host.start([sys.executable, "-c", code], {}, Path(os.devnull)).wait() == 0
