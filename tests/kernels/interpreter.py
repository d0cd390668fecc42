"""Triton's interpreter, which runs kernels on CPU tensors, in a process of its own and with one fix.

An environment variable selects it when Triton is imported, and excludes compilation in that process.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.support.warm_python import warm_python


def run_tests_interpreted(path: Path, marks: str = "") -> str:
    """Run the tests of a file with interpreted kernels; return the last lines of the report if all of them passed.

    Args:
        path: file of tests.
        marks: expression of the marks that tests must have, as of pytest's option -m; "" takes all tests.

    Raises:
        AssertionError: with the report, if a test failed or was skipped, or if there was none.
    """
    command = [*warm_python(), "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", marks, str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    report = process.stdout + process.stderr
    assert process.returncode == 0, report
    assert " passed" in report, report
    assert "skipped" not in report, report
    return report[-2000:]


def round_bfloat16_to_nearest() -> None:
    """Make conversions from float32 to bfloat16 round to nearest even, as they do on GPUs.

    The interpreter of Triton 3.8 truncates. Call this in the interpreting process, before a kernel runs.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter.InterpreterBuilder.cast_impl

    def converted(builder, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return convert(builder, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = converted


def record_launches(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> list[str]:
    """Make functions (module, name) add their names to the returned list when they are called."""
    launched: list[str] = []

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            launched.append(function.__name__)
            return function(*arguments)

        return run

    for module, name in functions:
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    return launched
