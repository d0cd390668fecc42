"""How long commands take in new processes on a warm file cache: `python -m pytest bench/test_startup.py`.

Peak memory is of that process, as the system tells it when it ends.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bench.measured import Measurement
from gen_dist.config import DataConfig
from gen_dist.data import Dataset

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, tuple[int, float | None, list[str]]] = {
    "python": (5, None, ["-c", ""]),
    "import numpy": (5, None, ["-c", "import numpy"]),
    "import torch": (3, None, ["-c", "import torch"]),
    "import gen_dist": (5, None, ["-c", "import gen_dist"]),
    "help": (5, 2.0, ["launch/train.py", "--help"]),
    "help of a preset": (5, 2.0, ["launch/train.py", "vae-mnist", "--help"]),
    "one step": (3, 6.0, ["launch/train.py", "vae-mnist", "--steps", "1", "--device", "cpu"]),
}
"""Rounds, the most seconds that it should take, and the words after `python`. Ours stand on the first three."""


@pytest.mark.parametrize("command", COMMANDS)
def test_startup(measurement: Measurement, command: str, cache: DataConfig, digits: Dataset, tmp_path: Path) -> None:
    """One command from start to end; a run writes to a new directory, and its images are packed."""
    rounds, bar, words = COMMANDS[command]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_CACHE": str(cache.cache_dir)}
    peaks = []

    def run() -> None:
        directory = tempfile.mkdtemp(dir=tmp_path)
        more = ["--run-dir", directory] if "--steps" in words else []
        process = subprocess.Popen(
            [sys.executable, *words, *more],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"{' '.join(words)} failed"
        peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))

    measurement.time(run, rounds=rounds)
    measurement.note(peak_memory_bytes=max(peaks), bar_seconds=bar)
