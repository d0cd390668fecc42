"""Exclusive building in a cache directory: one process a source at a time, which removes what killed builders left."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from gen_dist.data.packing import cache_errors
from gen_dist.files import NO_LOCKS

_BUILDING = re.compile(r"\.(?P<slug>.+)-building-[^-]*")
_LONGEST_SLUG = 60


class Named(Protocol):
    """A source, by its names."""

    @property
    def name(self) -> str:
        """The source as the user wrote it."""

    @property
    def slug(self) -> str:
        """Start of the names of its files."""


def file_slug(source: Named) -> str:
    """A source's slug as the start of a file name: short, and without characters that mean something elsewhere."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", source.slug)[:_LONGEST_SLUG]


def building_prefix(source: Named) -> str:
    """Start of the names of directories in which a source is packed."""
    return f".{file_slug(source)}-building-"


@contextlib.contextmanager
def only_builder(cache: Path, source: Named, announce: Callable[[str], None]) -> Iterator[None]:
    """Context manager that holds the lock of this source's builders. The system frees it if a builder dies.

    Where the file system has no locks, several processes may build at once, and the first to finish is used.
    """
    with cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = _lock(cache, file_slug(source))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            announce(f"waiting for another process that packs {source.name} into {cache}")
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            announce(f"{cache} has no file locks ({error}); packing {source.name} without")
        if lock.is_locked:
            _remove_half_built(cache, file_slug(source))
    try:
        yield
    finally:
        lock.release()


def _remove_half_built(cache: Path, own: str) -> None:
    """Remove what killed builders left: a living one would hold the lock of its source."""
    for left_over in cache.iterdir():
        found = _BUILDING.fullmatch(left_over.name)
        if found is None or left_over.is_symlink():
            continue
        if found["slug"] == own:
            shutil.rmtree(left_over)
            continue
        no_lock = contextlib.suppress(OSError, NotImplementedError)  # Timeout is an OSError
        with no_lock, _lock(cache, found["slug"]).acquire(timeout=0):
            shutil.rmtree(left_over)


def _lock(cache: Path, slug: str) -> FileLock:
    return FileLock(cache / f"{slug}.lock", is_singleton=False)
