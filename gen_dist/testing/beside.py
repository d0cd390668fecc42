"""Two processes that train a trial beside this one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gen_dist.files import temporary_directory
from gen_dist.testing.report import Failure

_SECONDS = 120


class TwoProcesses:
    """Two processes that train a trial, while this one does other work."""

    def __init__(self, folder: Path, started: Sequence[subprocess.Popen[bytes]], errors: Sequence[Path]) -> None:
        """Take started processes, and the files of their standard errors."""
        self._folder, self._started, self._errors = folder, started, errors

    def result(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Wait for them. Logs of their steps, and their state.

        Raises:
            Failure: one of them fails, or they take too long.
        """
        if (failed := _first_failure(self._started)) is not None:
            lines = self._errors[failed].read_text(errors="replace").strip().splitlines() or ["without a word"]
            raise Failure(f"two processes failed: rank {failed}: {lines[-1][:300]}")
        return json.loads((self._folder / "logs.json").read_text()), load_file(self._folder / "state.safetensors")


@contextlib.contextmanager
def started_beside(described: dict[str, Any]) -> Iterator[TwoProcesses]:
    """Context manager with two processes that train a trial, and end with it. `described` is the trial's `as_json`."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_directory("check"))
        (folder / "trial.json").write_text(json.dumps(described))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"CUDA_VISIBLE_DEVICES": "-1", "GEN_DIST_THREADS": "1"}
        shared["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", "gen_dist.testing.two_processes", str(folder)]
        errors = [
            folder / f"errors-{rank}.txt" for rank in range(2)
        ]  # files: a pipe that is full would stop its writer
        started = []
        for rank, file in enumerate(errors):
            process = subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=stack.enter_context(file.open("wb")),
            )
            stack.callback(_end, process)
            started.append(process)
        yield TwoProcesses(folder, started, errors)


def _first_failure(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Rank of the process that fails first: the others may then wait for it. None if all succeed.

    Raises:
        Failure: they take too long.
    """
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in started]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.05)
    raise Failure(f"two processes did not end in {_SECONDS} seconds: do all ranks call the same collectives?")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
