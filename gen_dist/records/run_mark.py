"""The mark of a run, run.json: by it a directory is ours, so that nothing is overwritten or removed in any other.

Runs of versions without a mark are known by their config.json together with metrics or checkpoints of theirs. They get
a mark when they are resumed.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from gen_dist.errors import CheckpointError, ConfigError, DamagedError, OtherVersionError, UnreadableError
from gen_dist.records.checkpoint import STATE, SUMS, checkpoint_paths
from gen_dist.records.metrics_file import metrics_of_run
from gen_dist.records.reading import COUNT, FLAG, OBJECT, TEXT, parsed_object, read_file, read_object, write_object
from gen_dist.records.removal import remove_run
from gen_dist.records.run_paths import RunPaths

_FORMAT = 1
_SHAPE = {"gen_dist_run": TEXT, "format": COUNT, "has_checkpoint": FLAG}
_SHOWN_NAMES = 3
_FIRST_BYTES = b'{"step": '
"""Beginning of a metrics.jsonl whose first line is torn."""


@dataclass(frozen=True)
class RunMark:
    """Content of run.json."""

    run: str
    """Random name of this run. A run that starts over gets another one."""
    has_checkpoint: bool
    """True once a checkpoint was written: if none is found then, it is elsewhere, and the run must not start over."""


def mark_of(path: Path) -> RunMark | None:
    """Read the mark of a run directory; None if it has none.

    Raises:
        CheckpointError: its run.json is not a mark, is of a newer version, or cannot be read just now.
    """
    file = RunPaths(path).mark
    try:
        found = read_object(file, _SHAPE, "move it away, or choose another --run-dir")
    except FileNotFoundError:
        return None
    except DamagedError as error:
        raise DamagedError(str(error).replace("is damaged", "is not the mark of a run")) from None
    if found["format"] > _FORMAT:
        raise OtherVersionError(f"{file} is of format {found['format']}; a newer gen_dist wrote it: use that one")
    return RunMark(found["gen_dist_run"], found["has_checkpoint"])


def write_mark(path: Path, mark: RunMark | None = None) -> None:
    """Write a mark, by default that of a new run.

    Raises:
        OSError: the directory cannot be written to.
    """
    mark = mark or RunMark(uuid.uuid4().hex, has_checkpoint=False)
    content = {"gen_dist_run": mark.run, "format": _FORMAT, "has_checkpoint": mark.has_checkpoint}
    write_object(RunPaths(path).mark, content)


def start_over(path: Path) -> None:
    """Mark the directory as that of a new run, then remove all that the previous one wrote.

    The mark comes first: a start after a removal that was killed half-way removes the rest.

    Raises:
        CheckpointError: some of it cannot be removed.
        OSError: the mark cannot be written.
    """
    write_mark(path)
    remove_run(path)


def note_checkpoint(path: Path) -> None:
    """Note in the mark that the run has a checkpoint.

    Raises:
        OSError: the directory cannot be written to.
    """
    mark = mark_of(path)
    if mark is None or not mark.has_checkpoint:
        write_mark(path, RunMark(mark.run if mark else uuid.uuid4().hex, has_checkpoint=True))


def is_run(path: Path) -> bool:
    """True if a directory has a run of ours, by its mark or as one of a version without marks.

    Raises:
        CheckpointError: one of its files cannot be read just now.
    """
    return mark_of(path) is not None or _is_unmarked_run(path)


def refuse_foreign(path: Path) -> None:
    """Raise ConfigError if a directory has no run, but files under names that a run would overwrite or remove.

    Raises:
        OSError: the directory cannot be read.
    """
    if not path.exists() or is_run(path):
        return
    paths = RunPaths(path)
    taken = [file.name for file in paths.files() if os.path.lexists(file)]
    taken += [f"{place.name}/" for place in paths.directories() if _is_taken(place)]
    taken += [file.name for file in (paths.lock, paths.holder) if _is_foreign_mark(file)]
    if taken:
        more = f" and {len(taken) - _SHOWN_NAMES} more" if len(taken) > _SHOWN_NAMES else ""
        raise ConfigError(
            f"{path} is not a run of gen_dist but has {', '.join(sorted(taken)[:_SHOWN_NAMES])}{more}, which training "
            "there would overwrite; choose another --run-dir, or move them away"
        )


def refuse_lost_checkpoints(path: Path) -> None:
    """Raise CheckpointError if a run once had a checkpoint and has none now, e.g. because a disk is not mounted."""
    if checkpoint_paths(path) or not is_run(path):
        return
    mark = mark_of(path)
    if mark.has_checkpoint if mark else _had_checkpoint(path):
        raise CheckpointError(
            f"{path} has trained, but there is no checkpoint in {RunPaths(path).checkpoints}: put it back if its disk "
            "is not mounted, or start over with --fresh, which removes the metrics and pictures of that run"
        )


def _is_unmarked_run(path: Path) -> bool:
    """True for a run of a version without marks: its config and either metrics or a checkpoint are ours."""
    paths = RunPaths(path)
    try:
        parsed_object(read_file(paths.config), {"preset": TEXT, "data": TEXT, "network": OBJECT, "objective": OBJECT})
    except UnreadableError:
        raise
    except (FileNotFoundError, ValueError):
        return False
    if paths.metrics.exists():
        try:
            content = read_file(paths.metrics)
            return not content or bool(metrics_of_run(path)) or content.startswith(_FIRST_BYTES)
        except DamagedError:
            return False
    return any((found / SUMS).exists() and (found / STATE).exists() for found in checkpoint_paths(path))


def _had_checkpoint(path: Path) -> bool:
    """True if a run without a mark must have had a checkpoint, by the files that it has."""
    paths = RunPaths(path)
    if paths.summary.exists() or paths.evaluation.exists():
        return True
    every = parsed_object(read_file(paths.config), {}).get("checkpoint_every")
    # The line of a step comes before its checkpoint, the line of a later step after it.
    return isinstance(every, int) and any(record["step"] > every for record in metrics_of_run(path))


def _is_taken(directory: Path) -> bool:
    """True unless it is missing, or an empty directory or a link to one, as on another disk."""
    if not os.path.lexists(directory):
        return False
    return not directory.is_dir() or any(directory.iterdir())


def _is_foreign_mark(file: Path) -> bool:
    """True for a .lock or .holder that is not ours. A start that was refused leaves an empty lock."""
    if not os.path.lexists(file):
        return False
    if file.is_symlink() or not file.is_file():
        return True
    content = read_file(file).decode(errors="replace")
    return bool(content) and not re.fullmatch(r"\S+ [0-9a-f]{32}( begun)?\n", content)
