"""Space of a sweep: its parsing, the trials drawn from it, and the command of a config.

This file imports neither Ray nor torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from gen_dist.config import RoleName, TrainConfig
from gen_dist.config.options import line_about_roles, of_role, refuse_vain, refuse_vain_of_role, roles_reached
from gen_dist.errors import ConfigError
from gen_dist.network_options import ROLES

Value = Any
"""Value of a config field: a number, a string, a bool, None or a tuple."""

_DRAWS = 200
"""Attempts to draw a trial that differs from earlier ones."""
_DIGITS = 4
"""Significant digits of a drawn number: few enough to read and type."""

_RANGES = ("log", "uniform", "int")
_FIXED = {
    **dict.fromkeys(("preset", "run_dir"), "it names the runs"),
    **dict.fromkeys(("data", "data_root", "packing"), "metrics on different images do not compare"),
    "objective.likelihood": "metrics of different likelihoods do not compare",
    "objective.dynamic_binarization": "metrics of binary and of real-valued pixels do not compare",
    **dict.fromkeys(("plugins", "accept_changed_plugins"), "all trials run the same code"),
    **dict.fromkeys(("start_from", "start_digest"), "all trials start from the same weights"),
    "steps": "early stopping needs the same number of steps in all trials",
    **dict.fromkeys(
        ("accumulation", "auto_accumulation", "compile", "cuda_graphs", "device", "precision", "split_state"),
        "it changes how, not what is computed; set it for all trials",
    ),
    **dict.fromkeys(
        (
            "checkpoint_every",
            "keep_checkpoints",
            "keep_best",
            "sample_every",
            "evaluate_every",
            "log_every",
            "wandb",
            "track",
        ),
        "it changes what is recorded, not what is learned; set it for all trials",
    ),
}
"""Fields that cannot be searched, or the first part of their names, with the reason."""


@dataclass(frozen=True)
class Searched:
    """A searched field of the config, and its possible values."""

    name: str
    """Name in config.json: `network.latent_dim`."""
    text: str
    """Values as the user wrote them."""
    scale: Literal["choice", "log", "uniform"]
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    """True for integers, from low to high inclusive."""

    @property
    def short_name(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(".")[2]

    def draw(self, rng: np.random.Generator) -> Value:
        """Draw one value."""
        if self.scale == "choice":
            return self.choices[int(rng.integers(len(self.choices)))]
        # The range is half a number wider on both sides, so that rounding makes its ends as likely as the rest.
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        log = self.scale == "log"
        number = math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)
        number = round(number) if self.whole else float(f"{number:.{_DIGITS}g}")
        return type(number)(min(max(number, self.low), self.high))

    def values(self) -> Sequence[Value] | None:
        """All possible values, or None if they are not countable."""
        if self.scale == "choice":
            return self.choices
        return range(int(self.low), int(self.high) + 1) if self.whole else None


def parse_space(words: Sequence[str], config: TrainConfig) -> tuple[Searched, ...]:
    """Parse NAME=VALUES words into searched fields.

    A name is the one in config.json, its last part, or the option of the command line. `ROLE.NAME`, such as
    `discriminator.feature_maps`, gives that role a network of its own. Values are a range
    (uniform:LOW:HIGH, int:LOW:HIGH, or log:LOW:HIGH for both kinds of numbers), or choices separated by commas. In a
    field that takes several values, `+` joins the parts of one choice, and `none` leaves it empty.

    Raises:
        ConfigError: an unknown name, an invalid value, or a field that cannot be searched.
    """
    hints = _hints(config)
    shared = [role for role in ROLES if getattr(config, role) is None]
    vain = [name for name in hints if _is_vain(config, name)]
    space: dict[str, Searched] = {}
    for word in words:
        written, equals, text = word.partition("=")
        if not equals or not text:
            raise ConfigError(f"--space {word!r} has no values; write NAME=VALUES, as in learning_rate=log:1e-4:1e-2")
        name = _full_name(written, list(hints), shared, vain)
        if name in space:
            raise ConfigError(f"--space names {name} twice")
        space[name] = _parse_values(name, hints[name], text)
    if not space:
        raise ConfigError("nothing to search; name fields and values, as in --space learning_rate=log:1e-4:1e-2")
    return tuple(space.values())


def _hints(config: TrainConfig) -> dict[str, Any]:
    """Types of the config's fields by dotted name, for its own kinds of networks and objective."""
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(TrainConfig).items():
        part = _part(config, name) if name in config.objective.roles else getattr(config, name)
        if name in ROLES and name not in config.objective.roles:
            continue
        if dataclasses.is_dataclass(part):
            inner_hints = get_type_hints(type(part))
            hints |= {f"{name}.{field.name}": inner_hints[field.name] for field in dataclasses.fields(part)}
        else:
            hints[name] = hint
    return hints


def _is_vain(config: TrainConfig, name: str) -> bool:
    """Return True if a field of a network, by its full name, changes the network of no role."""
    part, _, field = name.rpartition(".")
    if field == "kind" or (part != "network" and part not in ROLES):
        return False
    if part != "network":
        return not _part(config, part).changes(field, part)
    return not roles_reached(config, field)[0]


def lines_about_roles(space: Sequence[Searched], config: TrainConfig) -> list[str]:
    """Lines about searched options of `network` that do not reach all roles, as some have networks of their own.

    Args:
        space: the searched fields.
        config: the config of a trial.

    Raises:
        ConfigError: a searched field changes the network of no role.
    """
    names = [one.name for one in space]
    lines = []
    for name in names:
        part, _, field = name.rpartition(".")
        for role in ROLES:
            if part == role:
                refuse_vain_of_role(config, role, field, f"--space {name}")
        if part == "network":
            refuse_vain(config, field, f"--space {name}", partial(_searched_for, field))
            reached, missed = roles_reached(config, field)
            others = {role: full for role in missed if (full := f"{role}.{field}") not in names}
            lines += [line_about_roles(f"--space {name}", reached, others)] if others else []
    return lines


def _searched_for(field: str, roles: Sequence[RoleName]) -> str:
    """Way out that searches a field of each of some roles."""
    if field == "latent_dim" and len(roles) > 1:  # searched one by one, they would differ in most trials
        return "start from a config in which these roles share one network"
    return f"search {' and '.join(f'{role}.{field}' for role in roles)}"


def _full_name(written: str, names: Sequence[str], shared: Collection[str], vain: Collection[str]) -> str:
    """Full name of a field.

    Args:
        written: the name as the user wrote it: a full one or its last part.
        names: full names of all fields.
        shared: roles without a network of their own, whose fields need the role's name.
        vain: full names of fields that change nothing.
    """
    name = written.strip().removeprefix("--").replace("-", "_")
    short = [full for full in names if full.rpartition(".")[0] not in shared and full not in vain]
    found = [name] if name in names else [full for full in short if full.rpartition(".")[2] == name]
    if len(found) > 1:
        raise ConfigError(f"--space {written} may be {' or '.join(found)}; write one of these")
    if not found:
        searched = [full for full in short if _why_fixed(full) is None]
        by_last = {full.rpartition(".")[2]: full for full in searched}
        near = difflib.get_close_matches(name.rpartition(".")[2], by_last, n=3, cutoff=0.6)
        perhaps = f"perhaps you meant {' or '.join(by_last[last] for last in near)}" if near else ""
        raise ConfigError(
            f"--space {written} is not a field of this config; {perhaps or 'its fields are ' + ', '.join(searched)}"
        )
    if reason := _why_fixed(found[0]):
        raise ConfigError(f"--space {found[0]} cannot be searched: {reason}")
    return found[0]


def _why_fixed(name: str) -> str | None:
    part, _, last = name.rpartition(".")
    if last == "kind":
        return "a run has one kind; sweep each kind from its own preset or config file"
    return _FIXED.get(name) or _FIXED.get(part)


def _parse_values(name: str, hint: Any, text: str) -> Searched:
    scale, *ends = text.split(":")
    if scale in _RANGES:
        return _parse_range(name, hint, text, scale, ends)
    choices = tuple(_parse_choice(name, hint, word.strip()) for word in text.split(","))
    if len(set(choices)) < len(choices):
        raise ConfigError(f"--space {name}={text} names a value twice")
    return Searched(name, text, "choice", choices)


def _parse_range(name: str, hint: Any, text: str, scale: str, ends: Sequence[str]) -> Searched:
    shown = f"--space {name}={text}"
    number = next((kind for kind in (int, float) if kind in _alternatives(hint)), None)
    if number is None:
        raise ConfigError(f"{shown}: {name} is not a number; name choices separated by commas")
    try:
        low, high = map(float, ends)
    except ValueError:
        raise ConfigError(f"{shown} is not a range; write {scale}:LOW:HIGH") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{shown}: LOW must be less than HIGH")
    whole = number is int
    if scale == "int" and not whole:
        raise ConfigError(f"{shown}: {name} takes fractions; use uniform or log")
    if scale == "uniform" and whole:
        raise ConfigError(f"{shown}: {name} is an integer; use int, or log to prefer small numbers")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{shown}: {name} is an integer; so must be LOW and HIGH")
    if scale == "log" and low <= 0:
        raise ConfigError(f"{shown}: a logarithmic range starts above 0")
    return Searched(name, text, "log" if scale == "log" else "uniform", (), low, high, whole)


def _alternatives(hint: Any) -> list[Any]:
    """Types that a field may have."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [one for option in get_args(hint) for one in _alternatives(option)]
    return [hint]


def _parse_choice(name: str, hint: Any, text: str) -> Value:
    options = _alternatives(hint)
    if text.lower() == "none" and NoneType in options:
        return None
    for option in options:
        try:
            return _parse_as(option, text)
        except ValueError:
            continue
    raise ConfigError(f"--space {name}: {text!r} is not a value of it; it takes {' or '.join(map(_spelled, options))}")


def _parse_as(option: Any, text: str) -> Value:
    """Parse the text as a value of this type.

    Raises:
        ValueError: the text is not such a value.
    """
    if get_origin(option) is Literal:
        found = [choice for choice in get_args(option) if str(choice) == text]
        if found:
            return found[0]
    elif get_origin(option) is tuple:
        kinds = get_args(option)
        # The `+` inside a number such as 1e+3 is not a separator.
        words = [] if text.lower() == "none" else re.split(r"(?<![0-9.][eE])\+", text)
        if kinds[1:] == (...,):
            return tuple(_parse_as(kinds[0], word) for word in words)
        if len(words) == len(kinds):
            return tuple(_parse_as(kind, word) for kind, word in zip(kinds, words, strict=True))
    elif option is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif option in (int, float, str):
        return option(text)
    raise ValueError(text)


def _spelled(option: Any) -> str:
    if get_origin(option) is Literal:
        return ", ".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        kinds = get_args(option)
        many = f"several of {_spelled(kinds[0])}" if kinds[1:] == (...,) else " and ".join(map(_spelled, kinds))
        return f"{many}, joined by +"
    names = {NoneType: "none", bool: "true or false", int: "an integer", float: "a number"}
    return names.get(option, option.__name__)


def draw_trials(space: Sequence[Searched], seed: int, count: int) -> list[dict[str, Value]]:
    """Draw the searched fields of each trial, by name; no two trials are equal.

    A trial's values depend on seed, index and field alone, unless they would repeat an earlier trial. More trials or
    another order of the fields therefore change nothing.

    Raises:
        ConfigError: the space has fewer different trials.
    """
    trials: list[dict[str, Value]] = []
    seen: set[tuple[Value, ...]] = set()
    for index in range(count):
        for attempt in range(_DRAWS):
            values = {
                one.name: one.draw(np.random.default_rng([seed, index, attempt, zlib.crc32(one.name.encode())]))
                for one in space
            }
            if tuple(values.values()) not in seen:
                break
        else:
            values = _unseen(space, seen)
        seen.add(tuple(values.values()))
        trials.append(values)
    return trials


def _unseen(space: Sequence[Searched], seen: set[tuple[Value, ...]]) -> dict[str, Value]:
    """First unused combination of values, for a space with so few left that drawing one is unlikely."""
    every = [one.values() for one in space]
    left = itertools.product(*(values for values in every if values is not None)) if None not in every else ()
    for combination in left:
        if combination not in seen:
            return {one.name: value for one, value in zip(space, combination, strict=True)}
    raise ConfigError(f"the space has {len(seen)} different trials; use --trials {len(seen)}, or a larger --space")


def with_values(config: TrainConfig, values: Mapping[str, Value]) -> TrainConfig:
    """Config with other values in fields of these dotted names.

    Raises:
        ConfigError: a value is out of range, or values exclude each other.
    """
    parts: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        part, _, last = name.rpartition(".")
        parts.setdefault(part, {})[last] = value
    changes = parts.pop("", {})
    for part, inner in parts.items():
        before = _part(config, part)
        try:
            changes[part] = dataclasses.replace(before, **inner)
        except ConfigError as error:
            raise (ConfigError(of_role(str(error), before, part)) if part in ROLES else error) from None
    return dataclasses.replace(config, **changes)


def _part(config: TrainConfig, name: str) -> Any:
    """A part of a config; of a role without a network of its own, that of all roles."""
    part = getattr(config, name)
    return config.network if part is None and name in ROLES else part


def trial_configs(config: TrainConfig, trials: Sequence[Mapping[str, Value]]) -> list[TrainConfig]:
    """Config of each trial.

    Raises:
        ConfigError: a config is invalid; the message names its trial.
    """
    configs = []
    for index, values in enumerate(trials):
        try:
            configs.append(with_values(config, values))
        except ConfigError as error:
            raise ConfigError(f"trial {index} ({all_as_typed(values)}) is invalid: {error}") from None
    return configs


def as_typed(value: Value) -> str:
    """Format a value as it is typed in a space: 0.0023, 400+200, none."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return "+".join(map(as_typed, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def all_as_typed(values: Mapping[str, Value]) -> str:
    """Format values by their short names: `learning_rate 0.0023, latent_dim 16`."""
    return ", ".join(f"{short} {as_typed(values[name])}" for name, short in short_names(list(values)).items())


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Last parts of dotted names, by name; a name whose last part another one has, too, stays whole."""
    last = {name: name.rpartition(".")[2] for name in names}
    counts = Counter(last.values())
    return {name: short if counts[short] == 1 else name for name, short in last.items()}


def train_command(source: Sequence[str], base: TrainConfig, config: TrainConfig) -> str:
    """Command that trains a config.

    Args:
        source: words that name its source: a preset, or --config FILE.
        base: config of these words alone.
        config: config to train, which differs from `base` in values only.
    """
    words = ["gen-dist", "train", *source]
    for field in dataclasses.fields(TrainConfig):
        if field.name == "plugins":  # among the words that name the source
            continue
        before, after = getattr(base, field.name), getattr(config, field.name)
        if field.name == "network" or field.name in ROLES:
            words += _network_words(field.name, base, config)
        elif dataclasses.is_dataclass(after):
            words += _part_words(before, after, "")
        else:
            words += _option(field.name, before, after)
    return shlex.join(words)


def _network_words(name: str, base: TrainConfig, config: TrainConfig) -> list[str]:
    """Words that choose the network of all roles or of one, and its options."""
    after = getattr(config, name)
    if after is None:
        return []
    before = getattr(base, name)
    start = base.network if before is None else before
    if before is None and config.network.kind != start.kind:  # a role starts from the network that is chosen for all
        start = type(config.network)()
    words = []
    if before is None or after.kind != start.kind:
        words = [f"--{name}", after.kind]
        start = start if after.kind == start.kind else type(after)()
    return words + _part_words(start, after, "" if name == "network" else f"{name}.")


def _part_words(before: Any, after: Any, prefix: str) -> list[str]:
    values = [(one.name, getattr(before, one.name), getattr(after, one.name)) for one in dataclasses.fields(after)]
    return [word for name, old, new in values for word in _option(f"{prefix}{name}", old, new)]


def _option(name: str, before: Value, after: Value) -> list[str]:
    if before == after:
        return []
    option = name.replace("_", "-")
    if isinstance(after, bool):
        role, dot, last = option.rpartition(".")
        return [f"--{option}" if after else f"--{role}{dot}no-{last}"]
    return [f"--{option}", *map(str, after if isinstance(after, tuple) else (after,))]
