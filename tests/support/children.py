"""Processes of tests that end with the test, even if it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import REPOSITORY

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Make the system send this process SIGTERM when its parent has died (Linux); for `preexec_fn`."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def ended_by_sigterm(python: Sequence[str], words: Sequence[str], temporary: Path, directories: int = 1) -> int:
    """Exit code of a benchmark that gets SIGTERM once this many of its directories are in `temporary`."""
    process = subprocess.Popen(
        [*python, *words],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )
    until = time.monotonic() + 60
    while sum(any(found.iterdir()) for found in temporary.glob("gen_dist-*")) < directories:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    return process.returncode
