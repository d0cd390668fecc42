"""Checkpoints: the full state of a run in safetensors and JSON, either whole or absent. Nothing is unpickled.

A checkpoint is the directory `checkpoints/step_00001500` of a run:

    config.json            the run's config
    state.json             everything but tensors: step, digest of the data, loss scales
    NAME.safetensors       tensors: networks, averaged (moving average of the weights), optimizer state of each phase
    SHA256SUMS             digests of the other files, in the format of `sha256sum --check`

A checkpoint is written to a temporary directory, synced to disk, and renamed. Only then are older ones removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.config.labels import scheme_of_json
from gen_dist.data.values import scale_of_json
from gen_dist.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    OtherVersionError,
    PluginError,
    UnreadableError,
    shortened,
)
from gen_dist.files import named_in_utf8, open_regular, read_regular, retrying, sync, unreadable
from gen_dist.records.metrics_file import METRICS
from gen_dist.records.reading import (
    COUNT,
    NUMBER,
    OBJECT,
    SECONDS,
    TEXT,
    Kind,
    check_fields,
    either,
    list_of,
    object_with,
    parsed_object,
)
from gen_dist.records.removal import (
    CHECKPOINT,
    CHECKPOINT_FILE,
    discard_checkpoint,
    move_aside,
    remove_left_over_checkpoints,
)
from gen_dist.records.run_paths import RunPaths

T = TypeVar("T")

FORMAT = 2
_CONFIG, STATE, SUMS = "config.json", "state.json", "SHA256SUMS"
_LOOKS = 100
"""Most times that a reader lists the checkpoints again because a writer has replaced the one it was reading."""
IMAGE_SHAPE = Kind(
    "three whole numbers of at least 1, with fewer than 2^31 values an image",
    lambda value: (
        isinstance(value, list)
        and [type(side) for side in value] == [int] * 3
        and min(value) > 0
        and math.prod(value) < 2**31
    ),
)


def _is_scale(value: Any) -> bool:
    try:
        scale_of_json(value)
    except ValueError:
        return False
    return True


SCALE = Kind("a range of values", _is_scale)
"""Range of the data's values, absent for 8-bit images; see `gen_dist.data.values`."""


def _is_scheme(value: Any) -> bool:
    try:
        scheme_of_json(value, ())
    except ValueError:
        return False
    return True


LABELS = Kind("a meaning of labels", _is_scheme)
"""Meaning of the data's labels, absent for classes that no image lacks; see `gen_dist.config.labels`."""
_STATE_SHAPE = {
    **{"format": COUNT, "step": COUNT, "data_digest": TEXT, "image_shape": IMAGE_SHAPE, "class_names": list_of(TEXT)},
    **{"world_size": COUNT, "training_seconds": SECONDS, "loss_scales": OBJECT, "unlogged": list_of(OBJECT)},
    "values": SCALE,
    "labels": LABELS,
    "best": either(object_with(metric=TEXT, step=COUNT, value=NUMBER), None),
    METRICS: either(object_with(bytes=COUNT, sha256=TEXT), None),
}


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimizer steps."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Groups of named tensors; each group is one file."""
    facts: Mapping[str, Any]
    """Everything else, as JSON values."""


def save(run_path: Path, checkpoint: Checkpoint, config: TrainConfig, keep: int) -> Path:
    """Write a checkpoint, then remove all but the `keep` newest ones; returns its directory.

    Raises:
        CheckpointError: the disk is full or cannot be written to. Existing checkpoints are untouched.
    """
    parent = RunPaths(run_path).checkpoints
    final = RunPaths(run_path).checkpoint(checkpoint.step)
    partial = parent / f".partial-{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_left_over_checkpoints(parent)
        partial.mkdir()
        for name, group in checkpoint.tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            safetensors.torch.save_file(contiguous, partial / f"{name}.safetensors")
        facts = {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts}
        (partial / STATE).write_text(json.dumps(facts, indent=2) + "\n")
        (partial / _CONFIG).write_text(config.to_json())
        names = sorted(path.name for path in partial.iterdir())
        (partial / SUMS).write_text("".join(f"{_digest(partial / name)}  {name}\n" for name in names))
        for name in (*names, SUMS):
            sync(partial / name)
        sync(partial)
        if os.path.lexists(final):  # The run was resumed from an older checkpoint.
            move_aside(final)
        os.replace(partial, final)
        sync(parent)
        for path in checkpoint_paths(run_path):
            if step_of(path) > checkpoint.step:  # damaged, or the run would have been resumed from it
                discard_checkpoint(path)
        keep_newest(run_path, checkpoint.step, keep)
        remove_left_over_checkpoints(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        newest = next((str(path) for path in checkpoint_paths(run_path)), "none")
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} cannot be written to {parent}: {reason}; "
            f"free some space there or choose another --run-dir (newest whole checkpoint: {newest})"
        ) from None
    return final


def keep_newest(run_path: Path, step: int, keep: int) -> None:
    """Remove all but the `keep` newest of the checkpoints up to a step, and the best of them, which the newest names.

    A kill may have come before this.
    """
    found = [path for path in checkpoint_paths(run_path) if step_of(path) <= step]
    if len(found) > keep and (best := _best_step(found[0])) is not None:
        for path in found[keep:]:
            if step_of(path) != best:
                discard_checkpoint(path)


def _best_step(path: Path) -> int | None:
    """Step of the best checkpoint that a checkpoint names; 0 if it names none. None if its file cannot be read: then
    nobody knows which one has to stay."""
    try:
        found = json.loads(read_regular(path / STATE)).get("best")
        return int(found["step"]) if found else 0
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def checkpoint_paths(run_path: Path) -> list[Path]:
    """Directories of the checkpoints of a run, newest first. Their content is not checked.

    Raises:
        UnreadableError: they are on a disk that is not there, or cannot be listed just now.
    """
    parent = RunPaths(run_path).checkpoints
    try:
        found = [path for path in retrying(lambda: list(parent.iterdir())) if CHECKPOINT.fullmatch(path.name)]
        # A directory with nothing but foreign files is what a removed checkpoint leaves.
        saved = [path for path in found if any(CHECKPOINT_FILE.fullmatch(name) for name in _names_in(path))]
    except (FileNotFoundError, NotADirectoryError):
        if parent.is_symlink() and not parent.exists():
            raise UnreadableError(
                f"{parent} is a link to {os.readlink(parent)}, which is not there; mount its disk, or repair the link"
            ) from None
        return []
    except OSError as error:
        raise UnreadableError(unreadable(parent, error)) from None
    return sorted(saved, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Step of the directory of a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def load(path: Path) -> tuple[Checkpoint, TrainConfig]:
    """Read one checkpoint directory, with the config of its run.

    Raises:
        DamagedError: its files are not what was written. The message names the file.
        UnreadableError: the system does not give one of its files just now.
        OtherVersionError: it is of another format than this version reads.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {}
    small: dict[str, bytes] = {}
    for name, file in _verified(path):
        with _reading(path / name):
            if name.endswith(".safetensors"):
                tensors[Path(name).stem] = _load_tensors(path / name)
            else:
                small[name] = _read(file)
    facts = _facts(path, small)
    try:
        config = TrainConfig.from_json(small.get(_CONFIG, b"").decode(), str(path / _CONFIG), of_run=True)
    except PluginError as error:
        raise UnreadableError(str(error)) from None
    except (ConfigError, UnicodeDecodeError) as error:  # the file is as it was written
        raise OtherVersionError(f"{error}; another version of gen_dist wrote this checkpoint: use that one") from None
    del facts["format"]
    return Checkpoint(facts.pop("step"), tensors, facts), config


def read_facts(path: Path) -> dict[str, Any]:
    """Read the state of one checkpoint directory without its tensors, after a comparison of all digests.

    Raises:
        DamagedError, UnreadableError, OtherVersionError: as for `load`.
    """
    small = {}
    for name, file in _verified(path):
        if name == STATE:
            with _reading(path / name):
                small[name] = _read(file)
    return _facts(path, small)


def _facts(path: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    if STATE not in files:
        raise _damaged(path, f"{STATE} is missing")
    try:
        found = parsed_object(files[STATE], {"format": COUNT})
        if found["format"] != FORMAT:
            other = "a newer" if found["format"] > FORMAT else "an older"
            raise OtherVersionError(
                f"checkpoint {path} is of format {found['format']}, and this version reads format {FORMAT}; {other} "
                "gen_dist wrote it: use that one"
            )
        check_fields(found, _STATE_SHAPE)
        return found
    except OtherVersionError:
        raise
    except ValueError as error:
        raise _damaged(path, f"{STATE}: {error}") from None


def first_difference(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str | None:
    """First tensor by name that one of two sets of weights lacks or has in another shape, with both; None if none is.

    `decoder.layers.0.weight is [32, 5] there and [32, 6] here`
    """
    shapes = [{name: list(tensor.shape) for name, tensor in weights.items()} for weights in (there, here)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            before, now = (one.get(name, "missing") for one in shapes)
            return f"{name} is {before} there and {now} here"
    return None


def is_checkpoint(path: Path) -> bool:
    """True for the directory of one checkpoint, whole or damaged; False for that of a run."""
    return (path / STATE).exists() or (path / SUMS).exists()


def _verified(path: Path) -> Iterator[tuple[str, BufferedReader]]:
    """Names and open files of a checkpoint, each compared with its digest in SHA256SUMS.

    All files are opened before the first is read, so a writer that removes the checkpoint meanwhile does no harm.
    """
    with contextlib.ExitStack() as stack:
        with _reading(path / SUMS):
            listed = _read(_open(path / SUMS, stack)).decode(errors="replace")
            # Ignore other files: file managers and network file systems leave some in any directory.
            written = {name for name in _names_in(path) if CHECKPOINT_FILE.fullmatch(name) and name != SUMS}
        sums = [line.split("  ", 1) for line in listed.splitlines()]
        if any(len(line) != 2 for line in sums) or {line[-1] for line in sums} != written:
            raise _damaged(path, f"{SUMS} does not list the files that are there")
        opened = []
        for digest, name in sums:
            with _reading(path / name):
                opened.append((digest, name, _open(path / name, stack)))
        for digest, name, file in opened:
            with _reading(path / name):
                found = _digest_of(file)
            if found != digest:
                raise _damaged(path, f"{name} has another digest than {SUMS} says")
            yield name, file


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Context manager that tells a missing file of a checkpoint from one that cannot be read just now."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        if _identity(file.parent) is None:
            raise DamagedError(f"checkpoint {file.parent} is gone: was it replaced by a newer one?") from None
        raise _damaged(file.parent, f"{file.name} is missing") from None
    except SafetensorError as error:
        raise _damaged(file.parent, f"{file.name}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise UnreadableError(unreadable(file, error)) from None


def _load_tensors(file: Path) -> dict[str, Tensor]:
    def load_file() -> dict[str, Tensor]:
        try:
            with named_in_utf8(file) as name:
                return safetensors.torch.load_file(name)
        except FileNotFoundError:  # safetensors says so whatever kept it from opening the file
            os.close(os.open(file, os.O_RDONLY))  # raises the true reason
            raise OSError(errno.EAGAIN, "it could not be opened") from None
        except RuntimeError as error:  # of torch, which maps the file: `unable to open file <...>: Reason (24)`
            number = re.search(r"\((\d+)\)\s*$", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code)) from None

    return retrying(load_file)


def _open(path: Path, stack: contextlib.ExitStack) -> BufferedReader:
    return stack.enter_context(retrying(lambda: open_regular(path)))


def _read(file: BufferedReader) -> bytes:
    def read() -> bytes:
        file.seek(0)
        return file.read()

    return retrying(read)


def _digest_of(file: BufferedReader) -> str:
    def digest() -> str:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()

    return retrying(digest)


def _names_in(path: Path) -> list[str]:
    """Names in the directory of a checkpoint; none if it is gone."""
    try:
        return retrying(lambda: os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"checkpoint {path} is damaged: {shortened(what)}")


def load_newest(
    run_path: Path, announce: Callable[[str], None], at_most: int | None = None
) -> tuple[Checkpoint, TrainConfig] | None:
    """Load the newest whole checkpoint of a run, or return None if it has no checkpoint; see `newest`."""
    return newest(run_path, load, announce, at_most)


def newest(
    run_path: Path, read: Callable[[Path], T], announce: Callable[[str], None], at_most: int | None = None
) -> T | None:
    """Read the newest whole checkpoint of a run, or return None if it has no checkpoint.

    A run that trains meanwhile may replace a checkpoint while it is read: then its checkpoints are listed again.

    Args:
        run_path: the run directory.
        read: reads one checkpoint, such as `load`.
        announce: takes a line about each damaged checkpoint that is skipped.
        at_most: skip checkpoints of later steps than this.

    Raises:
        DamagedError: there are checkpoints, but all are damaged.
        UnreadableError: the newest one cannot be read just now. An older one would undo what was trained since.
        OtherVersionError: the newest one is of a format that this version does not read.
    """
    for _ in range(_LOOKS):
        damaged = []
        for path in checkpoint_paths(run_path):
            if at_most is not None and step_of(path) > at_most:
                continue
            before = _identity(path)
            try:
                found = read(path)
            except DamagedError as error:
                if before is None or _identity(path) != before:
                    break  # a writer has replaced it
                damaged.append(str(error))
                continue
            _announce_skipped(damaged, announce)
            return found
        else:
            _announce_skipped(damaged, announce)
            if damaged:
                raise DamagedError(
                    f"none of the {len(damaged)} checkpoints in {RunPaths(run_path).checkpoints} is whole; "
                    "start over with --fresh, or choose another --run-dir"
                )
            return None
    raise UnreadableError(
        f"the checkpoints of {run_path} are replaced faster than they can be read; try again, or train with "
        "--keep-checkpoints 2 or more"
    )


def _announce_skipped(damaged: list[str], announce: Callable[[str], None]) -> None:
    for line in damaged:
        announce(f"{line}; trying the one before it")


def _identity(path: Path) -> tuple[int, int] | None:
    """Number of a directory that no other has while it exists; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
