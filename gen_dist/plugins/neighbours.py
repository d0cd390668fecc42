"""Imports of a plug-in that its digest does not cover: files beside it, and other modules of its package."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

_LIBRARIES = ("site-packages", "dist-packages")


def uncovered_imports(module: ModuleType, before: Collection[str], covered: Collection[str], folder: Path) -> list[str]:
    """Names of modules from a plug-in's folder that it imports and that are not among its files.

    Args:
        module: the plug-in.
        before: names of the modules that were imported before it.
        covered: its files.
        folder: the folder of a single file, or that of the top-level package. A folder of installed packages, whose
            modules are no neighbours, gives no names.
    """
    if any(part in _LIBRARIES for part in folder.parts):
        return []
    used = {name for name in sys.modules if name not in before} | {_home(value) for value in vars(module).values()}
    return sorted(
        name for name in used if (file := _file_of(name)) and _is_beside(file, folder) and file not in covered
    )


def _home(value: Any) -> str:
    """Name of a module, or of that which a class or function comes from."""
    name = getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", None)
    return name if isinstance(name, str) else ""


def _file_of(name: str) -> str | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    return file if isinstance(file, str) and file.endswith(".py") else None


def _is_beside(file: str, folder: Path) -> bool:
    path = Path(file)
    return path.is_relative_to(folder) and not any(part in _LIBRARIES for part in path.relative_to(folder).parts)
