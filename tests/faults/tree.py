"""Files below a directory: stored states of them, and digests. Only what has changed is copied and read again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class _Stamp(NamedTuple):
    """Values of a file that another content or mode would have changed."""

    mode: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int


class Tree:
    """Files below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests: dict[tuple[str, _Stamp], str] = {}
        self._state: Path | None = None
        """State that the files were last put into, and the stamps that they had then, by name."""
        self._stamps: dict[str, _Stamp] = {}

    def store(self, state: Path) -> None:
        """Copy the files to a directory, which is whole or absent."""
        partial = state.with_name(f".{state.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.root, partial, copy_function=shutil.copy2, symlinks=True)
        partial.rename(state)

    def restore(self, state: Path) -> None:
        """Put the files back into a stored state. Those that still have its stamps stay: a folder keeps its inode."""
        if self._state != state or not self.root.is_dir():
            shutil.rmtree(self.root, ignore_errors=True)
            self._stamps = {}
            self.root.mkdir(parents=True)
        for name, stamp in sorted(_stamps_below(self.root).items(), reverse=True):
            if not _is_same(stamp, self._stamps.get(name)):
                path = self.root / name
                shutil.rmtree(path) if stat.S_ISDIR(stamp.mode) else path.unlink()
        self._state = None  # an exception leaves a mixture
        wanted = _stamps_below(state)
        for name, stamp in sorted(wanted.items()):
            path = self.root / name
            if os.path.lexists(path):
                continue
            if stat.S_ISDIR(stamp.mode):
                path.mkdir()
            else:
                shutil.copy2(state / name, path, follow_symlinks=False)
        for name, stamp in {**wanted, "": _stamp_of(state)}.items():
            path = self.root / name
            if stat.S_ISDIR(stamp.mode) and not _has_times(path, stamp):
                shutil.copystat(state / name, path)
        self._stamps, self._state = _stamps_below(self.root), state

    def contents(self) -> dict[str, str]:
        """Digest of every file, without what differs between equal runs: times, and identities."""
        found = {}
        for name, stamp in sorted(_stamps_below(self.root).items()):
            path, shown = self.root / name, _KEY_OF_FOLDER.sub("KEY", name)
            if path.is_dir():
                if not any(path.iterdir()):
                    found[shown] = "empty directory"
            elif path.name in _WITH_TIMES or path.suffix == ".html":
                found[shown] = "present"
            elif stat.S_ISLNK(stamp.mode):  # its target may change without it
                found[shown] = _digest_of_content(path)
            else:
                found[shown] = self._kept("content", stamp, partial(_digest_of_content, path))
        return found

    def exact(self) -> dict[str, str]:
        """Mode of every directory, and mode and digest of every file: all that a command finds."""
        found = {}
        for name, stamp in sorted(_stamps_below(self.root).items()):
            path, mode = self.root / name, f"{stamp.mode:o}"
            if stat.S_ISLNK(stamp.mode):
                found[name] = f"link to {path.readlink()}"
            elif stat.S_ISDIR(stamp.mode):
                found[name] = mode
            elif path.name == "seen.json" and _has_right_stamps(path):
                found[name] = f"{mode} stamps of the files beside it"
            else:
                found[name] = f"{mode} {self._kept('bytes', stamp, partial(_digest_of_bytes, path))}"
        return found

    def is_whole(self, checkpoint: Path) -> bool:
        """True if all files of a checkpoint have the digests that it lists."""
        try:
            lines = [line.split("  ", 1) for line in (checkpoint / "SHA256SUMS").read_text().splitlines()]
            return bool(lines) and all(self._sha256(checkpoint / name) == digest for digest, name in lines)
        except (OSError, ValueError):
            return False

    def _sha256(self, path: Path) -> str:
        return self._kept("bytes", _stamp_of(path), partial(_digest_of_bytes, path))

    def _kept(self, of: str, stamp: _Stamp, compute: Callable[[], str]) -> str:
        key = of, stamp
        if key not in self._digests:
            self._digests[key] = compute()
        return self._digests[key]


_WITH_TIMES = frozenset(
    {
        *("environment.json", "SHA256SUMS", "card.md", "README.md", "comparison.json", "comparison.md"),
        *("comparison.png", "curves.png", "run.json", "seen.json", ".holder", ".lock", ".encoding.lock", "wandb-id"),
    }
)
"""Files with times or identities in them."""
_KEY_OF_FOLDER = re.compile(r"(?<=cache/folder-images-)[0-9a-f]+")
"""Key of a folder's packed data: it holds the folder's inode, which each copy of the files has anew."""
_OF_TIME = "images_per_second|tflops_per_second|fraction_of_peak|peak_memory_mib|training_seconds|seconds"
_TIMES = re.compile(rf'"({_OF_TIME}|id|started|bytes|sha256)": [^,}}\n]*,?\s*')


def figures_of(evaluation: Path) -> dict[str, Any]:
    """Content of evaluation.json without times and versions."""
    found = json.loads(evaluation.read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "environment", "sha256")}


def _digest_of_content(path: Path) -> str:
    """Digest of a file without times."""
    if path.name == "evaluation.json":
        content = json.dumps(figures_of(path), sort_keys=True).encode()
    elif path.suffix in (".json", ".jsonl"):
        content = _TIMES.sub("", path.read_text(errors="replace")).encode()
        if path.suffix == ".json":  # without its last line's end, it says the same
            content = content.rstrip()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _digest_of_bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _has_right_stamps(seen: Path) -> bool:
    """True if the stamps of packed files in seen.json are those that the files have."""
    try:
        return bool(
            {name: [size, modified, inode] for name, (size, modified, inode) in json.loads(seen.read_text()).items()}
            == {
                name: [stamp.bytes, stamp.modified_ns, stamp.inode]
                for name, stamp in _stamps_below(seen.parent).items()
                if name not in ("seen.json", "meta.json")
            }
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _stamps_below(root: Path, prefix: str = "") -> dict[str, _Stamp]:
    """Stamps of everything below a directory, by its path from there."""
    found = {}
    with os.scandir(root) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            found[name] = _stamp_from(entry.stat(follow_symlinks=False))
            if entry.is_dir(follow_symlinks=False):
                found |= _stamps_below(Path(entry.path), f"{name}/")
    return found


def _stamp_of(path: Path) -> _Stamp:
    return _stamp_from(path.lstat())


def _stamp_from(status: os.stat_result) -> _Stamp:
    return _Stamp(status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_same(stamp: _Stamp, before: _Stamp | None) -> bool:
    """True if a file is as it was before. A directory is even if its entries have changed."""
    if before is None or not stat.S_ISDIR(stamp.mode):
        return stamp == before
    return stamp[:2] == before[:2]


def _has_times(path: Path, stamp: _Stamp) -> bool:
    status = path.lstat()
    return (status.st_mode, status.st_mtime_ns) == (stamp.mode, stamp.modified_ns)
