"""How processes that trained together end."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gen_dist.parallel.barrier import is_alive
from tests.conftest import REPOSITORY
from tests.parallel.exit_worker import EXIT_CODE, PAIRS


@pytest.mark.skipif(sys.platform != "linux", reason="starves threads by Linux's scheduler")
def test_processes_that_trained_together_end_with_their_exit_code_and_their_words(tmp_path: Path) -> None:
    """With Python's own end most of these abort: gloo's threads ask for a lock that no longer is."""
    words = [sys.executable, "-m", "tests.parallel.exit_worker", str(tmp_path), "as the product"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert f"exit codes: {[EXIT_CODE] * 2 * PAIRS}" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("leaves") == 2 * PAIRS
    assert len(list(tmp_path.glob("*/* left"))) == 2 * PAIRS


def test_a_process_that_was_killed_and_not_yet_buried_counts_as_dead() -> None:
    """Who waits for it in shared memory must not wait for ever."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(process.pid)
    process.kill()
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert not is_alive(process.pid)
    process.communicate()
    assert not is_alive(process.pid)
