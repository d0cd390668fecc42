"""Tables of parts by name. All sorts of parts are registered in them, ours and those of plug-ins alike."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Generic, TypeVar

from gen_dist.errors import ConfigError

T = TypeVar("T")
_TABLES: list[Table[object]] = []
FILES = "gen_dist.plugins.files"
"""Parent of the modules that single files become."""
_registering: list[str] = []
"""Names of the plug-ins that are being loaded, the innermost last."""


class Table(Generic[T]):
    """Parts of one sort by name, in the order of their registration."""

    def __init__(self, sort: str) -> None:
        """Create an empty table. `sort` names its parts in errors, such as `metric`."""
        self.sort = sort
        self.parts: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        _TABLES.append(self)  # type: ignore[arg-type]

    def add(self, name: str, part: T) -> None:
        """Add a part.

        Raises:
            ConfigError: the name is taken; the line says by whom.
        """
        if name in self.parts:
            raise ConfigError(
                f"{self.sort} {name!r} is registered already, by {self._origins[name]}; choose another name"
            )
        self.parts[name] = part
        self._origins[name] = _origin()

    def forget(self, origin: str) -> None:
        """Remove the parts of one origin."""
        for name in [name for name, known in self._origins.items() if known == origin]:
            del self.parts[name], self._origins[name]


def parts_of(plugin: str) -> list[tuple[str, str]]:
    """Sort and name of each part that a plug-in registered, such as `("metric", "roundness")`."""
    return [
        (table.sort, name)
        for table in _TABLES
        for name, origin in table._origins.items()
        if origin == f"plug-in {plugin}"
    ]


def has_registered(plugin: str, module: str) -> bool:
    """True if a plug-in registered a part, or its module did when other code imported it first."""
    modules = f"module {module}"
    return any(
        origin == f"plug-in {plugin}" or origin == modules or origin.startswith(f"{modules}.")
        for table in _TABLES
        for origin in table._origins.values()
    )


def _origin() -> str:
    """Name of the one that registers: this package, even if a plug-in imports its module first, or a plug-in."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "")
    is_own = module.startswith("gen_dist.") and not module.startswith(f"{FILES}.")
    return "gen_dist" if is_own else f"plug-in {_registering[-1]}" if _registering else f"module {module}"


@contextlib.contextmanager
def registering(plugin: str) -> Iterator[None]:
    """Within it, parts are registered for a plug-in of this name. After an error, no table has any of them."""
    _registering.append(plugin)
    try:
        yield
    except BaseException:
        for table in _TABLES:
            table.forget(f"plug-in {plugin}")
        raise
    finally:
        _registering.pop()
