"""Files that a crash of the machine would lose: written in place, or renamed there before they are on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CHECKPOINTS = "checkpoints"
"""Directory of a run whose entries are on disk before older ones are removed."""
_LOG = "metrics.jsonl"
"""File that is written in place: lines are added, and checkpoints know up to where they are sure."""


def problems_of_events(events: bytes, root: Path) -> list[str]:
    """Problems with the order of a command's writes, syncs, removals and renames below a directory.

    A crash of the machine may keep a rename and lose the bytes of the file that was renamed, unless they were synced
    before (fsync); it may keep the removal of an older checkpoint and lose the rename of a newer one, unless the
    directory of both was synced in between. A kill keeps half of a file that is written in place.
    """
    in_place: dict[str, str] = {}
    unsynced: dict[str, str] = {}  # path by inode: what renames a file may make its system calls unseen
    renamed = ""  # newest checkpoint, until the directory with its name is synced
    problems = []
    for event, inode, path, to in _events(events, root):
        if event == "W":
            unsynced[inode] = in_place[inode] = path
        elif event == "S":
            unsynced.pop(inode, None)
            renamed = "" if path == os.path.dirname(renamed) else renamed
        else:
            gone = {inode for inode, one in in_place.items() if one == path or one.startswith(f"{path}/")}
            if event == "R" and (lost := sorted(unsynced[inode] for inode in gone & set(unsynced))):
                problems.append(f"{to} is in place before these are on disk: {', '.join(lost)}")
            for inode in gone:
                del in_place[inode]
                unsynced.pop(inode, None)
        if event in "UR" and renamed and _checkpoint_of(path) not in ("", renamed):
            problems.append(f"{path} is removed before {renamed} is sure to stay")
            renamed = ""
        if event == "R" and _checkpoint_of(to) == to:
            renamed = to
    return problems + [f"{path} is written in place" for path in sorted(in_place.values()) if Path(path).name != _LOG]


def _events(events: bytes, root: Path) -> Iterator[tuple[str, str, str, str]]:
    """Each event, its inode if it has one, its path from the root, and the new path of a rename."""
    words = iter(os.fsdecode(events).split("\0")[:-1])
    for word in words:
        event, inode, path = word[0], *word[1:].split("/", 1)
        to = os.path.relpath(next(words), root) if event == "R" else ""
        yield event, inode, os.path.relpath(f"/{path}", root), to


def _checkpoint_of(path: str) -> str:
    """Directory of the checkpoint that a path is, or is in; empty if there is none."""
    parts = Path(path).parts
    place = next((place for place, part in enumerate(parts) if part.startswith("step_")), 0)
    return os.path.join(*parts[: place + 1]) if place and parts[place - 1] == _CHECKPOINTS else ""
