"""Registry of the objectives and networks that a config can name by kind. It does not import torch.

Ours and those of plug-ins are registered alike.

A part's config names the place of its class, so configs and `--help` work without importing that class. The configs of
this package's own parts are in `gen_dist.config`, which imports quickly. A module in the part's folder with a line
`@objectives.register` (or `@networks.register`) is found by that text, and needs no other edit.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from tyro.conf import Suppress

from gen_dist.errors import ConfigError
from gen_dist.plugins.loading import load_installed
from gen_dist.plugins.options import refuse_unwritable
from gen_dist.plugins.tables import Table

C = TypeVar("C")
Config = TypeVar("Config", bound=type[Any])


class Registry(Generic[C]):
    """Config classes of one sort of part (objective or network), by kind."""

    def __init__(self, sort: str, base: type[C], folder: str, facts: Sequence[str] = ()) -> None:
        """Create an empty registry.

        Args:
            sort: name of the sort in errors, such as `objective`.
            base: base class of all its configs.
            folder: package with the modules that may register parts, such as `gen_dist.objectives`.
            facts: names of the class variables that each config has to set.
        """
        self._sort = sort
        self._base = base
        self._folder = folder
        self._facts = facts
        self._table: Table[type[Any]] = Table(sort)
        self._by_kind = self._table.parts
        self._searched = False

    def register(self, config: Config) -> Config:
        """Register a config class under the default of its field `kind`; a decorator above `@dataclass(frozen=True)`.

        Raises:
            ConfigError: the class is not a frozen dataclass of this sort, has no kind, its kind is taken, or it has an
                option that config.json cannot hold.
        """
        name = f"{self._sort} config {config.__qualname__}"
        # A class without the decorator inherits the fields of its base, but has none of its own.
        parameters = vars(config).get("__dataclass_params__")
        if self._base not in config.__mro__ or parameters is None:
            raise ConfigError(f"{name} is not a dataclass derived from {self._base.__name__}")
        if not parameters.frozen:
            raise ConfigError(f"{name} is not frozen; decorate it with @dataclass(frozen=True)")
        kind = getattr(config, "kind", "")
        if not kind:
            raise ConfigError(f'{name} has no kind; give it a field such as kind: Literal["mine"] = "mine"')
        if missing := [fact for fact in self._facts if not hasattr(config, fact)]:
            raise ConfigError(f"{name} does not say its {', '.join(missing)}; see {self._base.__module__}")
        refuse_unwritable(config, name)
        # A kind is chosen by a preset, config.json or --network. As an option it would stand in --help once a part.
        one_of, hidden = cast(Any, Literal), cast(Any, Suppress)  # a type made at run time
        config.__annotations__["kind"] = hidden[one_of[kind]]
        known = self._by_kind.get(kind)
        if known is None or (known.__module__, known.__qualname__) != (config.__module__, config.__qualname__):
            self._table.add(kind, config)
        self._by_kind[kind] = config
        return config

    def configs(self) -> tuple[type[C], ...]:
        """All config classes, including those of modules found in the folder and of installed plug-ins."""
        if not self._searched:
            self._searched = True
            for module in _modules_with(f"@{self._sort}s.register", self._folder):
                importlib.import_module(module)
            load_installed()
        return tuple(self._by_kind.values())

    def __getitem__(self, kind: str) -> type[Any]:
        """The config class of a kind.

        Raises:
            ConfigError: no part has that kind; lists the kinds.
        """
        self.configs()
        if kind not in self._by_kind:
            raise ConfigError(f"unknown {self._sort} {kind!r}; there are {', '.join(self._by_kind)}")
        return self._by_kind[kind]


def load(place: str) -> Any:
    """Import the class at `module:Class`, and torch with it.

    Raises:
        ConfigError: the module has no such class.
    """
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ConfigError(f"a config names its class as {place}, but {found.__file__} has no {name}")
    return getattr(found, name)


def _modules_with(text: str, folder: str) -> list[str]:
    """Names of a package's modules that contain a text, without importing any."""
    spec = importlib.util.find_spec(folder)
    places = spec.submodule_search_locations if spec else None
    files = sorted(file for place in places or [] for file in Path(place).glob("[!_]*.py"))
    return [f"{folder}.{file.stem}" for file in files if text in file.read_text(encoding="utf-8")]
