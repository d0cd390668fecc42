"""Rules for images that are to be packed: those that are refused or left out, and how many are held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.labels import LabelScheme, classes_named
from gen_dist.data.forms import own_shape
from gen_dist.data.labelling import MISSING
from gen_dist.data.sources.source import SPLITS, Block, HasLabels, Source, SplitName, form_of_source
from gen_dist.data.tally import Tally
from gen_dist.data.values import DTYPES
from gen_dist.errors import DataError, agreeing, number_of

_DEFAULTS = DataConfig()


def class_names_of(source: Source) -> tuple[str, ...]:
    """Names of a source's classes.

    Raises:
        DataError: it gives something else.
    """
    given: Any = source.class_names()
    if not isinstance(given, tuple | list) or not all(isinstance(name, str) for name in given):
        raise DataError(f"{source.name}: {type(source).__name__}.class_names() gives no tuple of texts")
    return tuple(given)


def blocks_of(source: Source) -> Iterator[Block]:
    """Blocks of a source.

    Raises:
        DataError: it gives something else, a split of another name, or not as many labels as images.
    """
    made: Any = source.blocks()
    owner = f"{source.name}: {type(source).__name__}.blocks() gives"
    if not isinstance(made, Iterable):
        raise DataError(f"{owner} {type(made).__name__}, over which there is no loop; `yield` each Block")
    for block in made:
        if not isinstance(block, Block):
            raise DataError(f"{owner} {type(block).__name__}, not a gen_dist.data.sources.source.Block")
        if block.split not in SPLITS:
            raise DataError(f"{owner} a block of the split {block.split!r}, which is none of {', '.join(SPLITS)}")
        labels: Any = block.labels
        if not isinstance(labels, np.ndarray) or labels.shape[:1] != (len(block.images),):
            count = len(labels) if hasattr(labels, "__len__") else "no"
            raise DataError(
                f"{owner} {len(block.images)} images and {count} labels; give as many, in an int64 array [N]"
            )
        yield block


def refuse_image_options(source: Source, packing: DataConfig) -> None:
    """Raise DataError if an option that is for images is given for signals or vectors."""
    if (form := form_of_source(source)) == "images":
        return
    for name in ("image_size", "fit", "channels", "dtype", "pages", "packed_as", "decoded_on"):
        if (value := getattr(packing, name)) != getattr(_DEFAULTS, name):
            raise DataError(
                f"{source.name}: --{name.replace('_', '-')} {value} is for images, and these are {form}; leave it out"
            )


def needs_fitting(source: Source, packing: DataConfig, block: Block, images: NDArray[Any]) -> bool:
    """True if the images of a block, which are an array, have another size or number of channels than packing wants.

    Raises:
        DataError: the array has another shape than [N, C, H, W], a dtype that is not kept, or values that are not
            finite; or packing wants a dtype or channels that it cannot be brought to.
    """
    form = form_of_source(source)
    shape = [len(images), *own_shape(form, images.shape[1:])] if images.ndim == 4 else list(images.shape)
    what = f"{source.name}: {form} are {images.dtype} {shape}"
    if str(images.dtype) not in DTYPES or images.ndim != 4:
        raise DataError(f"{what}, not {', '.join(DTYPES[:-1])} or {DTYPES[-1]} [N, C, H, W]")
    if packing.dtype == "uint8" and images.dtype != np.uint8:
        raise DataError(f"{what}; --dtype uint8 reduces files only: leave it out, or give uint8")
    if packing.channels not in (None, images.shape[1]) and images.shape[1] not in (1, 3):
        raise DataError(f"{what}; --channels makes gray of RGB and RGB of gray: leave it out")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
        raise DataError(
            f"{what}, and {len(bad):,} of them {agreeing(len(bad), 'have')} values that are not finite, "
            f"first {block.name(int(bad[0]))}; replace the values, or leave those out"
        )
    height, width = images.shape[2:]
    other_size = packing.fit != "none" and packing.size not in (None, (width, height))
    return packing.channels not in (None, images.shape[1]) or other_size


def scheme_of_source(source: Source, class_names: tuple[str, ...]) -> LabelScheme:
    """Meaning of a source's labels: what it says, or its classes."""
    return source.label_scheme() if isinstance(source, HasLabels) else classes_named(class_names)


def check_labels(source: Source, block: Block, scheme: LabelScheme, packing: DataConfig) -> None:
    """Raise DataError if a label of a block is none of the scheme, or is missing and may not be."""
    labels = block.labels
    kinds = "f" if scheme.kind == "numbers" else "iu"  # of any width: a source of a plug-in may have narrow ones
    if labels.shape[1:] != scheme.shape or labels.dtype.kind not in kinds:
        raise DataError(
            f"{source.name}: labels of {block.name(0)} are {labels.dtype} {list(labels.shape)}; "
            f"{scheme.dtype} {[len(labels), *scheme.shape]} is needed"
        )
    columns = labels.reshape(len(labels), math.prod(scheme.shape))
    missing = np.isnan(columns) if scheme.kind == "numbers" else columns == MISSING
    if missing.any() and packing.missing_labels == "refuse":
        first = int(np.flatnonzero(missing.any(axis=1))[0])
        raise DataError(
            f"{source.name}: {block.name(first)} has no label; give it one, leave that image out, or use "
            "--missing-labels unknown"
        )
    if scheme.kind == "numbers":
        return
    counts = [len(of) for of in scheme.values] or [scheme.classes]
    wrong = ~missing & ((columns < 0) | (columns >= np.array(counts)))
    if wrong.any():
        place, column = (int(found) for found in np.argwhere(wrong)[0])
        raise DataError(
            f"{source.name}: label {columns[place, column]} of {block.name(place)} is out of range "
            f"0..{counts[column] - 1}"
        )


class OneShape:
    """Shape that all images have to share after those of other sizes are fitted."""

    def __init__(self, source: Source, packing: DataConfig) -> None:
        self._source = source
        self._packing = packing
        self._first_name = ""
        self.shape: tuple[int, ...] | None = None
        """(C, H, W) of the first image; None without one."""
        self._first_of_dtype = ""
        self.dtype = ""
        """Type of the values of the first image."""

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise DataError if the shape (C, H, W) of an image is not that of the first, or not the configured one."""
        if self.shape is None:
            if self._packing.size not in (None, shape[:0:-1]):
                raise DataError(
                    f"{self._source.name}: {name} is {_width_by_height(shape)}, not {self._packing.image_size}, and "
                    f"--fit none refuses that; give --image-size {shape[2]}x{shape[1]}, or --fit crop, pad or stretch"
                )
            self.shape, self._first_name = shape, name
        elif shape != self.shape:
            if (form := form_of_source(self._source)) != "images":
                raise DataError(
                    f"{self._source.name}: {form} differ in size: {self._first_name} is {own_shape(form, self.shape)}, "
                    f"{name} is {own_shape(form, shape)}; bring them to one"
                )
            raise DataError(
                f"{self._source.name}: images differ in size: {self._first_name} is {_width_by_height(self.shape)}, "
                f"{name} is {_width_by_height(shape)}; give {self._way_out()} to bring them to one"
            )

    def check_dtype(self, dtype: str, name: str) -> None:
        """Raise DataError if the values of an image are of another type than those of the first."""
        if not self.dtype:
            self.dtype, self._first_of_dtype = dtype, name
        elif dtype != self.dtype:
            raise DataError(
                f"{self._source.name}: images differ in type: {self._first_of_dtype} is {self.dtype}, {name} is "
                f"{dtype}; convert them to one"
            )

    def _way_out(self) -> str:
        if self._packing.fit != "none":
            return "--image-size"
        return "--fit crop, pad or stretch" + (" with --image-size" if self._packing.size is None else "")


def check_storage(source: Source, packing: DataConfig, block: Block) -> None:
    """Raise DataError if the images of a block are to be packed as they are encoded, and are values."""
    if packing.packed_as == "encoded" and isinstance(block.images, np.ndarray):
        raise DataError(f"{source.name} is of arrays, not of encoded images; leave out --packed-as encoded")


def leave_out(source: Source, packing: DataConfig, left_out: Tally, name: str, reason: str) -> None:
    """Count an unreadable image.

    Raises:
        DataError: the config treats unreadable images as an error.
    """
    if packing.unreadable_images == "error":
        raise DataError(
            f"{source.name}: {name} is unreadable ({' '.join(reason.split())[:200]}); repair or remove it, "
            "or use --unreadable-images skip"
        )
    left_out.add(name, reason)


def check_counts(source: Source, counts: Mapping[SplitName, int], left_out: Tally) -> None:
    """Raise DataError if there are too few readable images in a split, or more unreadable ones than readable ones."""
    readable = sum(counts.values())
    skipped = left_out.count
    total = readable + skipped
    if total == 0:
        raise DataError(f"{source.name}: it has no images")
    if 2 * skipped > total:
        raise DataError(
            f"{source.name}: {skipped:,} of {number_of(total, 'image')} {agreeing(skipped, 'are')} unreadable "
            f"({left_out.first}); that is more than half, so this is hardly the right data"
        )
    if source.has_test_split:
        for split in SPLITS:
            if counts[split] == 0:
                raise DataError(f"{source.name}: the {split} split has no readable image")
    elif readable < 2:
        raise DataError(f"{source.name}: one readable image is too few; one is held out, so give two or more")


def held_out_count(count: int, packing: DataConfig) -> int:
    """Number of test images held out of `count` images, at least two, of a source without a test split."""
    return min(max(round(count * packing.test_fraction), 1), count - 1)


def _width_by_height(shape: tuple[int, ...]) -> str:
    channels = {1: " gray", 3: ""}.get(shape[0], f" of {shape[0]} channels")
    return f"{shape[2]}x{shape[1]}{channels}"
