"""`folder:PATH`: a directory of image files, classes by sub-directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gen_dist.data.sources.source import Block, SplitName, register
from gen_dist.errors import DataError

# fmt: off
EXTENSIONS = (
    ".avif", ".bmp", ".dds", ".gif", ".ico", ".jfif", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)
# fmt: on
"""Extensions of image files, in lower case."""

_TEST_DIRECTORIES = ("test", "val", "valid", "validation")
_ONE_CLASS = "all"
_BLOCK_IMAGES = 512


@dataclass(frozen=True)
class _ImagePath:
    path: str
    shown: str
    """Path within the folder, as errors and the fingerprint have it."""
    class_name: str
    size: int
    mtime_ns: int


@dataclass
class Folder:
    """Images below a directory.

    `train` beside `test` or `val` are the splits; else part of the images is held out. Classes are the sub-directories
    of a split, in sorted order; a directory with images and no sub-directories is one class.
    """

    path: Path
    default_size: int | None = 64
    _splits: dict[SplitName, list[_ImagePath]] = field(init=False)

    def __post_init__(self) -> None:
        self._splits = self._scan()

    @property
    def name(self) -> str:
        """`folder:PATH`."""
        return f"folder:{self.path}"

    @property
    def slug(self) -> str:
        """`folder-` and the directory's name."""
        return f"folder-{self.path.resolve().name or 'root'}"

    @property
    def has_test_split(self) -> bool:
        """True if both splits have directories."""
        return "test" in self._splits

    def fingerprint(self) -> object:
        """Names, sizes and times of all image files."""
        return {
            split: [[file.shown, file.class_name, file.size, file.mtime_ns] for file in files]
            for split, files in self._splits.items()
        }

    def fetch(self) -> None:
        """Nothing to do."""

    def class_names(self) -> tuple[str, ...]:
        """Sub-directories with images, sorted."""
        return tuple(sorted({file.class_name for file in self._splits["train"]}))

    def image_count(self) -> int:
        """Image files in both splits, unreadable ones included."""
        return sum(len(files) for files in self._splits.values())

    def blocks(self) -> Iterator[Block]:
        """Files in sorted order of their paths."""
        numbers = {name: number for number, name in enumerate(self.class_names())}
        for split, files in self._splits.items():
            for first in range(0, len(files), _BLOCK_IMAGES):
                part = files[first : first + _BLOCK_IMAGES]
                labels = np.array([numbers[file.class_name] for file in part], np.int64)
                yield Block(split, [Path(file.path) for file in part], labels, [file.shown for file in part])

    def _scan(self) -> dict[SplitName, list[_ImagePath]]:
        if not self.path.exists():
            raise DataError(f"{self.name}: there is no such directory")
        if not self.path.is_dir():
            raise DataError(f"{self.name}: that is a file, not a directory of images")
        try:
            directories = {entry.name for entry in os.scandir(self.path) if entry.is_dir() and _is_visible(entry)}
            test = next((name for name in _TEST_DIRECTORIES if name in directories), None)
            if "train" in directories and test is not None:
                splits: dict[SplitName, list[_ImagePath]] = {
                    "train": self._images(self.path / "train"),
                    "test": self._images(self.path / test),
                }
                self._check_splits(splits, test)
                return splits
            # A lone `train` is a split, not the only class.
            return {"train": self._images(self.path / "train" if directories == {"train"} else self.path)}
        except OSError as error:
            raise DataError(f"{self.name}: cannot read {error.filename}: {error.strerror}") from None

    def _images(self, directory: Path) -> list[_ImagePath]:
        direct: list[_ImagePath] = []
        in_classes: list[_ImagePath] = []
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if not _is_visible(entry):
                continue
            if entry.is_dir():
                in_classes.extend(self._image(file, _printable(entry.name)) for file in _walk(entry.path, set()))
            elif _is_image(entry):
                direct.append(self._image(entry, _ONE_CLASS))
        if direct and in_classes:
            raise DataError(
                f"{self.name}: {directory} has {len(direct)} images beside its class directories, such as "
                f"{direct[0].shown}; move them into a class directory or away"
            )
        if not direct and not in_classes:
            raise DataError(f"{self.name}: no images in {directory}; looked for {' '.join(EXTENSIONS)}")
        return direct or in_classes

    def _image(self, entry: os.DirEntry[str], class_name: str) -> _ImagePath:
        status = entry.stat()
        # Sliced, as pathlib would take most of the time that a folder of 100,000 images needs at every opening.
        shown = _printable(entry.path[len(os.path.join(self.path, "")) :])
        return _ImagePath(entry.path, shown, class_name, status.st_size, status.st_mtime_ns)

    def _check_splits(self, splits: dict[SplitName, list[_ImagePath]], test: str) -> None:
        known = {file.class_name for file in splits["train"]}
        for file in splits["test"]:
            if file.class_name not in known:
                raise DataError(
                    f"{self.name}: {file.shown} is of class {file.class_name!r}, which train does not have; "
                    f"give {test} the class directories of train, or remove it and images of train are held out"
                )


def _walk(directory: str, parents: set[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """Image files below a directory, symbolic links followed except back into a parent."""
    status = os.stat(directory)
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if not _is_visible(entry):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, parents | {identity})
        elif _is_image(entry):
            yield entry


def _is_visible(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and entry.is_file()


def _printable(name: str) -> str:
    """File names may hold bytes that are no text; those are shown as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


register("folder", lambda request: Folder(request.path), takes_path=True)
