"""Images of shards that are packed as those of other sources: the test split, and a sample of the training split."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from gen_dist.config import DataConfig
from gen_dist.config.addresses import shown
from gen_dist.config.labels import LabelScheme
from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.decoding import Decoded, decode_image
from gen_dist.data.deep_files import Keeping
from gen_dist.data.fitting import Fitting, fitting_of, line_on_changes
from gen_dist.data.headers import Header, read_header
from gen_dist.data.image_files import image_warnings_as_intended
from gen_dist.data.image_names import names_file, write_names
from gen_dist.data.losses import lines_on_losses
from gen_dist.data.naming import printable
from gen_dist.data.packed_files import ArrayFile
from gen_dist.data.packing import SECONDS_BEFORE_PROGRESS, images_file, labels_file
from gen_dist.data.shards.contents import BLOCK_BYTES
from gen_dist.data.shards.fetching import READERS, Fetcher
from gen_dist.data.shards.image_names import BYTES_BEFORE, image_name
from gen_dist.data.shards.places import kind_of
from gen_dist.data.tally import Tally, unreadable_images
from gen_dist.errors import DataError, agreeing, number_of
from gen_dist.files import sync

T = TypeVar("T")

_LOOKED_AT = 256
_WAITING = 2 * READERS
# Bytes between two images that cost less than another request.
_LARGEST_GAP = 2**16


class Picked(NamedTuple):
    """One image of a shard."""

    place: str
    offset: int
    size: int
    label: Any
    """Number of the class; or attributes or numbers, as a list."""
    row: int | None = None
    """Number of the image in its shard, where it is known."""

    @property
    def name(self) -> str:
        """Shard and place in it."""
        return f"image at byte {self.offset:,} of {printable(shown(self.place))}"


@dataclass
class Look:
    """Shape of the images of a set, by a look at some."""

    shape: tuple[int, int, int]
    """(C, H, W)."""
    fitting: Fitting | None
    remarks: list[str]
    dtype: str = "uint8"
    """Type of the values."""

    @property
    def keeping(self) -> Keeping:
        """Parts of the images that decoding keeps."""
        return keeping_of(self.dtype)


def keeping_of(dtype: str) -> Keeping:
    """Parts of images of shards that decoding keeps, given the type of their values."""
    return Keeping(deep=dtype != "uint8", pages="first")


class PackedParts:
    """Packer of some images of shards."""

    def __init__(
        self, name: str, packing: DataConfig, fetcher: Fetcher, read: Callable[[str, int, int], bytes]
    ) -> None:
        """
        Args:
            name: the source in error messages.
            packing: size and channels of the images.
            fetcher: owner of the threads.
            read: function that gives the bytes of a shard from an offset to another; called in several threads.
        """
        self._name = name
        self._packing = packing
        self._fetcher = fetcher
        self._read = read

    def look(self, sample: list[Picked]) -> Look:
        """Choose the shape of all images.

        Raises:
            DataError: they differ in size, type or channels, or most are unreadable.
        """
        some = sample[:: -(-len(sample) // _LOOKED_AT)]
        headers: list[Header] = []
        changes: collections.Counter[str] = collections.Counter()
        damaged = Tally()
        fitting = fitting_of(self._packing, None)
        for one, found in self.headers(some):
            if isinstance(found, str):
                damaged.add(one.name, found)
            else:
                headers.append(found)
                changes.update(fitting.changes((found.width, found.height)) if fitting else [])
        if damaged.count > len(headers):
            raise DataError(
                f"{self._name}: {damaged.count} of {number_of(len(some), 'image')} looked at "
                f"{agreeing(damaged.count, 'are')} unreadable ({damaged.first}); that is more than half, so this "
                "is hardly the right data"
            )
        dtypes = sorted({header.dtype for header in headers})
        arrays = sorted({header.dtype for header in headers if " array" in header.kind} - {"uint8"})
        if arrays and self._packing.dtype == "uint8":
            raise DataError(
                f"{self._name}: images are arrays of {' and '.join(arrays)}, which --dtype uint8 does not reduce; "
                "leave it out, or make the shards with it"
            )
        if len(dtypes) > 1 and self._packing.dtype == "source":
            way_out = "make the shards with --dtype uint8" if arrays else "reduce them: --dtype uint8"
            raise DataError(f"{self._name}: images are of {' and '.join(dtypes)}; {way_out}")
        dtype = dtypes[0] if self._packing.dtype == "source" else "uint8"
        sizes = sorted({(header.width, header.height) for header in headers})
        if fitting is None and len(sizes) > 1:
            shown_sizes = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
            raise DataError(f"{self._name}: images are of {shown_sizes}; say which size all get with --image-size")
        width, height = fitting[:2] if fitting else sizes[0]
        channels = self._channels({header.channels for header in headers})
        lines = [f"of {number_of(len(headers), 'image')} looked at, {line}" for line in line_on_changes(changes)]
        return Look((channels, height, width), fitting, lines, dtype)

    def _channels(self, found: set[int]) -> int:
        """Channels of all images."""
        asked = self._packing.channels
        if found <= {1, 3}:
            return asked or max(found)
        if len(found) > 1 or asked not in (None, *found):
            counts = " and ".join(map(str, sorted(found)))
            raise DataError(f"{self._name}: images have {counts} channels; all need one number, without --channels")
        return found.pop()

    def pack(self, directory: Path, split: str, picked: list[Picked], look: Look, scheme: LabelScheme) -> None:
        """Write images, labels and names as files of a split. Unreadable images are left out, as configured.

        Raises:
            DataError: an image is of another size, or none is readable.
        """
        left_out, losses = Tally(), Tally()
        labels, names = [], []
        file = ArrayFile(directory / images_file(split))  # type: ignore[arg-type]
        bar = tqdm(
            total=len(picked),
            desc=f"packing {split} images",
            unit=" images",
            delay=SECONDS_BEFORE_PROGRESS,
            disable=None,
        )
        with bar, image_warnings_as_intended():
            try:
                for one, (found, name) in self._each(
                    picked, lambda one, content, before: (self._decoded(one, content, look), _name(one, before))
                ):
                    bar.update()
                    if isinstance(found, str):
                        left_out.add(one.name, found)
                        continue
                    for kind, detail in found.losses.items():
                        losses.add(one.name, detail, kind)
                    file.append(found.pixels[None])
                    labels.append(one.label)
                    names.append(name)
                if not labels:
                    raise DataError(f"{self._name}: no image of the {split} split is readable ({left_out.first})")
                file.finish()
            finally:
                file.close()
        labels_path = directory / labels_file(split)  # type: ignore[arg-type]
        np.save(labels_path, np.array(labels, scheme.dtype))
        sync(labels_path)
        write_names(directory / names_file(split), names)  # type: ignore[arg-type]
        if left_out.count:
            if self._packing.unreadable_images == "error":
                raise DataError(
                    f"{self._name}: it has {unreadable_images(left_out.count)}: {left_out}; repair or remove what is "
                    "unreadable, or use --unreadable-images skip"
                )
            look.remarks.append(f"left out {unreadable_images(left_out.count)} of the {split} split: {left_out}")
        look.remarks += [f"{split} split: {line}" for line in lines_on_losses(losses)]

    def headers(self, picked: list[Picked]) -> Iterator[tuple[Picked, Header | str]]:
        """Facts of images by their headers, in order; the reason of those that are unreadable."""
        return self._each(picked, lambda one, content, _before: self._header(one, content))

    def decoded(self, picked: list[Picked], look: Look) -> Iterator[tuple[Picked, Decoded | str]]:
        """Images as they are packed, in order; the reason of those that are unreadable.

        Raises:
            DataError: one is of another size, type or colour.
        """
        return self._each(picked, lambda one, content, _before: self._decoded(one, content, look))

    def _header(self, one: Picked, content: bytes) -> Header | str:
        try:
            return read_header(content, Keeping(deep=True, pages="first"))
        except UnreadableImage as error:
            return str(error)

    def _decoded(self, one: Picked, content: bytes, look: Look) -> Decoded | str:
        try:
            wanted = look.shape[0] if look.shape[0] in (1, 3) else None
            found = decode_image(content, look.fitting, wanted, look.keeping)
        except UnreadableImage as error:
            return str(error)
        if str(found.pixels.dtype) != look.dtype:
            raise DataError(f"{one.name} is {found.pixels.dtype}, unlike others; reduce all: --dtype uint8")
        if found.pixels.shape != look.shape:
            width, height = found.size
            raise DataError(f"{one.name} is {width}x{height}, unlike others; say which size all get with --image-size")
        if look.shape[0] == 1 and not found.gray and self._packing.channels is None:
            raise DataError(f"{one.name} has colours, and the images looked at first are gray; say --channels 1 or 3")
        return found

    def _each(self, picked: list[Picked], work: Callable[[Picked, bytes, bytes], T]) -> Iterator[tuple[Picked, T]]:
        """Results of `work` on encoded images in order, of several threads; few wait in memory. It also takes the bytes
        of a tar file before the image."""

        def of_run(run: list[Picked]) -> list[tuple[Picked, T]]:
            before = BYTES_BEFORE if kind_of(self._name, run[0].place) == "tar" else 0
            first = max(0, run[0].offset - before)
            content = self._read(run[0].place, first, run[-1].offset + run[-1].size)
            found = []
            for one in run:
                start = one.offset - first
                image, ahead = content[start : start + one.size], content[max(0, start - before) : start]
                found.append((one, work(one, image, ahead)))
            return found

        waiting: collections.deque[Future[list[tuple[Picked, T]]]] = collections.deque()
        with self._fetcher.threads() as pool:
            for run in _runs(picked):
                waiting.append(pool.submit(of_run, run))
                if len(waiting) > _WAITING:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()


def _name(one: Picked, before: bytes) -> str:
    return image_name(one.place, one.offset, before, one.row)


def _runs(picked: list[Picked]) -> Iterator[list[Picked]]:
    """Neighbours in a shard, which one request reads."""
    run: list[Picked] = []
    for one in picked:
        if run and (
            one.place != run[0].place
            or one.offset - run[-1].offset - run[-1].size > _LARGEST_GAP
            or one.offset + one.size - run[0].offset > BLOCK_BYTES
        ):
            yield run
            run = []
        run.append(one)
    if run:
        yield run
