"""Fixtures of the tests of launch/."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.launch.ray_commands import RAY


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of commands, with this test's own token, cache, home, and directory for Ray's logs and sockets."""
    own = {"HOME": str(tmp_path / "home"), "GEN_DIST_CACHE": str(tmp_path / "packed"), "PYTHONPATH": str(REPOSITORY)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (tmp_path / "home").mkdir()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
        yield kept | RAY | own | {"RAY_TMPDIR": short}
