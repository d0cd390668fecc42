"""Removal of what a run wrote, and of nothing else: links are unlinked, not followed; foreign files stay."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from gen_dist.errors import CheckpointError
from gen_dist.files import read_regular, reason_of, remove_left_over
from gen_dist.records.run_paths import RunPaths

CHECKPOINT_FILE = re.compile(r"config\.json|state\.json|SHA256SUMS|(networks|averaged|optimizer-.+)\.safetensors")
"""Files that a checkpoint may have."""
CHECKPOINT = re.compile(r"step_\d{8,}")
_MOVED_ASIDE = re.compile(rf"\.removed-({CHECKPOINT.pattern})")
_PARTIAL = re.compile(rf"\.partial-{CHECKPOINT.pattern}")
_PLUGIN = re.compile(r"[^.].*\.py|\..+\.py\.tmp.*")
_PICTURE = re.compile(r"step_\d{8,}\.png|\.step_\d{8,}\.png\.tmp.*")

_EVENTS = re.compile(r"events\.out\.tfevents\..*")


def remove_run(path: Path) -> None:
    """Remove all that a run wrote, except for its mark. It can be repeated if it fails half-way.

    Raises:
        CheckpointError: some of it cannot be removed.
    """
    paths = RunPaths(path)
    try:
        # Checkpoints come before all else: the remainder of an interrupted removal must not be resumed from.
        _remove_checkpoints(paths.checkpoints)
        for series in paths.picture_series.values():
            _remove_matching(series, _PICTURE)
        _remove_matching(paths.plugins, _PLUGIN)
        _remove_wandb(paths)
        _remove_matching(paths.tensorboard, _EVENTS)
        for file in paths.files():
            remove_left_over(file)
            if file.is_symlink() or not file.is_dir():  # a directory of this name is not ours
                file.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the previous run in {path} is only partly removed: {error.filename or path}: {reason_of(error)}; fix "
            "that, then run the same command with --fresh again"
        ) from None


def discard_checkpoint(path: Path) -> None:
    """Remove a checkpoint, never half of it under its own name. Foreign files in it stay.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_symlink():
        path.unlink()
        return
    aside = path.with_name(f".removed-{path.name}")
    os.replace(path, aside)
    _remove_moved_aside(aside)


def move_aside(path: Path) -> None:
    """Rename a checkpoint that another one is to replace. `remove_left_over_checkpoints` removes it."""
    if path.is_symlink():
        path.unlink()
    else:
        os.replace(path, path.with_name(f".removed-{path.name}"))


def remove_left_over_checkpoints(parent: Path) -> None:
    """Remove checkpoints that were moved aside, and those that a killed process left half-written.

    Raises:
        OSError: they cannot be removed.
    """
    for path in _entries(parent):
        if _MOVED_ASIDE.fullmatch(path.name):
            _remove_moved_aside(path)
        elif _PARTIAL.fullmatch(path.name):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)


def remove_left_overs(path: Path) -> None:
    """Remove what killed processes left in a run directory: half-written files, and checkpoints moved aside."""
    paths = RunPaths(path)
    for file in (*paths.files(), paths.mark, paths.holder):
        remove_left_over(file)
    with contextlib.suppress(OSError):
        for series in paths.picture_series.values():
            for left_over in _entries(series):
                if left_over.name.startswith(".") and _PICTURE.fullmatch(left_over.name):
                    left_over.unlink()
        remove_left_over_checkpoints(paths.checkpoints)


def _remove_checkpoints(parent: Path) -> None:
    if parent.is_symlink():
        parent.unlink()
        return
    remove_left_over_checkpoints(parent)
    for path in _entries(parent):
        if CHECKPOINT.fullmatch(path.name) and (path.is_symlink() or path.is_dir()):
            discard_checkpoint(path)
    _remove_if_empty(parent)


def _remove_moved_aside(aside: Path) -> None:
    """Remove our files from a checkpoint that was moved aside, and give foreign ones their directory back."""
    _remove_matching(aside, CHECKPOINT_FILE)
    if not aside.exists():
        return
    home = aside.with_name(aside.name.removeprefix(".removed-"))
    home.mkdir(exist_ok=True)
    for file in _entries(aside):
        if not os.path.lexists(home / file.name):
            os.replace(file, home / file.name)
    _remove_if_empty(aside)


def _remove_matching(directory: Path, ours: re.Pattern[str]) -> None:
    """Remove our files in a directory, and the directory if nothing else is there. A link is unlinked."""
    if directory.is_symlink():
        directory.unlink()
        return
    for entry in _entries(directory):
        if ours.fullmatch(entry.name) and (entry.is_symlink() or not entry.is_dir()):
            entry.unlink()
    _remove_if_empty(directory)


def _remove_wandb(paths: RunPaths) -> None:
    """Remove what wandb wrote under the id of this run."""
    directory = paths.wandb
    if directory.is_symlink():
        directory.unlink()
        return
    try:
        wandb_id = read_regular(paths.wandb_id).decode(errors="replace").strip()
    except FileNotFoundError:
        return
    runs = re.compile(rf"(offline-)?run-\d{{8}}_\d{{6}}-{re.escape(wandb_id)}")
    for entry in _entries(directory):
        if entry.is_symlink():
            if re.fullmatch(r"latest-run|debug.*\.log", entry.name):
                entry.unlink()
        elif wandb_id and runs.fullmatch(entry.name) and entry.is_dir():
            shutil.rmtree(entry)
    _remove_if_empty(directory)


def _entries(directory: Path) -> list[Path]:
    """Entries of a directory; none if there is no such directory."""
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove_if_empty(directory: Path) -> None:
    """Remove a directory unless something is in it."""
    if not _entries(directory):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            directory.rmdir()
