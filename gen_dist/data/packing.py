"""Write the images of a source into the files of a packed cache."""

from __future__ import annotations

import collections
import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gen_dist.config import DataConfig
from gen_dist.config.labels import LabelScheme
from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.decoding import Decoded, decode_image
from gen_dist.data.deep_files import Keeping
from gen_dist.data.fitting import Fitting, fitting_of, line_on_changes
from gen_dist.data.forms import lines_on_form
from gen_dist.data.image_files import encoded_bytes, image_warnings_as_intended
from gen_dist.data.image_names import names_file, write_names
from gen_dist.data.labelling import completed, lines_on_labels
from gen_dist.data.losses import lines_on_losses
from gen_dist.data.naming import remarks_on_classes
from gen_dist.data.packed_files import ArrayFile, EncodedFile
from gen_dist.data.refusals import (
    OneShape,
    blocks_of,
    check_counts,
    check_labels,
    check_storage,
    class_names_of,
    held_out_count,
    leave_out,
    needs_fitting,
    refuse_image_options,
    scheme_of_source,
)
from gen_dist.data.sources.source import SPLITS, Block, KeepsDepth, Source, SplitName
from gen_dist.data.subsets import held_out_order
from gen_dist.data.tally import Tally
from gen_dist.errors import DataError
from gen_dist.files import reason_of
from gen_dist.limits import usable_cpus

# Images decoded by one task of the thread pool make the hand-over cheap. Those of all tasks bound memory.
IMAGES_PER_TASK = 16
MOST_BYTES_DECODED = 2**30
THREADS = min(usable_cpus(), 32)
# Encoded images that wait for the pool; blocks of usual images are a few MB.
_MOST_BYTES_WAITING = 2**26
# The bar is for sources that take long; shorter ones leave no trace of it.
SECONDS_BEFORE_PROGRESS = 1.0


@dataclass(frozen=True)
class Packed:
    """Result of packing, besides the files."""

    labels: LabelScheme
    """Meaning of the labels."""
    left_out: int
    """Number of unreadable images."""
    left_out_text: str
    """Their number by reason, and the first names."""
    remarks: list[str]
    """Lines about class names that may not be meant, about images that were resized, and about images that lost
    something, such as their further pages."""
    decoding: dict[str, Any] | None = None
    """How encoded images are decoded, for JSON; None if they are packed as values."""


def images_file(split: SplitName) -> str:
    """Name of the file with the images of a split."""
    return f"{split}_images.npy"


def offsets_file(split: SplitName) -> str:
    """Name of the file with the offsets of the encoded images of a split."""
    return f"{split}_offsets.npy"


def labels_file(split: SplitName) -> str:
    """Name of the file with the labels of a split."""
    return f"{split}_labels.npy"


@contextlib.contextmanager
def cache_errors(directory: Path) -> Iterator[None]:
    """Context manager that turns an OSError while writing below `directory` into a one-line DataError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = f"{'free some space or ' if full else ''}name another directory with --cache-dir or $GEN_DIST_CACHE"
        reason = error.strerror or str(error) or type(error).__name__
        raise DataError(f"cannot write packed images to {directory}: {reason}; {way_out}") from None


def pack(source: Source, packing: DataConfig, directory: Path, shown_directory: Path) -> Packed:
    """Write the images, labels and names of both splits into `directory`, as `train_images.npy` and so on.

    A split has no file of names if its source does not name each image.

    Args:
        source: the images.
        packing: image size, channels, share held out, what to do with unreadable images.
        directory: an empty directory.
        shown_directory: directory named in errors about a full disk.

    Raises:
        DataError: the images cannot be packed as configured, or the disk is full.
    """
    refuse_image_options(source, packing)
    class_names = class_names_of(source)
    with contextlib.ExitStack() as stack:
        packer = _Packer(source, packing, directory, shown_directory, scheme_of_source(source, class_names))
        stack.callback(packer.close)
        stack.enter_context(image_warnings_as_intended())
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        # An error must not wait for the images that are still queued.
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        total = source.image_count()
        bar = stack.enter_context(
            tqdm(
                total=total,
                desc=f"packing {source.name}",
                unit=" images",
                delay=SECONDS_BEFORE_PROGRESS,
                disable=True if total is None else None,
            )
        )
        packer.pack(pool, bar.update)
        packer.finish()
    remarks = [
        *remarks_on_classes(class_names),
        *lines_on_form(source, packing, packer.shape),
        *packer.lines_on_labels,
        *line_on_changes(packer.changes),
        *lines_on_losses(packer.losses),
    ]
    return Packed(packer.scheme, packer.left_out.count, str(packer.left_out), remarks, packer.decoding)


Result = Decoded | str
"""An image, or the reason why it is unreadable."""


def source_fitting(source: Source, packing: DataConfig) -> Fitting | None:
    """Size that images of a source are brought to; None keeps their own."""
    return fitting_of(packing, None if packing.size or packing.fit == "none" else source.default_size)


def source_keeping(source: Source, packing: DataConfig) -> Keeping:
    """Parts of a source's files that packing keeps."""
    deep = packing.dtype == "source" and isinstance(source, KeepsDepth) and source.deep_dtype() is not None
    return Keeping(deep, packing.pages)


def decode_some(
    source: Source,
    packing: DataConfig,
    block: Block,
    first: int,
    count: int = IMAGES_PER_TASK,
) -> list[Result]:
    """Decode the images of one task: up to `count` from the place `first` of a block on.

    Raises:
        DataError: a file cannot be read just now, which must not leave its image out for good; or memory is exhausted.
    """
    decoded: list[Result] = []
    fitting, keeping = source_fitting(source, packing), source_keeping(source, packing)
    for position, encoded in enumerate(block.images[first : first + count], start=first):
        try:
            decoded.append(decode_image(encoded, fitting, packing.channels, keeping))
        except UnreadableImage as error:
            decoded.append(str(error))
        except OSError as error:
            raise cannot_read(source, block.name(position), reason_of(error)) from None
        except MemoryError:
            raise cannot_read(source, block.name(position), "out of memory") from None
    return decoded


def cannot_read(source: Source, name: str, reason: str) -> DataError:
    """An error that says nothing about an image."""
    return DataError(
        f"{source.name}: cannot read {name}: {reason}; nothing is packed: repair that and try again, or move "
        "the file away"
    )


class _Packer:
    def __init__(
        self, source: Source, packing: DataConfig, directory: Path, shown_directory: Path, scheme: LabelScheme
    ) -> None:
        self.scheme = scheme
        """Meaning of the labels; completed by `finish`."""
        self.lines_on_labels: list[str] = []
        self.left_out = Tally()
        self.losses = Tally()
        self.changes: collections.Counter[str] = collections.Counter()
        """Number of images by what their resizing does to them."""
        self._source = source
        self._packing = packing
        self._directory = directory
        self._shown_directory = shown_directory
        self._shape = OneShape(source, packing)
        self._is_encoded = packing.packed_as == "encoded"
        self.decoding: dict[str, Any] | None = None
        """How packed bytes become images, for JSON; None if they are values."""
        self._all_gray = True
        self._labels: dict[SplitName, list[NDArray[Any]]] = {split: [] for split in SPLITS}
        self._names: dict[SplitName, list[str]] = {split: [] for split in SPLITS}
        with cache_errors(shown_directory):
            self._files = {split: self._new_file(split) for split in SPLITS}

    def _new_file(self, split: SplitName) -> ArrayFile | EncodedFile:
        path = self._directory / images_file(split)
        return EncodedFile(path, self._directory / offsets_file(split)) if self._is_encoded else ArrayFile(path)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the rows; None without one."""
        return self._shape.shape

    def pack(self, pool: ThreadPoolExecutor, progress: Callable[[int], object]) -> None:
        """Decode in the pool and append in order; a bounded window of tasks keeps all threads busy."""
        window: collections.deque[tuple[Block, int, Future[list[Result]]]] = collections.deque()
        fitting = source_fitting(self._source, self._packing)
        for block in blocks_of(self._source):
            check_labels(self._source, block, self.scheme, self._packing)
            check_storage(self._source, self._packing, block)
            images = block.images
            if isinstance(images, np.ndarray) and not needs_fitting(self._source, self._packing, block, images):
                while window:
                    progress(self._append_decoded(fitting, *window.popleft()))
                self._append(block, images, range(len(block.labels)))
                self._all_gray &= images.shape[1] == 1
                progress(len(block.labels))
                continue
            first = 0
            while first < len(block.labels):
                count, tasks = self._at_once(fitting)
                task = pool.submit(decode_some, self._source, self._packing, block, first, count)
                window.append((block, first, task))
                first += count
                while len(window) > tasks or (
                    len(window) > 1 and _bytes_of(block for block, *_ in window) > _MOST_BYTES_WAITING
                ):
                    progress(self._append_decoded(fitting, *window.popleft()))
        while window:
            progress(self._append_decoded(fitting, *window.popleft()))

    def finish(self) -> None:
        """Hold out the test split where there is none, drop equal channels, and write what remains to the disk."""
        check_counts(self._source, {split: file.count for split, file in self._files.items()}, self.left_out)
        train, test = cast(Any, self._files["train"]), cast(Any, self._files["test"])
        train_labels, test_labels = (
            np.concatenate([*self._labels[split], np.empty((0, *self.scheme.shape), self.scheme.dtype)])
            for split in SPLITS
        )
        train_names, test_names = (self._names[split] for split in SPLITS)
        train_rows = np.arange(train.count)
        with cache_errors(self._shown_directory):
            if not self._source.has_test_split:
                held_out = held_out_count(train.count, self._packing)
                order = held_out_order(train.count)
                # Test images stay in the keyed order: the first of them, which pictures show, are of mixed classes.
                test_rows, train_rows = order[:held_out], np.sort(order[held_out:])
                for images in train.some_rows(test_rows):
                    test.append(images)
                train_labels, test_labels = train_labels[train_rows], train_labels[test_rows]
                if len(train_names) == train.count:
                    train_names, test_names = ([train_names[row] for row in rows] for rows in (train_rows, test_rows))
            self.scheme, train_labels, test_labels = completed(
                self._source.name, self.scheme, train_labels, test_labels
            )
            self.lines_on_labels = lines_on_labels(self.scheme, train_labels, test_labels)
            assert self._shape.shape is not None
            stored = self._shape.shape[0]
            channels = 1 if self._packing.channels is None and self._all_gray else stored
            if len(train_rows) < train.count or channels < stored:
                train.keep(train_rows, channels)
            if channels < stored:
                test.keep(np.arange(test.count), channels)
            self._describe_decoding(channels)
            contents = ((train_labels, train_names), (test_labels, test_names))
            for split, (labels, names) in zip(SPLITS, contents, strict=True):
                self._files[split].finish()
                if len(names) == len(labels):
                    write_names(self._directory / names_file(split), names)
                with (self._directory / labels_file(split)).open("wb") as file:
                    np.lib.format.write_array(file, labels, version=(1, 0), allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())

    def _describe_decoding(self, channels: int) -> None:
        if not self._is_encoded:
            return
        assert self._shape.shape is not None
        self.decoding = {
            "shape": [channels, *self._shape.shape[1:]],
            "dtype": self._shape.dtype,
            "fitting": source_fitting(self._source, self._packing),
            "keeping": source_keeping(self._source, self._packing),
            "reduces_colour": self._packing.channels == 1,
        }

    def _at_once(self, fitting: Fitting | None) -> tuple[int, int]:
        """Images that a task decodes, and tasks that wait: one image at first if their size is not known, and few if
        they are large."""
        shape = self._shape.shape
        if fitting is None and shape is None:
            return 1, 1
        most = max(1, MOST_BYTES_DECODED // math.prod(shape or (3, *(fitting or ())[:2])))
        images = max(1, min(IMAGES_PER_TASK, most // (2 * THREADS)))
        return images, min(2 * THREADS, most // images)

    def _append_decoded(self, fitting: Fitting | None, block: Block, first: int, task: Future[list[Result]]) -> int:
        images = task.result()
        readable, positions = [], []
        for position, image in enumerate(images, start=first):
            if isinstance(image, str):
                leave_out(self._source, self._packing, self.left_out, block.name(position), image)
                continue
            self._shape.check(image.pixels.shape, block.name(position))
            self._all_gray &= image.gray
            self.changes.update(fitting.changes(image.size) if fitting else [])
            for kind, detail in image.losses.items():
                self.losses.add(block.name(position), detail, kind)
            readable.append(image.pixels)
            positions.append(position)
        if readable:
            encoded = [encoded_bytes(block.images[position]) for position in positions] if self._is_encoded else None
            self._append(block, np.stack(readable), positions, encoded)
        return len(images)

    def _append(
        self, block: Block, images: NDArray[Any], positions: Sequence[int], encoded: list[bytes] | None = None
    ) -> None:
        """Append the images of a block at these positions, as their encoded bytes if they are given."""
        name = block.name(positions[0] if positions else 0)
        self._shape.check(images.shape[1:], name)
        self._shape.check_dtype(str(images.dtype), name)
        with cache_errors(self._shown_directory):
            file: Any = self._files[block.split]
            file.append(images if encoded is None else encoded)
        self._labels[block.split].append(block.labels[positions].astype(self.scheme.dtype, copy=False))
        if not isinstance(block.names, str):
            self._names[block.split] += [block.names[position] for position in positions]


def _bytes_of(blocks: Iterable[Block]) -> int:
    """Size of the encoded images that blocks hold in memory."""
    distinct = {id(block): block.images for block in blocks}
    return sum(len(image) for images in distinct.values() for image in images if isinstance(image, bytes))
