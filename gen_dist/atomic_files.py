"""Files that are written whole or not at all."""

from __future__ import annotations

import os
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
