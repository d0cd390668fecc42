"""Commands of launch/ that use Ray, run to their end or their line of error; and a head for them."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from gen_dist.config import TrainConfig
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
from tests.support.children import end_with_parent
from tests.support.runs import (
    losses_of,
    small_config,
)
from tests.support.two_ranks import free_port
from tests.support.warm_python import warm_python

RAY = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "OMP_NUM_THREADS": "1"}

SECONDS = 240


def launched(script: str, *words: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "launch" / script), *map(str, words)]


def run_to_end(
    command: list[str], environment: dict[str, str], timeout: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. After the timeout, end it and the processes that it started."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def error_of(command: list[str], environment: dict[str, str]) -> str:
    """Error line of a command that fails; it must be the only output."""
    done = run_to_end([*warm_python(), *command[1:]], environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not done.stdout and done.stderr.count("\n") == 1, done.stdout + done.stderr
    return done.stderr.removesuffix("\n")


def config_of(**changes: object) -> TrainConfig:
    return small_config("vae", **changes)


def losses_of_run(run: Path) -> list[float]:
    return losses_of(read_metrics(run / "metrics.jsonl"))


@contextlib.contextmanager
def head_of_cluster(environment: dict[str, str], directory: Path) -> Iterator[tuple[int, int, int]]:
    """Run a head on loopback, and give its port and the ports of its dashboard and of remote clients."""
    port, dashboard, client = free_port(), free_port(), free_port()
    with (directory / "head.log").open("wb") as log:
        words = ["head", "--port", port, "--dashboard-port", dashboard, "--client-port", client, "--cpus", 2]
        head = subprocess.Popen(
            launched("ray_cluster.py", *words), env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
        )
    try:
        deadline = time.monotonic() + 90
        while not (listens(port) and listens(dashboard)):
            assert time.monotonic() < deadline and head.poll() is None, (directory / "head.log").read_text()
            time.sleep(0.2)
        yield port, dashboard, client
    finally:
        head.terminate()
        head.wait(timeout=60)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def belongs_to(process: psutil.Process, token: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("HOME") == str(token.parent.parent)
    return False
