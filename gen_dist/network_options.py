"""Options that choose networks: `--network KIND`, `--encoder KIND` and the like, and `--encoder.OPTION` of one role."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

from gen_dist.config import NetworkConfig, RoleName, TrainConfig, networks
from gen_dist.config.options import (
    line_about_roles,
    network_option,
    refuse_vain,
    refuse_vain_network,
    refuse_vain_of_role,
    roles_reached,
)
from gen_dist.errors import ConfigError

ROLES: tuple[RoleName, ...] = get_args(RoleName)


def with_networks(
    config: TrainConfig, words: Sequence[str], parse: Callable[[NetworkConfig, Sequence[str], str], NetworkConfig]
) -> tuple[TrainConfig, list[str]]:
    """Take the options that choose networks out of the words of a command line.

    A kind other than the config's starts from its own defaults. Options without a role are left: they belong to the
    rest of the config, with those of `network`.

    Args:
        config: the config to start from.
        words: words of the command line after the preset.
        parse: parses the options of one network: its config, their words without the role, and the role.

    Returns:
        the config with the chosen networks, and the other words.

    Raises:
        ConfigError: an unknown kind, an option without its value, or what `parse` raises.
    """
    kinds: dict[str, str] = {}
    own: dict[str, list[str]] = {role: [] for role in ROLES}
    others: list[str] = []
    taking = others
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            taking = others
            if name in ("network", *ROLES):
                kinds[name] = value if equals else next(rest, "")
                if not kinds[name] or kinds[name].startswith("--"):
                    raise ConfigError(f"--{name} needs a kind of network: {', '.join(kinds_of_networks())}")
                continue
            role, dot, option = name.partition(".")
            if dot and role in own:
                taking = own[role]
                word = f"--{option}{equals}{value}"
        taking.append(word)
    config = dataclasses.replace(config, network=_of_kind(config.network, kinds.get("network")))
    for role in ROLES:
        if role in kinds or own[role]:
            chosen = _of_kind(getattr(config, role) or config.network, kinds.get(role))
            chosen = parse(chosen, own[role], role) if own[role] else chosen
            changed: dict[str, Any] = {role: chosen}
            config = dataclasses.replace(config, **changed)
    return config, others


def lines_about_roles(preset: TrainConfig, config: TrainConfig, words: Sequence[str]) -> list[str]:
    """Lines about the given options of `network` that do not reach all roles, as some have networks of their own.

    Args:
        preset: the config that the command line starts from.
        config: the config with the networks that the command line chooses.
        words: words of the command line after the preset.

    Raises:
        ConfigError: an option changes the network of no role; the line names the option of the role that has it.
    """
    typed = dict.fromkeys(word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--"))
    given = {option.replace("-", "_") for option in typed}
    roles = config.objective.roles
    lines = []
    for option in typed:
        name = option.replace("-", "_")
        for role in roles:
            if name.startswith(f"{role}."):
                field = name.removeprefix(f"{role}.")
                field = field if field in _names_of(getattr(config, role)) else field.removeprefix("no_")
                refuse_vain_of_role(config, role, field, f"--{option}")
        if not network_option(config, name):
            name = name.removeprefix("no_")
        if network_option(config, name):
            refuse_vain(config, name, f"--{option}", partial(_written_for, option))
            reached, missed = roles_reached(config, name)
            missed = [role for role in missed if f"{role}.{name}" not in given]
            if missed:
                others = {role: f"--{role}.{option}" for role in missed}
                lines.append(line_about_roles(f"--{option}", reached, others))
    kept = [role for role in roles if getattr(preset, role) is not None and role not in given]
    if "network" in given:
        ways = " and ".join(f"--{role} KIND" for role in kept)
        refuse_vain_network(config, "--network", f"write {ways}" if ways else "")
    if kept and config.network.kind != preset.network.kind:
        taking = [role for role in roles if getattr(config, role) is None]
        lines.append(line_about_roles("--network", taking, {role: f"--{role} KIND" for role in kept}))
    return lines


def _written_for(option: str, roles: Sequence[RoleName]) -> str:
    """Way out that writes an option for each of some roles."""
    return f"write {' and '.join(f'--{role}.{option}' for role in roles)}"


def _names_of(network: NetworkConfig) -> list[str]:
    return [one.name for one in dataclasses.fields(network)]


def kinds_of_networks() -> list[str]:
    """Kinds of all registered networks."""
    return [config.kind for config in networks.configs()]


def help_lines(config: TrainConfig) -> list[str]:
    """Lines of --help about the options of this module."""
    kinds = ", ".join(kinds_of_networks())
    own = [f"{role} {chosen.kind}" for role in ROLES if (chosen := getattr(config, role))]
    return [
        f"--network KIND          network of all roles: {kinds} (default: {config.network.kind})",
        f"--ROLE KIND             network of one role: {', '.join(ROLES)} (default: {', '.join(own) or 'that of all'})",
        "--ROLE.OPTION VALUE     option of the network of one role, such as --discriminator.feature-maps",
        *_help_of_own(config),
    ]


def _help_of_own(config: TrainConfig) -> list[str]:
    """Lines of --help where roles have networks of their own: their options, and values that are not defaults."""
    roles = config.objective.roles
    own = {role: chosen for role in roles if (chosen := getattr(config, role)) is not None}
    if not own:
        return []
    others = [role for role in roles if role not in own]
    reached = f"the {' and '.join(others)} alone" if others else "no role"
    lines = [f"Here --network and options of networks without a role reach {reached}."]
    for role, chosen in own.items():
        usual: Any = type(chosen)()
        values = [
            _typed(f"{role}.{name.replace('_', '-')}", getattr(chosen, name))
            for name in _names_of(chosen)
            if chosen.changes(name, role) and getattr(chosen, name) != getattr(usual, name)
        ]
        lines.append(f"The {role} has --{role}.OPTION instead" + (f": {', '.join(values)}" if values else "."))
    return lines


def _typed(option: str, value: object) -> str:
    """Option and value as on the command line."""
    if isinstance(value, bool):
        role, _, name = option.rpartition(".")
        return f"--{option}" if value else f"--{role}.no-{name}"
    return f"--{option} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _of_kind(config: NetworkConfig, kind: str | None) -> NetworkConfig:
    if kind is None or kind == config.kind:
        return config
    chosen: Any = networks[kind]
    network: NetworkConfig = chosen()
    return network
