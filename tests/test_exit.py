"""How processes that trained together end."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.exit_worker import EXIT_CODE, PAIRS


@pytest.mark.skipif(sys.platform != "linux", reason="starves threads by Linux's scheduler")
def test_processes_that_trained_together_end_with_their_exit_code_and_their_words(tmp_path: Path) -> None:
    """With Python's own end most of these abort: gloo's threads ask for a lock that no longer is."""
    words = [sys.executable, "-m", "tests.exit_worker", str(tmp_path), "as the product"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert f"exit codes: {[EXIT_CODE] * 2 * PAIRS}" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("leaves") == 2 * PAIRS
    assert len(list(tmp_path.glob("*/* left"))) == 2 * PAIRS
