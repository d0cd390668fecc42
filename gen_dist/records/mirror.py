"""A run directory kept at a URL, such as s3://bucket/runs: copied here when a run starts, and there as it goes on.

Files are written locally, atomically as ever, and then copied. The sums of a checkpoint go last: what an interrupted
copy leaves is a damaged checkpoint, which is named and passed over like any other.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pyarrow.fs

from gen_dist.errors import CheckpointError, TakenOverError
from gen_dist.records.checkpoint import SUMS
from gen_dist.records.run_paths import RunPaths

_WRITER_FILE = ".writer"
_HOLDER_FILE = RunPaths(Path()).holder.name
_CHECKPOINTS = RunPaths(Path()).checkpoints.name


def file_system_of(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a URL, and the path there.

    Raises:
        CheckpointError: neither pyarrow nor, as `fsspec+PROTOCOL://`, fsspec knows one, or what it needs is missing.
    """
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(url)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{url} cannot be used as storage: {_reason(error)}; choose another --storage") from None
    return filesystem, path


class Mirror:
    """One run directory and its copy at a URL."""

    def __init__(self, directory: Path, url: str) -> None:
        """
        Args:
            directory: the local one.
            url: of any file system that pyarrow or, as `fsspec+PROTOCOL://`, fsspec knows.

        Raises:
            CheckpointError: it knows none for this URL.
        """
        self.directory = directory
        self.url = url
        self.filesystem, self.root = file_system_of(url)
        self._writer = uuid.uuid4().hex
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and time of change of each file when it was copied, by its place in the directory."""

    def claim(self) -> None:
        """Become the one who writes there. Whoever did so before finds out before it copies anything more.

        Raises:
            CheckpointError: the URL cannot be written to.
        """
        try:
            self.filesystem.create_dir(self.root, recursive=True)
            with self.filesystem.open_output_stream(f"{self.root}/{_WRITER_FILE}") as file:
                file.write(self._writer.encode())
        except OSError as error:
            raise CheckpointError(
                f"{self.url} cannot be written to: {_reason(error)}; mend that, then run it again"
            ) from None

    def fetch(self, part: str = "") -> None:
        """Copy all that is at the URL, or in a part of it, into the directory; nothing there is an empty run.

        Raises:
            CheckpointError: the URL cannot be read.
        """
        try:
            place = f"{self.root}/{part}" if part else self.root
            everything = pyarrow.fs.FileSelector(place, recursive=True, allow_not_found=True)
            for entry in self.filesystem.get_file_info(everything):
                place = os.path.relpath(entry.path, self.root)
                if entry.is_file and not _is_passing(place):
                    target = self.directory / place
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with self.filesystem.open_input_stream(entry.path) as source, target.open("wb") as file:
                        while block := source.read(2**22):
                            file.write(block)
                    self._copied[place] = _stamp(target)
        except OSError as error:
            raise CheckpointError(
                f"{self.url} cannot be read: {_reason(error)}; mend that, then run it again"
            ) from None

    def push(self) -> None:
        """Copy what is new or changed, then remove what is gone: checkpoints come last, old ones go only then.

        Raises:
            TakenOverError: another has claimed the URL.
            CheckpointError: it cannot be written to.
        """
        found = {
            str(path.relative_to(self.directory)): path
            for path in self.directory.rglob("*")
            if path.is_file() and not _is_passing(str(path.relative_to(self.directory)))
        }
        gone = self._copied.keys() - found.keys()
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{_WRITER_FILE}") as file:
                if file.read().decode() != self._writer:
                    raise TakenOverError(f"another process has taken over {self.url}; this one stops")
            for place in sorted(found.keys() - {_HOLDER_FILE}, key=_turn):
                self._copy(place, found[place])
            for place in sorted(gone, key=_turn, reverse=True):  # a checkpoint's sums go before its files
                if self.filesystem.get_file_info(f"{self.root}/{place}").is_file:
                    self.filesystem.delete_file(f"{self.root}/{place}")
                del self._copied[place]
            for parent in sorted({os.path.dirname(place) for place in gone}, reverse=True):
                # Object stores have no empty directories; elsewhere one would look like a damaged checkpoint.
                target = f"{self.root}/{parent}"
                is_gone = parent and not (self.directory / parent).exists()
                if is_gone and self.filesystem.get_file_info(target).type is pyarrow.fs.FileType.Directory:
                    self.filesystem.delete_dir(target)
            if _HOLDER_FILE in found:  # It says that an earlier run is no longer there.
                self._copy(_HOLDER_FILE, found[_HOLDER_FILE])
        except OSError as error:
            raise CheckpointError(
                f"{self.url} cannot be written to: {_reason(error)}; mend that, then run it again"
            ) from None

    def _copy(self, place: str, path: Path) -> None:
        stamp = _stamp(path)
        if self._copied.get(place) != stamp:
            target = f"{self.root}/{place}"
            self.filesystem.create_dir(os.path.dirname(target), recursive=True)
            with self.filesystem.open_output_stream(target) as copy:
                copy.write(path.read_bytes())
            self._copied[place] = stamp


def _turn(place: str) -> tuple[bool, bool, str]:
    """Key of the order in which files are copied: checkpoints last, and of each its sums."""
    return place.startswith(_CHECKPOINTS), Path(place).name == SUMS, place


def _is_passing(place: str) -> bool:
    """Whether a file is of no use elsewhere: locks and half-written ones, whose names start with a dot."""
    return place != _HOLDER_FILE and any(part.startswith(".") for part in Path(place).parts)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
