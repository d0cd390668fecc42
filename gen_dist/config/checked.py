"""Base of all configs, and checks of single values."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from gen_dist.errors import ConfigError


@dataclass(frozen=True)
class Checked:
    """Base of configs: it refuses values that a field's type does not name."""

    def __post_init__(self) -> None:
        """Raise ConfigError if a Literal field, or a tuple of them, has a value outside its choices, or one twice."""
        config: Any = type(self)
        for name, choices, is_tuple in _choices_of(config):
            value = getattr(self, name)
            values = tuple(value) if is_tuple else (value,)
            for place, one in enumerate(values):
                if one not in choices:
                    named = [choice for choice in choices if choice is not None]
                    raise ConfigError(f"{name} {one!r} is not one of {', '.join(map(str, named))}")
                if one in values[:place]:
                    raise ConfigError(f"{name} has {one} twice; name it once")


@functools.cache
def _choices_of(config: Any) -> list[tuple[str, tuple[object, ...], bool]]:
    """Name, choices and whether it is a tuple of them, of each Literal field. A class has them once: every --help makes
    a hundred configs.
    """
    found = []
    for name, hint in get_type_hints(config).items():
        if get_origin(hint) is ClassVar:
            continue
        options = (hint, *get_args(hint))
        choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
        if choices:
            none = (None,) if NoneType in options else ()
            found.append((name, (*choices, *none), get_origin(hint) is tuple))
    return found


def at_least(name: str, value: int, least: int) -> None:
    """Raise ConfigError if a value is less than the least allowed, or more than 64 bits hold."""
    if value < least:
        raise ConfigError(f"{name} {value} is less than {least}")
    if value >= 2**63:
        raise ConfigError(f"{name} {value} is not below 2^63")


def finite_and_at_least(name: str, value: float, least: float) -> None:
    """Raise ConfigError if a value is not a number of at least the least allowed."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name} {value} is not a number of at least {least}")
