"""Options of a config by the names that they have on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
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


def roles_reached(config: Any, option: str) -> tuple[list[RoleName], list[RoleName]]:
    """Roles of a run whose networks an option of `network` changes, and those that it concerns but does not reach.

    A role that it does not reach has a network of its own, with an option of that name.

    Args:
        config: the config of the run.
        option: field of a network, such as `discriminator_norm`.
    """
    roles = config.objective.roles
    own = [role for role in roles if getattr(config, role) is not None]
    reached = [role for role in roles if role not in own and config.network.changes(option, role)]
    return reached, [role for role in own if getattr(config, role).changes(option, role)]


def network_option(config: Any, name: str) -> bool:
    """Return True if an option without a role is one of `network`, or could be only one of a role's own network."""
    names = [{one.name for one in dataclasses.fields(config)}, *(_options_of(getattr(config, part)) for part in FLAT)]
    own = [getattr(config, role) for role in config.objective.roles]
    of_own = any(name in _options_of(network) for network in own)
    return name in _options_of(config.network) or (of_own and not any(name in known for known in names))


def of_role(line: str, network: Any, role: str) -> str:
    """Error of a network with its options as those of a role: `--hidden-size` becomes `--generator.hidden-size`.

    Args:
        line: the error, for a network of all roles. Options of other parts, such as `--image-size`, stay as they are.
        network: config of the network, or its class.
        role: the role.
    """
    names = {one.name for one in dataclasses.fields(network)}

    def with_role(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return f"--{role}.{found[1]}" if name in names or name.removeprefix("no_") in names else found[0]

    return re.sub(r"(?<![\w-])--([\w-]+)", with_role, line)


def of_roles(line: str, config: Any) -> str:
    """Error of a run's networks with its options as those of the role that they are for, where `network` has none that
    reaches it: `--discriminator-norm` becomes `--discriminator.discriminator-norm` if the discriminator has a network
    of its own.

    Args:
        line: the error.
        config: the config of the run.
    """

    def with_role(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        reached, missed = roles_reached(config, name) if network_option(config, name) else ([], [])
        return f"--{missed[0]}.{found[1]}" if not reached and len(missed) == 1 else found[0]

    return re.sub(r"(?<![\w-])--([\w-]+)", with_role, line)


def refuse_vain(config: Any, name: str, written: str, way_out: Callable[[Sequence[RoleName]], str]) -> None:
    """Raise ConfigError if an option of `network` changes nothing, as the roles have networks of their own.

    Args:
        config: the config of the run.
        name: field of the option.
        written: the option as the user wrote it.
        way_out: how to write it for some roles.
    """
    reached, missed = roles_reached(config, name)
    own = missed or [role for role in config.objective.roles if getattr(config, role) is not None]
    if reached or not own:
        return
    have = "has a network of its own" if len(own) == 1 else "have networks of their own"
    raise ConfigError(
        f"{written} changes nothing here: {' and '.join(f'the {role}' for role in own)} {have}"
        + (f"; leave it out, or {way_out(missed)}" if missed else " without it; leave it out")
    )


def refuse_vain_of_role(config: Any, role: RoleName, name: str, written: str) -> None:
    """Raise ConfigError if an option of one role's network changes nothing.

    Args:
        config: the config of the run.
        role: the role.
        name: field of its network.
        written: the option as the user wrote it.
    """
    network = getattr(config, role) or config.network
    if not network.changes(name, role):
        raise ConfigError(
            f"{written} changes nothing: the network of the {role} does not depend on {name}; leave it out"
        )


def refuse_vain_network(config: Any, written: str, way_out: str) -> None:
    """Raise ConfigError if a network for all roles is given and each role has one of its own.

    Args:
        config: the config of the run.
        written: the option as the user wrote it.
        way_out: a further way out besides leaving it out; empty if there is none.
    """
    if all(getattr(config, role) is not None for role in config.objective.roles):
        raise ConfigError(
            f"{written} changes nothing here: all roles have networks of their own; leave it out"
            + (f", or {way_out}" if way_out else "")
        )


def line_about_roles(option: str, reached: Sequence[str], missed: Mapping[RoleName, str]) -> str:
    """Line about an option of `network` that does not reach all roles.

    Args:
        option: the option as the user wrote it.
        reached: roles whose networks it changes.
        missed: the option of each other role that has one of this name.
    """
    whose = " and ".join(f"the {role}'s" for role in reached)
    others = " and ".join(f"the {role}'s is {written}" for role, written in missed.items())
    return f"{option} is {whose} alone here; {others}"


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
