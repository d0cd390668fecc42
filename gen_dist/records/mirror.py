"""Run directory at a URL, such as s3://bucket/runs: fetched when a run starts, and updated as it continues.

Files are first written to a local directory, atomically, and then copied. The SHA256SUMS of a checkpoint is copied
last, so an interrupted copy is a damaged checkpoint, which is skipped like any other.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Set
from pathlib import Path

import pyarrow.fs

from gen_dist.errors import CheckpointError, TakenOverError
from gen_dist.records.checkpoint import SUMS
from gen_dist.records.run_paths import RunPaths

_WRITER_FILE = ".writer"
_HOLDER_FILE = RunPaths(Path()).holder.name
_CHECKPOINTS = RunPaths(Path()).checkpoints.name


def file_system_of(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system of a URL, and the path in it.

    Raises:
        CheckpointError: neither pyarrow nor, for `fsspec+PROTOCOL://`, fsspec knows the protocol, or a package is
            missing.
    """
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(url)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{url} cannot be used as storage: {_reason(error)}; choose another --storage") from None
    return filesystem, path


class Mirror:
    """One run directory and its copy at a URL."""

    def __init__(self, directory: Path, url: str) -> None:
        """Copy nothing yet.

        Args:
            directory: the local directory.
            url: its copy, on any file system that pyarrow or, for `fsspec+PROTOCOL://`, fsspec knows.

        Raises:
            CheckpointError: there is no file system for this URL.
        """
        self.directory = directory
        self.url = url
        self.filesystem, self.root = file_system_of(url)
        self._writer = uuid.uuid4().hex
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and modification time of each file when it was copied, by its path within the directory."""

    def claim(self) -> None:
        """Become the only writer. The previous one notices before it copies anything more.

        Raises:
            CheckpointError: the URL cannot be written to.
        """
        with self._short_errors("written to"):
            self.filesystem.create_dir(self.root, recursive=True)
            with self.filesystem.open_output_stream(f"{self.root}/{_WRITER_FILE}") as file:
                file.write(self._writer.encode())

    def fetch(self, part: str = "") -> None:
        """Copy everything at the URL, or in a part of it, into the directory. An empty URL is an empty run.

        Raises:
            CheckpointError: the URL cannot be read.
        """
        with self._short_errors("read"):
            source = f"{self.root}/{part}" if part else self.root
            everything = pyarrow.fs.FileSelector(source, recursive=True, allow_not_found=True)
            for entry in self.filesystem.get_file_info(everything):
                place = os.path.relpath(entry.path, self.root)
                if entry.is_file and not _is_temporary(place):
                    target = self.directory / place
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with self.filesystem.open_input_stream(entry.path) as remote, target.open("wb") as file:
                        while block := remote.read(2**22):
                            file.write(block)
                    self._copied[place] = _stamp(target)

    def push(self) -> None:
        """Copy files that are new or changed, checkpoints last, then remove those that are gone.

        Raises:
            TakenOverError: another process has claimed the URL.
            CheckpointError: the URL cannot be written to.
        """
        found = {
            str(path.relative_to(self.directory)): path
            for path in self.directory.rglob("*")
            if path.is_file() and not _is_temporary(str(path.relative_to(self.directory)))
        }
        with self._short_errors("written to"):
            with self.filesystem.open_input_stream(f"{self.root}/{_WRITER_FILE}") as file:
                if file.read().decode() != self._writer:
                    raise TakenOverError(f"another process has taken over {self.url}; this one stops")
            for place in sorted(found.keys() - {_HOLDER_FILE}, key=_copy_order):
                self._copy(place, found[place])
            self._remove(self._copied.keys() - found.keys())
            if _HOLDER_FILE in found:  # Last: it says that the previous run is gone.
                self._copy(_HOLDER_FILE, found[_HOLDER_FILE])

    def _copy(self, place: str, path: Path) -> None:
        stamp = _stamp(path)
        if self._copied.get(place) != stamp:
            target = f"{self.root}/{place}"
            self.filesystem.create_dir(os.path.dirname(target), recursive=True)
            with self.filesystem.open_output_stream(target) as copy:
                copy.write(path.read_bytes())
            self._copied[place] = stamp

    def _remove(self, places: Set[str]) -> None:
        """Remove files from the URL, and directories that are no longer in the local one."""
        for place in sorted(places, key=_copy_order, reverse=True):  # SHA256SUMS before the files that it lists
            if self.filesystem.get_file_info(f"{self.root}/{place}").is_file:
                self.filesystem.delete_file(f"{self.root}/{place}")
            del self._copied[place]
        for parent in sorted({os.path.dirname(place) for place in places}, reverse=True):
            # An empty directory would look like a damaged checkpoint. Object stores have none.
            target = f"{self.root}/{parent}"
            is_gone = parent and not (self.directory / parent).exists()
            if is_gone and self.filesystem.get_file_info(target).type is pyarrow.fs.FileType.Directory:
                self.filesystem.delete_dir(target)

    @contextlib.contextmanager
    def _short_errors(self, access: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.url} cannot be {access}: {_reason(error)}; fix that, then run it again"
            ) from None


def _copy_order(place: str) -> tuple[bool, bool, str]:
    """Sort key of the order of copying: checkpoints last, and SHA256SUMS after the files that it lists."""
    return place.startswith(_CHECKPOINTS), Path(place).name == SUMS, place


def _is_temporary(place: str) -> bool:
    """True for files of no use elsewhere: locks and half-written files, whose names start with a dot."""
    return place != _HOLDER_FILE and any(part.startswith(".") for part in Path(place).parts)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
