"""Fixtures for tests of plug-ins: what a test loads is forgotten after it."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gen_dist.data.catalogue import source_kinds
from gen_dist.evaluation.metrics import all_metrics
from gen_dist.plugins import loading
from gen_dist.plugins.tables import _TABLES, FILES
from gen_dist.presets import presets


@contextlib.contextmanager
def forgetting() -> Iterator[Callable[[], None]]:
    """Context manager that forgets the plug-ins loaded within it; gives a function that does so earlier."""
    presets()
    source_kinds()
    all_metrics()
    before = [(table, dict(table.parts), dict(table._origins)) for table in _TABLES]
    loaded, modules = dict(loading._loaded), set(sys.modules)

    def forget_now() -> None:
        for table, parts, origins in before:
            table.parts.clear()
            table.parts.update(parts)
            table._origins.clear()
            table._origins.update(origins)
        loading._loaded.clear()
        loading._loaded.update(loaded)
        os.environ.pop(loading.FILES_VARIABLE, None)
        for name in set(sys.modules) - modules:
            if name.startswith(f"{FILES}."):
                del sys.modules[name]

    yield forget_now
    forget_now()


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Give a function that forgets the plug-ins that this process has loaded, as a new process would."""
    with forgetting() as forget_now:
        yield forget_now


@pytest.fixture(scope="module")
def spatial_vae() -> Iterator[ModuleType]:
    """The plug-in `spatial_vae.py`, for the tests of one file."""
    with forgetting():
        loading.load(str(Path(__file__).with_name("spatial_vae.py")))
        yield sys.modules[f"{FILES}.spatial_vae"]
