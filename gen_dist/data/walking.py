"""Image files below a directory, and a record of what else is there."""

from __future__ import annotations

import collections
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gen_dist.data.naming import printable, some

# fmt: off
EXTENSIONS = (
    ".avif", ".bmp", ".dds", ".gif", ".ico", ".jfif", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)
# fmt: on
"""Extensions of image files, in lower case."""


@dataclass
class Found:
    """Entries besides images that a walk found."""

    extensions: collections.Counter[str] = field(default_factory=collections.Counter)
    """Number of files that are no images by their names, by extension."""
    irregular: list[str] = field(default_factory=list)
    """Names of images that are no files: broken links, pipes, sockets, devices."""
    directories: set[str] = field(default_factory=set)
    """Names of the directories on the way."""

    def add(self, other: Found) -> None:
        """Add the entries of another walk, without its directories."""
        self.extensions += other.extensions
        self.irregular += other.irregular

    def remarks(self) -> list[str]:
        """Lines for the user, without hidden files."""
        remarks = []
        if self.irregular:
            remarks.append(
                f"left out {len(self.irregular):,} that are broken links, pipes, sockets or devices: "
                f"{some(self.irregular)}"
            )
        if self.extensions:
            counts = [f"{count:,} {extension}" for extension, count in self.extensions.most_common()]
            remarks.append(f"left out files that are not images by their names: {some(counts)}")
        return remarks


class Entry(NamedTuple):
    """A visible directory, or a file with the name of an image."""

    name: str
    path: str
    status: os.stat_result
    """State of the file, or of the target if it is a link."""

    @property
    def is_directory(self) -> bool:
        """True for directories and links to them."""
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_image(self) -> bool:
        """True for regular files with an image's extension."""
        return not self.is_directory


def scan(directory: str | os.PathLike[str], found: Found | None = None) -> list[Entry]:
    """Sub-directories and images in one directory, by name. What else is there is added to `found`.

    Raises:
        OSError: it cannot be listed.
    """
    entries = []
    found = found if found is not None else Found()
    with os.scandir(directory) as listed:
        for one in sorted(listed, key=lambda one: one.name):
            if one.name.startswith("."):
                continue
            looks_like_image = one.name.lower().endswith(EXTENSIONS)
            status = _status(one)
            if status is not None and (
                stat.S_ISDIR(status.st_mode) or (looks_like_image and stat.S_ISREG(status.st_mode))
            ):
                entries.append(Entry(one.name, os.fspath(one.path), status))
            elif looks_like_image:
                found.irregular.append(printable(one.name))
            else:
                found.extensions[printable(os.path.splitext(one.name)[1].lower()) or "without extension"] += 1
    return entries


def walk(directory: str | os.PathLike[str], found: Found) -> Iterator[tuple[str, os.stat_result]]:
    """Paths and states of the image files below a directory, in sorted order.

    Links are followed. Each directory is entered once: directories that link to each other would have endless paths.
    """
    return _walk(directory, os.stat(directory), found, set())


def has_image(directory: str | os.PathLike[str]) -> bool:
    """True if there is an image below a directory."""
    return next(walk(directory, Found()), None) is not None


def _walk(
    directory: str | os.PathLike[str], status: os.stat_result, found: Found, entered: set[tuple[int, int]]
) -> Iterator[tuple[str, os.stat_result]]:
    identity = (status.st_dev, status.st_ino)
    if identity in entered:
        return
    entered.add(identity)
    for entry in scan(directory, found):
        if entry.is_directory:
            found.directories.add(entry.name)
            yield from _walk(entry.path, entry.status, found, entered)
        else:
            yield entry.path, entry.status


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """State of an entry's target. None for broken links and links to themselves."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return None
        raise
