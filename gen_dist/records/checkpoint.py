"""Checkpoints: the full state of a run in safetensors and JSON, either whole or absent. Nothing is unpickled.

A checkpoint is the directory `checkpoints/step_00001500` of a run:

    config.json            the run's config
    state.json             everything but tensors: step, digest of the data, loss scales
    NAME.safetensors       tensors: networks, averaged (moving average of the weights), optimizer state of each phase
    SHA256SUMS             digests of the other files, in the format of `sha256sum --check`

A checkpoint is written to a temporary directory, synced to disk, and renamed. Only then are older ones removed.
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
        if final.exists():  # The run was resumed from an older checkpoint: move this one aside, then replace it.
            os.replace(final, parent / f".removed-{final.name}")
        os.replace(partial, final)
        sync(parent)
        # Checkpoints of later steps are damaged, or the run would have been resumed from them.
        paths = checkpoint_paths(run_path)
        kept = [path for path in paths if _step_of(path) <= checkpoint.step][:keep]
        for path in paths:
            if path not in kept:
                os.replace(
                    path, parent / f".removed-{path.name}"
                )  # A half-removed directory must not look like a checkpoint.
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
    """Directories of the checkpoints of a run, newest first. Their content is not checked."""
    parent = RunPaths(run_path).checkpoints
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if _NAME.fullmatch(path.name)), key=_step_of, reverse=True)


def load(path: Path) -> tuple[Checkpoint, TrainConfig]:
    """Read one checkpoint directory, with the config of its run.

    Raises:
        CheckpointError: it is damaged, or of another format than this version reads. The message names the file.
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
    """True if a checkpoint directory holds exactly the files that were written there, to the byte."""
    try:
        _whole_files(path)
    except (OSError, CheckpointError):
        return False
    return True


def _whole_files(path: Path) -> list[str]:
    """Names of the files of a checkpoint, after a comparison of all digests with SHA256SUMS."""
    sums = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
    # Ignore other files: file managers and network file systems leave some in any directory.
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
    """Load the newest whole checkpoint of a run, or return None if it has no checkpoint.

    Args:
        run_path: the run directory.
        announce: takes a line about each damaged checkpoint that is skipped.
        at_most: skip checkpoints of later steps than this.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
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
    """Remove checkpoints that were moved aside, and those that a killed process left half-written."""
    for path in (*parent.glob(".partial-*"), *parent.glob(".removed-*")):
        shutil.rmtree(path)
