"""Atomic, durable writes of files and directories."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: if the process dies half-way, the previous content stays.

    Text is encoded as UTF-8. The file is on disk (fsync) before it is renamed into place.

    Raises:
        OSError: the disk is full, or the directory is missing or not writable.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")  # one fixed name, so that killed runs do not accumulate files
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Context manager that yields an empty directory and, on success, replaces `path` with it.

    Its files are on disk (fsync) before they are moved to `path`. After an error, `path` is unchanged. A link at `path`
    stays a link: its target is replaced.

    Raises:
        OSError: the disk is full or not writable; if this is detectable at the start, before any file is written.
    """
    path = path.resolve()
    partial, replaced = (path.with_name(f".{path.name}.{state}") for state in ("partial", "replaced"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():  # left by a killed writer
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            sync(file)
        if path.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.replace(path, replaced)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to disk. Ignore directories that cannot be synced.

    Raises:
        OSError: the disk is full or failing, or the file is missing or not writable.
    """
    is_directory = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)  # Windows syncs only writable files
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Windows cannot open a directory; some network file systems cannot sync one.
        if not (is_directory and error.errno in (errno.EACCES, errno.EINVAL, errno.ENOTSUP)):
            raise
