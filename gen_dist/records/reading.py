"""Reading of a run's files. Damage, a file that is unreadable just now, and another version are three errors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gen_dist.config import TrainConfig
from gen_dist.errors import (
    CheckpointError,
    DamagedError,
    OtherVersionError,
    UnknownNameError,
    UnreadableError,
    shortened,
)
from gen_dist.files import read_regular, unreadable, write_atomically
from gen_dist.records.run_paths import RunPaths

_DIGEST = "sha256"
"""Field with the digest of the other fields."""


class Kind(NamedTuple):
    """Kind of JSON value that a field takes."""

    name: str
    """Name in error messages, with its article."""
    fits: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    """True for numbers that a float can hold. JSON's integers have any size."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


COUNT = Kind("a whole number of at least 0", _is_count)
NUMBER = Kind("a number", _is_number)
SECONDS = Kind("a number of at least 0", lambda value: _is_number(value) and math.isfinite(value) and value >= 0)
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def list_of(kind: Kind) -> Kind:
    """Kind of lists whose items are all of one kind."""
    return Kind(f"a list, each item {kind.name}", lambda value: isinstance(value, list) and all(map(kind.fits, value)))


def object_with(**fields: Kind) -> Kind:
    """Kind of objects with these fields, and others unchecked."""
    return Kind(
        f"an object with {', '.join(fields)}",
        lambda value: (
            isinstance(value, dict) and all(name in value and kind.fits(value[name]) for name, kind in fields.items())
        ),
    )


def values_of(kind: Kind) -> Kind:
    """Kind of an object whose values are all of one kind."""
    return Kind(
        f"an object with {kind.name} in each field",
        lambda value: isinstance(value, dict) and all(map(kind.fits, value.values())),
    )


def either(*kinds: Kind | None) -> Kind:
    """Kind of values of one of several kinds. None stands for null, and for a field that may be missing."""
    given = [kind for kind in kinds if kind is not None]
    return Kind(
        " or ".join(["null" if kind is None else kind.name for kind in kinds]),
        lambda value: (value is None and None in kinds) or any(kind.fits(value) for kind in given),
    )


def read_file(path: Path) -> bytes:
    """Read a whole file of a run.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: the system does not give it just now.
    """
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # the directory is a file
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise UnreadableError(unreadable(path, error)) from None


def parsed_object(text: bytes | str, shape: Mapping[str, Kind]) -> dict[str, Any]:
    """Parse a JSON object whose fields have these kinds. Fields beyond them are kept unchecked.

    Raises:
        ValueError: it is not JSON, not an object, or a field is of another kind. The message says which.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    check_fields(found, shape)
    return found


def check_fields(found: Mapping[str, Any], shape: Mapping[str, Kind]) -> None:
    """Raise ValueError if a field is missing or not of its kind. The message says which."""
    for name, kind in shape.items():
        if name not in found and not kind.fits(None):
            raise ValueError(f"it has no {name}")
        if not kind.fits(found.get(name)):
            raise ValueError(f"{name} is not {kind.name}")


def write_object(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all, with a digest of its content that `read_object` compares.

    Raises:
        OSError: it cannot be written.
    """
    content = json.loads(json.dumps(fields))
    write_atomically(path, json.dumps(content | {_DIGEST: _digest_of(content)}, indent=2) + "\n")


def read_object(path: Path, shape: Mapping[str, Kind], way_out: str) -> dict[str, Any]:
    """Read a JSON object whose fields have these kinds. Fields beyond them are kept unchecked.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: the system does not give it just now.
        DamagedError: it is not such an object; the message ends with `way_out`.
    """
    try:
        found = parsed_object(read_file(path), shape)
        digest = found.pop(_DIGEST, None)  # older versions wrote none
        if digest is not None and digest != _digest_of(found):
            raise ValueError("its content has another digest than it says")
        return found
    except ValueError as error:
        if isinstance(error, UnreadableError):
            raise
        raise DamagedError(f"{path} is damaged: {shortened(str(error))}; {way_out}") from None


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_config(path: Path) -> TrainConfig:
    """Read the config.json of a run or checkpoint.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: the system does not give it just now.
        OtherVersionError: it has options that this version does not have.
        ConfigError: it is not JSON, or a value is of a wrong type or out of range.
    """
    try:
        return TrainConfig.from_json(read_file(path).decode(errors="replace"), str(path), of_run=True)
    except UnknownNameError as error:
        raise OtherVersionError(f"{error}; read this run with the version that environment.json names") from None


def config_of_run(run_path: Path) -> TrainConfig:
    """Read the config of a run directory.

    Raises:
        CheckpointError: there is no run, or its config cannot be read just now, or is of another version.
        ConfigError: its config.json is not JSON, or a value is of a wrong type or out of range.
    """
    try:
        return read_config(RunPaths(run_path).config)
    except FileNotFoundError:
        what = "is not a run directory: it has no config.json" if run_path.exists() else "does not exist"
        raise CheckpointError(f"{run_path} {what}; train one with gen-dist train PRESET --run-dir {run_path}") from None
