"""Parts that a config can name by kind: objectives and networks. Nothing here imports torch.

A part's config says where its class is, so that a config can be made and read, and `--help` printed, without importing
it. The configs of this package's own parts stand in `gen_dist.config`, which imports quickly. A module in the part's
folder that imports `gen_dist.registry` registers its config itself: it is found by its file, and needs no other edit.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any, Generic, TypeVar

from gen_dist.errors import ConfigError

C = TypeVar("C")
Config = TypeVar("Config", bound=type[Any])


class Registry(Generic[C]):
    """Config classes of one sort of part, by kind."""

    def __init__(self, sort: str, base: type[C], folder: str) -> None:
        """Begin an empty registry.

        Args:
            sort: name of the sort in errors, such as `objective`.
            base: class that all of its configs derive from.
            folder: package whose modules may register parts, such as `gen_dist.objectives`.
        """
        self._sort = sort
        self._base = base
        self._folder = folder
        self._by_kind: dict[str, type[Any]] = {}
        self._searched = False

    def register(self, config: Config) -> Config:
        """Register a config class under the default of its field `kind`; a decorator above `@dataclass(frozen=True)`.

        Raises:
            ConfigError: the class is no frozen dataclass of this sort, has no kind, or the kind is taken.
        """
        name = f"{self._sort} config {config.__qualname__}"
        if not (issubclass(config, self._base) and dataclasses.is_dataclass(config)):
            raise ConfigError(f"{name} is no dataclass derived from {self._base.__name__}")
        if not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise ConfigError(f"{name} is not frozen; decorate it with @dataclass(frozen=True)")
        kind = getattr(config, "kind", "")
        if not kind:
            raise ConfigError(f'{name} has no kind; give it a field such as kind: Literal["mine"] = "mine"')
        if self._by_kind.get(kind, config).__qualname__ != config.__qualname__:
            raise ConfigError(f"{name} has kind {kind!r}, which {self._by_kind[kind].__qualname__} has already")
        self._by_kind[kind] = config
        return config

    def configs(self) -> tuple[type[C], ...]:
        """All config classes, those of modules found in the folder included."""
        if not self._searched:
            self._searched = True
            for module in _modules_that_register(self._folder):
                importlib.import_module(module)
        return tuple(self._by_kind.values())


def load(place: str) -> Any:
    """The class at `module:Class`. Imports its module, and with it torch."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _modules_that_register(folder: str) -> list[str]:
    """Names of a package's modules that import this one; found by their text, so that no other is imported."""
    spec = importlib.util.find_spec(folder)
    places = spec.submodule_search_locations if spec else None
    files = sorted(file for place in places or [] for file in Path(place).glob("[!_]*.py"))
    return [f"{folder}.{file.stem}" for file in files if "gen_dist.registry" in file.read_text(encoding="utf-8")]
