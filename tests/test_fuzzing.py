"""A fuzzed reader has its seconds, whatever else stops the process."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.fuzzing import Stopwatch


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_time_in_which_a_process_is_stopped_does_not_count() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with Stopwatch() as watch:
                os.write(writing, b"go")
                time.sleep(0.2)
                os.write(writing, f"{watch.lap()}".encode())
        finally:
            os._exit(0)  # else this copy of pytest would go on beside the other one
    assert os.read(reading, 2) == b"go"
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pid, signal.SIGCONT)
    seconds = float(os.read(reading, 99))
    os.waitpid(pid, 0)
    assert seconds < 1.5


def test_computing_counts_as_waiting_does() -> None:
    with Stopwatch() as watch:
        began = time.process_time()
        while time.process_time() < began + 0.12:
            pass
        assert watch.lap() > 0.1
        time.sleep(0.12)
        assert 0.04 < watch.lap() < 30
        assert watch.total() > 0.15
