"""All checks of all parts that a plug-in registers, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from gen_dist.config import NetworkConfig, ObjectiveConfig, RoleName, TrainConfig, networks, objectives
from gen_dist.data.catalogue import source_kinds
from gen_dist.errors import ConfigError
from gen_dist.plugins import Plugin
from gen_dist.plugins.tables import parts_of
from gen_dist.presets import get_preset
from gen_dist.testing.metrics import check_metric
from gen_dist.testing.networks import check_network
from gen_dist.testing.objectives import check_objective
from gen_dist.testing.report import Announce, Failure, Result
from gen_dist.testing.sources import check_source

_WIDTHS = (28, 56, 8)


def check_plugin(
    plugin: Plugin, image_shape: tuple[int, int, int], data: Sequence[str], *, slow: bool, announce: Announce
) -> list[Result]:
    """Check every part that a loaded plug-in registers.

    Args:
        plugin: its record.
        image_shape: (C, H, W) of the images of objectives and networks.
        data: sources with a path to read, as `--data` takes them.
        slow: also compile objectives, and train them in two processes.
        announce: takes each check as it begins, and its result.

    Raises:
        ConfigError: the plug-in registers nothing, or `data` names a source that is not its own.
    """
    parts = parts_of(plugin.name)
    if not parts:
        raise ConfigError(f"plug-in {plugin.name} registers nothing; see `gen_dist.plugins`")
    own = [name for sort, name in parts if sort == "data source"]
    if other := [name for name in data if name.partition(":")[0] not in own]:
        raise ConfigError(f"{other[0]} is no source of {plugin.name}, which registers {', '.join(own) or 'none'}")
    results: list[Result] = []

    def collect(result: Result) -> None:
        if result.outcome != "running":
            results.append(result)
        announce(result)

    for sort, name in parts:
        try:
            if sort == "objective":
                for objective, network, roles in _trained(name, parts):
                    check_objective(
                        objective, network, roles=roles, image_shape=image_shape, slow=slow, announce=collect
                    )
            elif sort == "network":
                check_network(networks[name](), image_shape=image_shape, announce=collect)
            elif sort == "metric":
                check_metric(name, announce=collect)
            elif sort == "data source":
                _check_source(name, data, collect)
            elif sort == "preset":
                _check_preset(name, parts, image_shape, slow, collect)
            else:
                _skip(name, f"a {sort} has no checks", collect)
        except Failure:
            continue  # each failure is among the results
    return results


def _skip(part: str, reason: str, announce: Announce) -> None:
    announce(Result(part, "all checks", "running", "", 0.0))
    announce(Result(part, "all checks", "skipped", reason, 0.0))


def _check_source(name: str, data: Sequence[str], collect: Announce) -> None:
    named = [one for one in data if one.partition(":")[0] == name]
    if source_kinds()[name].takes_path and not named:
        _skip(name, f"name a file with --data {name}:PATH", collect)
    for one in named or ([] if source_kinds()[name].takes_path else [name]):
        check_source(one, announce=collect)


def _check_preset(
    name: str, parts: Sequence[tuple[str, str]], image_shape: tuple[int, int, int], slow: bool, announce: Announce
) -> None:
    """Check an objective of this package on the plug-in's networks; the plug-in's own are checked beside it."""
    config = get_preset(name)
    if ("objective", config.objective.kind) in parts:
        return
    roles = _roles_of(config)
    if not any(("network", one.kind) in parts for one in (config.network, *roles.values())):
        return

    def of_preset(result: Result) -> None:
        announce(replace(result, part=name))

    check_objective(
        config.objective, config.network, roles=roles, image_shape=image_shape, slow=slow, announce=of_preset
    )


def _roles_of(config: TrainConfig) -> dict[RoleName, NetworkConfig]:
    names: tuple[RoleName, ...] = get_args(RoleName)
    return {role: own for role in names if (own := getattr(config, role))}


def _trained(
    kind: str, parts: Sequence[tuple[str, str]]
) -> Sequence[tuple[ObjectiveConfig, NetworkConfig | None, dict[RoleName, NetworkConfig]]]:
    """An objective with the networks and roles that the plug-in's presets give it; without a preset, a small one."""
    configs = [get_preset(name) for sort, name in parts if sort == "preset"]
    found: list[tuple[ObjectiveConfig, NetworkConfig | None, dict[RoleName, NetworkConfig]]] = [
        (one.objective, one.network, _roles_of(one)) for one in configs if one.objective.kind == kind
    ]
    return found or [(objectives[kind](), None, {})]


def print_row(result: Result) -> None:
    """Print the first half of a check's row when it begins, so that nobody waits in the dark, the rest when it ends.

    A failure or a skipped check has its reason on the line.
    """
    if result.outcome == "running":
        print(_cells(result.part, result.check), end=" ", flush=True)
        return
    reason = " ".join(result.reason.split())
    outcome = result.outcome.ljust(_WIDTHS[-1])
    print(f"{outcome} {result.seconds:6.2f} s{f'  {reason}' if reason else ''}", flush=True)


def heading() -> str:
    """Names of the table's columns."""
    return f"{_cells('part', 'check', 'result')} seconds"


def _cells(*texts: str) -> str:
    return " ".join(text.ljust(width) for text, width in zip(texts, _WIDTHS, strict=False))


def summary(results: Sequence[Result]) -> str:
    """Number of results by outcome."""
    counts = [(sum(one.outcome == kind for one in results), kind) for kind in ("passed", "failed", "skipped")]
    return ", ".join(f"{count} {kind}" for count, kind in counts if count)
