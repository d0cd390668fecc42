"""Fixtures for all tests. It sets the number of threads before torch is imported: results must not depend on it."""

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
    """Directory of packed data for the whole session, in place of the user's cache."""
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path_factory.getbasetemp() / "packed"))
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory of floats with NaN, so that an unwritten output cannot pass."""
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
