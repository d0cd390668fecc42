"""Checkpoints: the full state of a run in safetensors and JSON, whole or not there at all. Nothing is unpickled.

A checkpoint is the directory `checkpoints/step_00001500` of a run:

    config.json            the run's config
    state.json             step, digest of the data, loss scales: all that is no tensor
    NAME.safetensors       tensors: networks, averaged (moving average of the weights), optimizer state of each phase
    SHA256SUMS             digests of the other files, as `sha256sum --check` reads them

It is written to a temporary directory, synced to disk, and renamed. Older ones are removed only after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError
from gen_dist.files import sync
from gen_dist.records.run_paths import RunPaths

FORMAT = 2
_NAME = re.compile(r"step_\d{8,}")
_CONFIG, STATE, SUMS = "config.json", "state.json", "SHA256SUMS"
_SUFFIXES = (".json", ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimizer steps."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Groups of named tensors; each group is one file."""
    facts: Mapping[str, Any]
    """What is no tensor, as JSON values."""


def save(run_path: Path, checkpoint: Checkpoint, config: TrainConfig, keep: int) -> Path:
    """Write a checkpoint, then remove all but the `keep` newest. Returns its directory.

    Raises:
        CheckpointError: the disk is full or cannot be written to. What was there before is untouched.
    """
    parent = RunPaths(run_path).checkpoints
    final = RunPaths(run_path).checkpoint(checkpoint.step)
    partial = parent / f".partial-{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent)
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
        if final.exists():  # Written before by a run that was then resumed from an older one: set aside, then replace.
            os.replace(final, parent / f".removed-{final.name}")
        os.replace(partial, final)
        sync(parent)
        # Later ones than this were found damaged, or they would have been resumed from.
        paths = checkpoint_paths(run_path)
        kept = [path for path in paths if _step_of(path) <= checkpoint.step][:keep]
        for path in paths:
            if path not in kept:
                os.replace(path, parent / f".removed-{path.name}")  # Killed in mid-removal, it must not look like one.
        _remove_leftovers(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        newest = next((str(path) for path in checkpoint_paths(run_path)), "none")
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} cannot be written to {parent}: {reason}; "
            f"free some space there or choose another --run-dir (newest whole checkpoint: {newest})"
        ) from None
    return final


def checkpoint_paths(run_path: Path) -> list[Path]:
    """Directories of the checkpoints of a run, newest first, unchecked."""
    parent = RunPaths(run_path).checkpoints
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if _NAME.fullmatch(path.name)), key=_step_of, reverse=True)


def load(path: Path) -> tuple[Checkpoint, TrainConfig]:
    """Read one checkpoint directory, with the config of its run.

    Raises:
        CheckpointError: it is damaged, or of a format that this version does not know. Names the file.
    """
    try:
        names = _whole_files(path)
        facts = json.loads((path / STATE).read_text())
        if facts.pop("format") != FORMAT:
            raise CheckpointError(f"checkpoint {path} is of another format than {FORMAT}, which this version reads")
        config = TrainConfig.from_json((path / _CONFIG).read_text(), str(path / _CONFIG))
        tensors = {
            Path(name).stem: safetensors.torch.load_file(path / name) for name in names if name.endswith(".safetensors")
        }
        return Checkpoint(facts.pop("step"), tensors, facts), config
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = f"{Path(error.filename).name} is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise CheckpointError(f"checkpoint {path} is damaged: {what.splitlines()[0]}") from None


def is_checkpoint(path: Path) -> bool:
    """True for the directory of one checkpoint, whole or damaged; False for that of a run."""
    return (path / STATE).exists() or (path / SUMS).exists()


def is_whole(path: Path) -> bool:
    """Whether a checkpoint directory holds the files that were written there, to the byte."""
    try:
        _whole_files(path)
    except (OSError, CheckpointError):
        return False
    return True


def _whole_files(path: Path) -> list[str]:
    """Names of the files of a checkpoint, all of which have the digests that SUMS says."""
    sums = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
    # Other files are the system's: file managers and network file systems leave some in any directory.
    written = {file.name for file in path.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith(".")}
    if any(len(line) != 2 for line in sums) or {line[-1] for line in sums} != written:
        raise CheckpointError(f"checkpoint {path} is damaged: {SUMS} does not list the files that are there")
    for digest, name in sums:
        if _digest(path / name) != digest:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has another digest than {SUMS} says")
    return [name for _, name in sums]


def load_newest(
    run_path: Path, announce: Callable[[str], None], at_most: int | None = None
) -> tuple[Checkpoint, TrainConfig] | None:
    """The newest whole checkpoint of a run, of at most a given step; damaged ones are named and skipped.

    Returns None where the run has no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but not one is whole.
    """
    damaged = 0
    for path in checkpoint_paths(run_path):
        if at_most is not None and _step_of(path) > at_most:
            continue
        try:
            return load(path)
        except CheckpointError as error:
            announce(f"{error}; trying the one before it")
            damaged += 1
    if damaged:
        raise CheckpointError(
            f"none of the {damaged} checkpoints in {RunPaths(run_path).checkpoints} is whole; "
            "start over with --fresh, or choose another --run-dir"
        )
    return None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(parent: Path) -> None:
    """Remove what is set aside, or what a killed writer left behind."""
    for path in (*parent.glob(".partial-*"), *parent.glob(".removed-*")):
        shutil.rmtree(path)
