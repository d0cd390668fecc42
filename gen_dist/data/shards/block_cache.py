"""Blocks of shards on the local disk, within a budget for all processes of a host; the oldest go first."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from gen_dist.files import open_regular, read_regular, reason_of

_STRIPES = 64
_POLL_SECONDS = 0.005
_MOST_SECONDS_WAITED = 3.0
_LEFT_OVER_SECONDS = 3600.0
_NAME = re.compile(r"\.?([0-9a-f]+-\d+)(?:-[0-9a-f-]+)?", re.ASCII)
"""A block, or one that is being written."""
_NEITHER_LINK_NOR_PIPE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FREED_SHARE = 16
"""Divisor of the budget: such a part of it is freed at once, so that few writers list the directory."""


class BlockCache:
    """Files named by the content of their shard, for threads and processes."""

    def __init__(self, directory: Path, budget_bytes: int, announce: Callable[[str], None]) -> None:
        """
        Args:
            directory: of the blocks alone. It is made when the first is written.
            budget_bytes: size of all blocks, whoever wrote them.
            announce: takes a line if the disk refuses blocks.
        """
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._announce = announce
        self._refused = threading.Event()

    def has(self, key: str) -> bool:
        """True if a block is there."""
        return self._path(key).exists()

    def read(self, key: str, first: int, last: int | None) -> bytes | None:
        """Bytes of a block from `first` on, up to `last`; None if it is not there."""
        try:
            with open_regular(self._path(key)) as file:
                file.seek(first)
                return file.read() if last is None else file.read(last - first)
        except OSError:
            return None

    def write(self, key: str, content: bytes) -> None:
        """Keep a block, whole or not at all. A disk that is full or read-only is told once: training needs no cache."""
        if len(content) > self._budget_bytes:
            return
        path = self._path(key)
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked("total"):
                self._make_room(len(content))
            with temporary.open("xb") as file:  # a link that someone put there is not followed
                file.write(content)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._refused.is_set():
                self._refused.set()
                self._announce(
                    f"warning: cannot keep parts of shards in {self._directory}: {reason_of(error)}; they are fetched "
                    "again each time: free some space, or name another directory with --cache-dir"
                )

    def remove(self, key: str) -> None:
        """Forget a damaged block."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def only_fetcher(self, key: str) -> Iterator[None]:
        """Context manager that one process of the host is in for a block, for some seconds: it is fetched once."""
        with self._locked(f"fetch-{stripe_of(key)}"):
            yield

    def _make_room(self, size: int) -> None:
        """Count a new block, and remove the oldest if it is one too many. Called with the lock."""
        counter = self._directory / ".total"
        try:
            total = int(read_regular(counter))
        except (OSError, ValueError):
            total = -1
        if total < 0 or total + size > self._budget_bytes:
            total = self._freed(self._budget_bytes - self._budget_bytes // _FREED_SHARE - size)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NEITHER_LINK_NOR_PIPE
        with open(os.open(counter, flags, 0o666), "w") as file:
            file.write(str(total + size))

    def _freed(self, most: int) -> int:
        """Size of the blocks that are left after the oldest have gone until `most` bytes are left."""
        found: list[tuple[float, int, str]] = []
        now = time.time()
        for entry in self._ours():
            with contextlib.suppress(OSError):  # another process has removed it
                status = entry.stat()
                if entry.name.startswith(".") and now - status.st_mtime > _LEFT_OVER_SECONDS:
                    os.unlink(entry.path)
                else:
                    found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
        return total

    def _ours(self) -> Iterator[os.DirEntry[str]]:
        """Blocks, and what killed writers have left. Other files stay."""
        for part in os.scandir(self._directory):
            if part.is_dir(follow_symlinks=False):
                for entry in os.scandir(part):
                    if (found := _NAME.fullmatch(entry.name)) and found[1].startswith(part.name):
                        yield entry

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        lock = FileLock(self._directory / f".{name}.lock", is_singleton=False)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # A process whose server is gone holds the lock for minutes; the others then ask, and tell, themselves.
            lock.acquire(timeout=_MOST_SECONDS_WAITED, poll_interval=_POLL_SECONDS)
        except (OSError, NotImplementedError):
            pass  # without the lock a block may be fetched twice, and the budget be exceeded by a few
        try:
            yield
        finally:
            lock.release()

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / key


def stripe_of(key: str) -> int:
    """Number of the lock of a block, the same in all processes. Blocks of one shard have many, so that they are fetched
    at the same time."""
    return zlib.crc32(key.encode()) % _STRIPES
