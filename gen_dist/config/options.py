"""Options of a config by the names that they have on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any, get_args

from gen_dist.config.networks import RoleName, networks
from gen_dist.config.objectives import objectives
from gen_dist.errors import ConfigError
from gen_dist.plugins.registry import Registry

FLAT = ("packing", "network", "objective", "optimization", "schedule")
"""Parts whose options have no prefix."""
_REGISTRIES: dict[str, Registry[Any]] = {
    "network": networks,
    "objective": objectives,
    **dict.fromkeys(get_args(RoleName), networks),
}


def with_changes(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config as plain values, with some options replaced.

    Args:
        config: a dataclass with the parts above.
        options: values by flat name, such as `hidden_sizes`, or whole parts, such as `network`: a config or a kind.

    Raises:
        ConfigError: an option does not exist; the line lists near names.
    """
    fields: dict[str, Any] = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    whole = {name: _part(name, value) for name, value in options.items() if name in fields}
    fields |= whole
    homes: dict[str, str] = {}
    for part in FLAT:
        for name in _options_of(fields[part]):
            if homes.setdefault(name, part) != part and name in options:
                raise ConfigError(f"option {name!r} is one of {homes[name]} and of {part}; give the whole {part}")
    plain: dict[str, Any] = {name: _plain(value) for name, value in fields.items()}
    for name, value in options.items():
        if name in whole:
            continue
        if name not in homes:
            near = difflib.get_close_matches(name, [*fields, *homes], n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "`to_json()` of a config lists all"
            raise ConfigError(f"unknown option {name!r} of the {_described(fields)}; {hint}")
        plain[homes[name]][name] = _plain(value)
    return plain


def plain_value(value: Any) -> Any:
    """A value as JSON can write it: paths as text, numbers of NumPy as Python's.

    Raises:
        TypeError: there is no such form.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r:.60} is no value of an option")


def _part(name: str, value: Any) -> Any:
    return _REGISTRIES[name][value]() if name in _REGISTRIES and isinstance(value, str) else value


def _options_of(part: Any) -> list[str]:
    if not dataclasses.is_dataclass(part):
        return []  # a wrong value, which is told when the config is read
    return [one.name for one in dataclasses.fields(part) if one.name != "kind"]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):  # of plug-ins, too
        return tuple(map(_plain, value))
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _described(fields: Mapping[str, Any]) -> str:
    parts = [f"{part} {getattr(fields[part], 'kind', '')}" for part in ("objective", "network")]
    return f"config ({', '.join(parts)})"
