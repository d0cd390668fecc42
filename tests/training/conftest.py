"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen_dist.training.run import train
from tests.support.vae_runs import config_of, quiet


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(config_of(path), say=quiet)
    return path
