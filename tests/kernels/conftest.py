"""Fixtures of the tests of kernels."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Kernels that the launches of a test compile to, for an H100; nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu = mock.MagicMock()
    gpu.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    gpu.get_current_device.return_value = 1000  # Triton caches binaries by device, so those of a real one stay separate
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *arguments, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", gpu)
    return kernels
