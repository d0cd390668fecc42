"""Plug-ins that this process has loaded, forgotten as by a new process."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from gen_dist.data.catalogue import source_kinds
from gen_dist.evaluation.metrics import all_metrics
from gen_dist.plugins import loading, surroundings
from gen_dist.plugins.tables import _TABLES, FILES
from gen_dist.presets import presets


@contextlib.contextmanager
def forgetting_plugins() -> Iterator[Callable[[], None]]:
    """Give a function that forgets the plug-ins that were loaded in the block; its end forgets them too."""
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
        surroundings._imported.clear()
        surroundings._spoiled.clear()
        loading._loaded.clear()
        loading._loaded.update(loaded)
        os.environ.pop(loading.FILES_VARIABLE, None)
        for name in set(sys.modules) - modules:
            if name.startswith(f"{FILES}."):
                del sys.modules[name]

    try:
        yield forget_now
    finally:
        forget_now()
