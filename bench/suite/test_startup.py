"""Time of commands in new processes with a warm file cache: `python -m pytest bench/suite/test_startup.py`.

Peak memory is of that process, in one more run, which is not timed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bench.measuring.measured import Measurement
from gen_dist.config import DataConfig
from gen_dist.data import Dataset

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COMMANDS: dict[str, tuple[int, float | None, list[str]]] = {
    "python": (5, None, ["-c", ""]),
    "import numpy": (5, None, ["-c", "import numpy"]),
    "import torch": (3, None, ["-c", "import torch"]),
    "import gen_dist": (5, None, ["-c", "import gen_dist"]),
    "help": (5, 2.0, ["launch/train.py", "--help"]),
    "help of a preset": (5, 2.0, ["launch/train.py", "vae-mnist", "--help"]),
    "one step": (3, 6.0, ["launch/train.py", "vae-mnist", "--steps", "1", "--device", "cpu"]),
}
"""Rounds, the most seconds that it should take, and the words after `python`. Our commands build on the first three."""

TELL_PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Runs a command, and prints its peak memory in the system's unit. A new process counts the memory of the
process that forked it until it runs its command, so a small one must fork it."""


@pytest.mark.parametrize("command", COMMANDS)
def test_startup(measurement: Measurement, command: str, cache: DataConfig, digits: Dataset, tmp_path: Path) -> None:
    """One command from start to end; a run writes to a new directory, and its images are packed."""
    rounds, bar, words = COMMANDS[command]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_CACHE": str(cache.cache_dir)}

    def run(*before: str) -> str:
        more = ["--run-dir", tempfile.mkdtemp(dir=tmp_path)] if "--steps" in words else []
        done = subprocess.run(
            [*before, sys.executable, *words, *more],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    measurement.time(run, rounds=rounds)
    if measurement.timed:
        peak = int(run(sys.executable, "-c", TELL_PEAK).splitlines()[-1])
        measurement.note(peak_memory_bytes=peak * (1 if sys.platform == "darwin" else 1024), bar_seconds=bar)
