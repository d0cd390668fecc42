"""End of processes that trained together."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gen_dist.parallel.barrier import is_alive
from tests.conftest import REPOSITORY
from tests.parallel.exit_worker import EXIT_CODE, PAIRS
from tests.support.warm_python import warm_python


@pytest.mark.skipif(sys.platform != "linux", reason="starves threads by Linux's scheduler")
def test_joined_processes_keep_exit_codes_and_output(tmp_path: Path) -> None:
    """With Python's own end most of these abort: gloo's threads request a lock that finalization has removed."""
    words = [*warm_python(), "-m", "tests.parallel.exit_worker", str(tmp_path), "as the product"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert f"exit codes: {[EXIT_CODE] * 2 * PAIRS}" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("leaves") == 2 * PAIRS
    assert len(list(tmp_path.glob("*/* left"))) == 2 * PAIRS


def test_a_zombie_process_counts_as_dead() -> None:
    """Processes that wait for it at a barrier must not wait for ever."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(process.pid)
    process.kill()
    deadline = time.monotonic() + 60
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert not is_alive(process.pid)
    process.communicate()
    assert not is_alive(process.pid)
