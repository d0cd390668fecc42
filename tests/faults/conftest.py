"""The library that lets system calls fail, and runs of the programs that use it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.support.children import end_with_parent

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library; without Linux or a C compiler the test is skipped."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("letting system calls fail needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("library") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def faults(failing_calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rows]:
    """Run a program of this folder, as `faults("inject", *words)`; returns the lines that it prints."""
    work = tmp_path_factory.mktemp("faults")

    def run(program: str, *words: str) -> Rows:
        ended = subprocess.run(
            [sys.executable, "-m", f"tests.faults.{program}", work, *words],
            cwd=REPOSITORY,
            env={**os.environ, "LD_PRELOAD": str(failing_calls)},
            capture_output=True,
            text=True,
            preexec_fn=end_with_parent,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        return [json.loads(line) for line in ended.stdout.splitlines()]

    return run
