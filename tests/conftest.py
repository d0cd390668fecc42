"""Fixtures for all tests. Threads are set before torch is imported: results must not depend on how many there are."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GEN_DIST_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed data go to one directory for the whole session, never to the user's own cache."""
    monkeypatch.setenv("GEN_DIST_CACHE", str(tmp_path_factory.getbasetemp() / "packed"))
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` of floats gives NaN, so that an unwritten output cannot pass."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


REPOSITORY = Path(__file__).resolve().parent.parent
