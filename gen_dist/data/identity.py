"""Identity of data files: it tells sets of files apart whose names, sizes and times are equal."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from gen_dist.data.subsets import evenly_spaced
from gen_dist.files import read_at

# Sets up to these sizes are read whole at every opening, which takes less than a tenth of a second.
_READ_WHOLE_FILES = 1024
_READ_WHOLE_BYTES = 2**25
# Of larger sets, so many pieces spread evenly over files and bytes are read.
_PIECES = 64
_PIECE_BYTES = 2**16


def stamp(status: os.stat_result) -> list[int]:
    """Size, times and inode of a file. Copying over a file changes one of them, even if size and mtime are kept."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def content_sample(files: Sequence[tuple[str, int]]) -> str:
    """SHA-256 of a part of the content of files, given as (path, bytes); of all of it for small sets.

    Images of a file system (squashfs, Docker layers) may give two sets equal stamps too.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    total = sum(size for _, size in files)
    if len(files) <= _READ_WHOLE_FILES and total <= _READ_WHOLE_BYTES:
        for path, size in files:
            digest.update(size.to_bytes(8, "little") + read_at(path, 0, size))
        return digest.hexdigest()
    sampled = min(_PIECES, len(files))
    for path, size in [files[place] for place in evenly_spaced(sampled, len(files)).tolist()]:
        for first in evenly_spaced(_PIECES // sampled, max(size - _PIECE_BYTES, 0) + 1).tolist():
            digest.update(read_at(path, first, _PIECE_BYTES))
    return digest.hexdigest()
