"""`folder:PATH`: a directory of image files, classes by sub-directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.deep_files import Keeping, common_dtype
from gen_dist.data.headers import count_pages, read_header
from gen_dist.data.identity import content_sample, stamp
from gen_dist.data.image_files import ImageFile
from gen_dist.data.labelling import MISSING
from gen_dist.data.naming import names_test, names_train, printable, some, spelled_twice
from gen_dist.data.sources.source import Block, Request, SplitName, register
from gen_dist.data.walking import EXTENSIONS, Found, has_image, scan, walk
from gen_dist.errors import DataError, number_of
from gen_dist.files import retrying

_TEST_DIRECTORIES = ("test", "val", "valid", "validation")
_ONE_CLASS = "all"
_BLOCK_IMAGES = 512
_SIDE_OF_MIXED = 64


class _Image(NamedTuple):
    path: str
    shown: str
    """Path within the folder, as errors and the fingerprint have it."""
    class_name: str | None
    """None if its label is missing."""
    stamp: list[int]
    """See `gen_dist.data.identity.stamp`."""


class _Layout(NamedTuple):
    """Directories of the splits; without `test`, part of the images is held out."""

    train: str
    test: str | None


@dataclass
class Folder:
    """Images below a directory.

    `train` beside `test` or `val` are the splits; else part of the images is held out. Classes are the sub-directories
    of a split, in sorted order; a directory with images and no sub-directories is one class. Images beside them have no
    label, if that is allowed.
    """

    path: Path
    has_size: bool = True
    """True if a size is configured, so that it does not matter whether the images are alike."""
    pages_are_images: bool = False
    """True if each page of a file is an image."""
    labels_may_miss: bool = False
    """True if images beside the directories of classes are images without a label."""
    _remarks: list[str] = field(init=False)
    _found: Found = field(init=False)
    """Entries beside the images of the splits."""
    _splits: dict[SplitName, list[_Image]] = field(init=False)
    _split_directories: tuple[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise DataError(f"{self.name}: there is no such directory; name that of your images, --data folder:PATH")
        if not self.path.is_dir():
            raise DataError(f"{self.name}: that is a file, not a directory of images")
        self._splits = retrying(self._scan)

    @property
    def name(self) -> str:
        """`folder:PATH`."""
        return f"folder:{printable(str(self.path))}"

    @property
    def slug(self) -> str:
        """`folder-` and the directory's name."""
        return f"folder-{self.path.resolve().name or 'root'}"

    @property
    def has_test_split(self) -> bool:
        """True if both splits have directories."""
        return "test" in self._splits

    @cached_property
    def default_size(self) -> int | None:
        """None if the headers of all images say one size, else 64."""
        sizes = set()
        for image in (image for files in self._splits.values() for image in files):
            with contextlib.suppress(UnreadableImage):
                header = read_header(ImageFile(image.path, *image.stamp[:2]))
                sizes.add((header.width, header.height))
            if len(sizes) > 1:
                return _SIDE_OF_MIXED
        return None

    def fingerprint(self) -> object:
        """Path, names and stamps of all image files, and the content of some."""
        images = [image for files in self._splits.values() for image in files]
        return [
            os.fsencode(self.path.resolve()).hex(),
            {split: [image[1:] for image in files] for split, files in self._splits.items()},
            content_sample([(image.path, image.stamp[0]) for image in images]),
            # Without a configured size, packages of older versions resized images that are alike.
            *([] if self.has_size else ["images that are alike keep their size"]),
        ]

    def remarks(self) -> list[str]:
        """Lines on entries that are not used, and on names of splits that are taken for classes."""
        return [*self._remarks, *self._found.remarks()]

    def fetch(self) -> None:
        """Nothing to do."""

    def class_names(self) -> tuple[str, ...]:
        """Sub-directories with images, sorted."""
        names = {file.class_name for file in self._splits["train"]} - {None}
        return tuple(sorted(filter(None, names))) or (_ONE_CLASS,)

    def image_count(self) -> int:
        """Image files in both splits, or their pages, unreadable ones included."""
        return sum(self._pages(file) for files in self._splits.values() for file in files)

    def deep_dtype(self) -> str | None:
        """See `KeepsDepth`. The headers of all files are read, or those up to the first 8-bit image."""
        return self._deep_dtype

    def blocks(self) -> Iterator[Block]:
        """Files in sorted order of their paths."""
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(self.class_names())}
        numbers[None] = MISSING
        for split, files in self._splits.items():
            for first in range(0, len(files), _BLOCK_IMAGES):
                part = files[first : first + _BLOCK_IMAGES]
                pages = [(file, page) for file in part for page in range(self._pages(file))]
                labels = np.array([numbers[file.class_name] for file, _ in pages], np.int64)
                images = [ImageFile(file.path, file.stamp[0], file.stamp[1], page) for file, page in pages]
                names = [
                    f"{file.shown} page {page + 1}" if self._pages(file) > 1 else file.shown for file, page in pages
                ]
                yield Block(split, images, labels, names)

    def _pages(self, file: _Image) -> int:
        """Images in a file."""
        if not self.pages_are_images:
            return 1
        if file.path not in self._page_counts:
            with contextlib.suppress(UnreadableImage):
                self._page_counts[file.path] = count_pages(ImageFile(file.path, *file.stamp[:2]))
        return self._page_counts.setdefault(file.path, 1)

    @cached_property
    def _page_counts(self) -> dict[str, int]:
        return {}

    @cached_property
    def _deep_dtype(self) -> str | None:
        return common_dtype(self._dtypes())

    def _dtypes(self) -> Iterator[str]:
        for file in (file for files in self._splits.values() for file in files):
            with contextlib.suppress(UnreadableImage):
                yield read_header(ImageFile(file.path, *file.stamp[:2]), Keeping(deep=True, pages="first")).dtype

    def _scan(self) -> dict[SplitName, list[_Image]]:
        self._remarks, self._found = [], Found()
        layout = self._layout()
        self._split_directories = (layout.train, layout.test)
        splits: dict[SplitName, list[_Image]] = {"train": self._images(self.path / layout.train)}
        if layout.test is not None:
            splits["test"] = self._images(self.path / layout.test)
        if self.labels_may_miss and not all(self._is_beside(file) for files in splits.values() for file in files):
            splits = {split: list(map(self._without_label, files)) for split, files in splits.items()}
        self._check_classes(splits, layout.test)
        return splits

    def _layout(self) -> _Layout:
        """Tell splits from classes.

        Raises:
            DataError: the directories may mean one thing or another.
        """
        entries = scan(self.path)
        directories = [entry.name for entry in entries if entry.is_directory]
        loose = sum(entry.is_image for entry in entries)
        trains = [name for name in directories if names_train(name)]
        tests = sorted((name for name in directories if names_test(name)), key=_preference)
        if len(trains) > 1:
            raise DataError(
                f"{self.name}: {some(f'{name}/' for name in trains)} are spellings of one; rename all but one"
            )
        if trains and tests:
            unused = [f"{name}/" for name in directories if name not in (trains[0], tests[0]) and self._has_image(name)]
            unused += [f"{number_of(loose, 'image')} beside them"] if loose else []
            if unused:
                self._remarks.append(f"not used beside {trains[0]}/ and {tests[0]}/: {some(unused)}")
            return _Layout(trains[0], tests[0])
        others = [name for name in directories if name not in (*trains, *tests) and self._has_image(name)]
        if trains and not others:
            if loose:
                self._remarks.append(f"not used beside {trains[0]}/: {number_of(loose, 'image')}")
            return _Layout(trains[0], None)
        for name in (*trains, *tests):
            self._check_split_as_class(name, others)
        if len(directories) == len(others) == 1 and not loose:
            self._check_inner(others[0])
        return _Layout("", None)

    def _check_split_as_class(self, name: str, others: list[str]) -> None:
        """A directory named like a split, whose counterpart is missing, is a class if images are directly in it."""
        beside = f"lies beside {some(f'{other}/' for other in others)}" if others else "has no train/ beside it"
        way_out = f"give --data folder:{printable(str(self.path / name))} to train on it alone"
        if any(entry.is_directory and self._has_image(f"{name}/{entry.name}") for entry in scan(self.path / name)):
            raise DataError(
                f"{self.name}: {name}/ has classes as a split has, but {beside}; {way_out}, or name the splits train/ "
                "and test/"
            )
        if self._has_image(name):
            self._remarks.append(f"{name}/ {beside} and is taken for a class; {way_out}")

    def _check_inner(self, only: str) -> None:
        """Archives often unpack into one directory more."""
        inner = [entry.name for entry in scan(self.path / only) if entry.is_directory]
        if any(map(names_train, inner)) and any(map(names_test, inner)):
            raise DataError(
                f"{self.name}: the splits are one directory further down; give --data "
                f"folder:{printable(str(self.path / only))}"
            )

    def _has_image(self, name: str) -> bool:
        return has_image(self.path / name)

    def _images(self, directory: Path) -> list[_Image]:
        direct: list[_Image] = []
        in_classes: list[_Image] = []
        for entry in scan(directory, self._found):
            if entry.is_directory:
                below = Found()
                class_name = printable(entry.name)
                images = [self._image(path, status, class_name) for path, status in walk(entry.path, below)]
                if not images:
                    self._remarks.append(f"{self._shown(entry.path)}/ has no images and is not a class")
                elif any(map(names_train, below.directories)) and any(map(names_test, below.directories)):
                    self._remarks.append(
                        f"train and test directories inside the class {class_name} are not splits; put them above it"
                    )
                self._found.add(below)
                in_classes.extend(images)
            elif entry.is_image:
                direct.append(self._image(entry.path, entry.status, _ONE_CLASS))
        if direct and in_classes and self.labels_may_miss:
            return [*direct, *in_classes]
        if direct and in_classes:
            raise DataError(
                f"{self.name}: {printable(str(directory))} has {number_of(len(direct), 'image')} beside its class "
                f"directories, such as {direct[0].shown}; move them into a class directory or away, or "
                "use --missing-labels unknown"
            )
        if not direct and not in_classes:
            found = "".join(f"; {remark}" for remark in self._found.remarks())
            raise DataError(
                f"{self.name}: no images in {printable(str(directory))}; looked for {' '.join(EXTENSIONS)}{found}"
            )
        return direct or in_classes

    def _without_label(self, file: _Image) -> _Image:
        """An image as it is, or without a label if it lies beside the directories of classes."""
        return file._replace(class_name=None) if self._is_beside(file) else file

    def _is_beside(self, file: _Image) -> bool:
        return os.path.dirname(file.shown) in ("", *self._split_directories)

    def _image(self, path: str, status: os.stat_result, class_name: str) -> _Image:
        return _Image(path, self._shown(path), class_name, stamp(status))

    def _shown(self, path: str) -> str:
        # Sliced, as pathlib would take most of the time that a folder of 100,000 images needs at every opening.
        return printable(path[len(os.path.join(self.path, "")) :])

    def _check_classes(self, splits: dict[SplitName, list[_Image]], test: str | None) -> None:
        known = {file.class_name for file in splits["train"]} | {None}
        everywhere = {file.class_name for files in splits.values() for file in files if file.class_name is not None}
        if twice := spelled_twice(everywhere):
            first, second = (name.encode("unicode_escape").decode("ascii") for name in twice)
            raise DataError(
                f"{self.name}: class {twice[0]} is spelled in two ways, {first} and {second}; rename one as the other"
            )
        for file in splits.get("test", ()):
            if file.class_name not in known:
                raise DataError(
                    f"{self.name}: {file.shown} is of class {file.class_name!r}, which train does not have; "
                    f"give {test} the class directories of train, or remove it and images of train are held out"
                )


def _preference(name: str) -> tuple[int, str]:
    return (_TEST_DIRECTORIES.index(name) if name in _TEST_DIRECTORIES else len(_TEST_DIRECTORIES), name)


def _open(request: Request) -> Folder:
    packing = request.packing
    may_miss = packing.missing_labels == "unknown"
    return Folder(request.path, packing.size is not None, packing.pages == "images", may_miss)


register("folder", _open, takes_path=True)
