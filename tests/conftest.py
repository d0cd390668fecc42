"""Fixtures for all tests. Threads are set before torch is imported: results must not depend on how many there are."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GEN_DIST_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray


@pytest.fixture(autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed data go to one directory for the whole session, never to the user's own cache."""
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path_factory.getbasetemp() / "packed"))
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory for floats holds NaN, so that an unwritten output cannot pass."""
    empty = np.empty

    def poisoned(*args: Any, **kwargs: Any) -> NDArray[Any]:
        fresh = empty(*args, **kwargs)
        if np.issubdtype(fresh.dtype, np.floating):
            fresh.fill(np.nan)
        return fresh

    monkeypatch.setattr(np, "empty", poisoned)
    torch.use_deterministic_algorithms(True)  # fills fresh memory as well, even where torch.compile traces
    yield
    torch.use_deterministic_algorithms(False)


REPOSITORY = Path(__file__).resolve().parent.parent
