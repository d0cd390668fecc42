"""Two processes on shards behind a server that fails: an epoch is whole, whatever dies in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.support.shards import wait_for

MOST_MIB_ABOVE = 200.0


class Server:
    """The server in a process of its own, on one port."""

    def __init__(self, shards: int, images: int) -> None:
        self._counts = [str(shards), str(images)]
        self.port = "0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.data.many_shards_server", self.port, *self._counts]
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = self._process.stdout.readline().strip()
        assert self.port

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def ranks(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Context manager with two processes of the worker, which are killed at its end."""
    command = [
        sys.executable,
        "tests/support/two_ranks.py",
        sys.executable,
        "--",
        "-m",
        "tests.data.many_shards_worker",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*command, *words], cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        assert started.stderr is not None
        started.stderr.close()


def trained(*words: str) -> str:
    """Standard error of a whole training."""
    with ranks(*words) as run:
        error = run.communicate()[1]
        assert run.returncode == 0, error[-3000:]
        return error


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def steps_done(run: Path) -> int:
    return max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0


def rows_of(run: Path, steps: int) -> dict[int, list[int]]:
    """Images of each step, those of rank 0 first. A step that was gathered twice took the same ones."""
    found: list[dict[int, list[int]]] = []
    for rank in range(2):
        of_rank: dict[int, list[int]] = {}
        for line in Path(f"{run}-{rank}.rows").read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut off by a kill
                step, rows = json.loads(line)
                assert of_rank.setdefault(step, rows) == rows
        found.append(of_rank)
    return {step: found[0][step] + found[1][step] for step in range(steps)}


def peak_mib(run: Path) -> float:
    return max(float(Path(f"{run}-{rank}.peak").read_text()) for rank in range(2))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("shards", "images", "batch", "away"), [(20, 1_000, 200, 12), (200, 10_000, 5_000, 30)])
def test_an_epoch_is_whole_and_the_same_whatever_dies(
    shards: int, images: int, batch: int, away: int, tmp_path: Path
) -> None:
    count = shards * images - min(10_000, shards * images // 10)
    steps = -(-count // batch)
    server = Server(shards, images)
    try:
        data = f"shards:http://127.0.0.1:{server.port}/{{000..{shards - 1:03}}}.tar"
        words = str(tmp_path / "cache"), str(steps), str(batch)
        error = trained(str(tmp_path / "undisturbed"), *words, data)
        # Lines of the other process, which may be the one that indexes, are not shown.
        print(*(line for line in error.splitlines() if line.startswith("indexed")), flush=True)
        held = sum(path.stat().st_size for path in (tmp_path / "cache" / "shard-blocks").glob("*/*"))
        assert held <= 2**29

        disturbed = tmp_path / "disturbed"
        with ranks(str(disturbed), *words, data):
            wait_for(lambda: steps_done(disturbed) > steps // 3, 1200)
        killed_at = steps_done(disturbed)
        assert killed_at < steps
        print(f"killed after step {killed_at} of {steps}", flush=True)
        with ranks(str(disturbed), *words, data) as run:
            wait_for(lambda: steps_done(disturbed) > max(killed_at, steps // 2), 1200)
            server.kill()
            for block in (tmp_path / "cache" / "shard-blocks").glob("*/*"):
                block.unlink()
            time.sleep(away)
            server.start()
            error = run.communicate(timeout=2400)[1]
            assert run.returncode == 0, error[-3000:]
        assert "waiting for http://127.0.0.1" in error
        assert "answers again after" in error
    finally:
        server.kill()

    assert losses(disturbed) == losses(tmp_path / "undisturbed")
    rows = rows_of(disturbed, steps)
    assert rows == rows_of(tmp_path / "undisturbed", steps)
    epoch = np.concatenate([rows[step] for step in range(steps)])[:count]
    assert np.array_equal(np.sort(epoch), np.arange(count))

    trained(str(tmp_path / "small"), str(tmp_path / "cache"), "20", str(batch), "synthetic")
    above = max(peak_mib(tmp_path / "undisturbed"), peak_mib(disturbed)) - peak_mib(tmp_path / "small")
    print(f"{above:.0f} MiB above those of a small set")
    assert above <= MOST_MIB_ABOVE
