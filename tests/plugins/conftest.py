"""Fixtures for tests of plug-ins: what a test loads is forgotten after it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gen_dist.plugins import loading
from gen_dist.plugins.tables import FILES
from tests.support.loaded_plugins import forgetting_plugins


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Give a function that forgets the plug-ins that this process has loaded, as a new process would."""
    with forgetting_plugins() as forget_now:
        yield forget_now


@pytest.fixture(scope="module")
def spatial_vae() -> Iterator[ModuleType]:
    """The plug-in `spatial_vae.py`, for the tests of one file."""
    with forgetting_plugins():
        loading.load(str(Path(__file__).with_name("spatial_vae.py")))
        yield sys.modules[f"{FILES}.spatial_vae"]
