"""Fixtures for all tests. Threads are set before torch is imported: results must not depend on how many there are."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GEN_DIST_THREADS"] = "1"

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed data go to one directory for the whole session, never to the user's own cache."""
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path_factory.getbasetemp() / "packed"))
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory for floats holds NaN, so that an unwritten output cannot pass."""

    def poison(library: ModuleType, name: str) -> None:
        allocate = getattr(library, name)

        def poisoned(*args: Any, **kwargs: Any) -> Any:
            fresh = allocate(*args, **kwargs)
            if fresh.dtype in (torch.float32, torch.float64, np.float32, np.float64):
                fresh[...] = math.nan
            return fresh

        monkeypatch.setattr(library, name, poisoned)

    poison(torch, "empty")
    poison(torch, "empty_like")
    poison(np, "empty")


REPOSITORY = Path(__file__).resolve().parent.parent
