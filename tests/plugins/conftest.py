"""Fixtures for tests of plug-ins: what a test loads is forgotten after it."""

import sys
from collections.abc import Iterator

import pytest

from gen_dist.data.catalogue import source_kinds
from gen_dist.evaluation.metrics import all_metrics
from gen_dist.plugins import loading
from gen_dist.plugins.tables import _TABLES
from gen_dist.presets import presets


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the plug-ins that a test has loaded into this process."""
    presets(), source_kinds(), all_metrics()
    before = [(table, dict(table.parts), dict(table._origins)) for table in _TABLES]
    monkeypatch.setattr(loading, "_loaded", dict(loading._loaded))
    monkeypatch.delenv(loading.FILES_VARIABLE, raising=False)
    modules = set(sys.modules)
    yield
    for table, parts, origins in before:
        table.parts.clear(), table._origins.clear()
        table.parts.update(parts), table._origins.update(origins)
    for name in set(sys.modules) - modules:
        if name.startswith(f"{loading.FILES}."):
            del sys.modules[name]
