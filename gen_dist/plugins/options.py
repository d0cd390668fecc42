"""Checks of the options of a part's config: each can be typed, written to config.json and read back equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from gen_dist.errors import ConfigError

_PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    NoneType: (NoneType,),
}
"""Types of options, and the types of their values."""


def refuse_unwritable(config: type[Any], name: str) -> None:
    """Raise ConfigError if an option of a config has no default, or a type that config.json cannot hold.

    Args:
        config: a dataclass.
        name: its name in the error.
    """
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if not field.init:
            raise ConfigError(
                f"{name}: {field.name} has init=False, so config.json cannot give it back; use a property"
            )
        if (other := _unwritable(hint)) is not None:
            kind = getattr(other, "__name__", other)
            raise ConfigError(
                f"{name}: {field.name} has the type {kind}, which config.json cannot hold; an option is bool, int, "
                "float, str, None, a Literal, or a tuple, list or dict of these"
            )
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            raise ConfigError(f"{name}: {field.name} has no default, and every option has one")
        if not _fits(default, hint):
            raise ConfigError(f"{name}: the default {default!r} of {field.name} is not of its type")


def _unwritable(hint: Any) -> Any:
    """First type in a hint that config.json cannot hold; None if there is none."""
    if hint in _PLAIN or hint in (Any, ..., tuple, list, dict) or get_origin(hint) in (Literal, ClassVar):
        return None
    if get_origin(hint) in (Union, UnionType, tuple, list, dict):
        return next((other for one in get_args(hint) if (other := _unwritable(one)) is not None), None)
    return hint


def _fits(value: Any, hint: Any) -> bool:
    """True if a value is of a type that `_unwritable` lets pass."""
    if hint in _PLAIN:
        return isinstance(value, _PLAIN[hint]) and (hint is bool or not isinstance(value, bool))
    origin, inner = get_origin(hint), get_args(hint)
    checks: dict[Any, Callable[[], bool]] = {
        Literal: lambda: value in inner,
        Union: lambda: any(_fits(value, one) for one in inner),
        UnionType: lambda: any(_fits(value, one) for one in inner),
        tuple: lambda: isinstance(value, tuple) and _all_fit(value, inner),
        list: lambda: isinstance(value, list) and all(_fits(one, inner[0]) for one in value),
    }
    return checks[origin]() if origin in checks else True


def _all_fit(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    if kinds[1:] == (...,):
        return all(_fits(one, kinds[0]) for one in values)
    return len(values) == len(kinds) and all(map(_fits, values, kinds))
