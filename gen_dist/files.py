"""Files that are written whole or not at all, and that stay when the machine stops."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a process that dies half-way leaves what stood there before.

    Text becomes UTF-8. The file is on disk (fsync) before it takes its name.

    Raises:
        OSError: the disk is full, or the directory is missing or not writable.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")  # one fixed name, so that killed runs pile nothing up
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
    """Within it, a directory to put files in; after it they stand at `path`, where what was there before makes way.

    They are on disk (fsync) before they take their place. If an error leaves it, nothing has changed. A link at `path`
    stays one: it is the directory that it leads to which makes way.

    Raises:
        OSError: the disk is full or cannot be written to, as far as that shows, before anything is put there.
    """
    path = path.resolve()
    partial, replaced = (path.with_name(f".{path.name}.{state}") for state in ("partial", "replaced"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():  # of a writer that was killed
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
    """Force a file's content, or a directory's entries, to disk. A directory that cannot be synced is left as it is.

    Raises:
        OSError: the disk is full or failing, or the file is missing or not writable.
    """
    is_directory = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)  # Windows syncs what it may write
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Windows opens no directory; some network file systems cannot sync one.
        if not (is_directory and error.errno in (errno.EACCES, errno.EINVAL, errno.ENOTSUP)):
            raise
