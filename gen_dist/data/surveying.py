"""A look at a source before it is packed: at the headers of all images, and at the pixels of some.

The rules are those of packing: its walk, decoding, refusals and words. Nothing is written.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gen_dist.config import DataConfig
from gen_dist.config.labels import UNKNOWN
from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.fitting import Fitting
from gen_dist.data.forms import lines_on_form
from gen_dist.data.gpu_jpeg import refuse_header
from gen_dist.data.headers import Header, read_header
from gen_dist.data.image_files import Encoded, ImageFile, image_warnings_as_intended
from gen_dist.data.labelling import MISSING, completed, lines_on_labels, summary_of_labels
from gen_dist.data.losses import INTENSITY_KINDS, lines_on_losses
from gen_dist.data.naming import remarks_on_classes
from gen_dist.data.packing import (
    IMAGES_PER_TASK,
    SECONDS_BEFORE_PROGRESS,
    THREADS,
    Result,
    cannot_read,
    decode_some,
    source_fitting,
    source_keeping,
)
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
from gen_dist.data.sources.source import SPLITS, Block, Source, SplitName, form_of_source
from gen_dist.data.subsets import evenly_spaced, held_out_order
from gen_dist.data.survey import Survey
from gen_dist.data.tally import Tally
from gen_dist.errors import DataError
from gen_dist.files import reason_of

SHEET_COLUMNS = 8
SHEET_CLASSES = 20
SHEET_ROWS_OF_ONE_CLASS = 8
_MOST_DECODED = 4096
_MOST_BYTES_HELD = 2**26
_SECONDS_OF_DECODING = 3.0
_TIMES_HASHED = 2  # when a file of the cache is complete, and when it is opened
_BYTES_HASHED_HERE = 2**22


def survey(source: Source, packing: DataConfig, cache: Path, packed_in: Path | None) -> Survey:
    """Look at the images of a source as packing would take them.

    Args:
        source: the images.
        packing: how they would be packed.
        cache: directory of packed images.
        packed_in: packed images of this source, if there are any.

    Returns:
        The survey. If packing would be refused for its images, it has the reason.

    Raises:
        DataError: the source or a file cannot be read just now, or a label has no class.
    """
    refuse_image_options(source, packing)
    with image_warnings_as_intended():
        surveyor = _Surveyor(source, packing, cache, packed_in)
        surveyor.read_headers()
        with ThreadPoolExecutor(THREADS) as pool:
            surveyor.decode(pool)
    return surveyor.finish()


class _Candidate(NamedTuple):
    """An image that may be decoded."""

    place: int
    """Place among the images with a readable header."""
    fits: bool
    """True if it is packed as it is."""
    block: Block
    """The block of this image alone."""


class _Sample:
    """A random choice of images out of a sequence of unknown length: at most `most`, and of limited size.

    Each image draws a number, and those with the least are kept. Strides would take one class, or one camera, where
    images take turns.
    """

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._draws = random.Random(0)
        self._heap: list[tuple[float, _Candidate]] = []
        """Kept images, the greatest number (negated) first."""

    def drawn(self) -> float | None:
        """Number of the next image of the sequence; None if it is not chosen."""
        number = self._draws.random()
        return number if len(self._heap) < self._most or number < -self._heap[0][0] else None

    def add(self, number: float, one: _Candidate) -> None:
        heapq.heappush(self._heap, (-number, one))
        self._bytes += _bytes_held(one)
        while len(self._heap) > self._most or (self._bytes > _MOST_BYTES_HELD and len(self._heap) > 1):
            self._bytes -= _bytes_held(heapq.heappop(self._heap)[1])
            self._most = min(self._most, len(self._heap))

    def in_random_order(self) -> list[_Candidate]:
        return [one for _, one in sorted(self._heap, key=lambda entry: -entry[0])]

    def in_order(self) -> list[_Candidate]:
        return sorted((one for _, one in self._heap), key=lambda one: one.place)


class _Surveyor:
    def __init__(self, source: Source, packing: DataConfig, cache: Path, packed_in: Path | None) -> None:
        names = class_names_of(source)
        remarks = [*source.remarks(), *remarks_on_classes(names)]
        self._scheme = scheme_of_source(source, names)
        of_label = np.dtype(self._scheme.dtype).itemsize * math.prod(self._scheme.shape)
        names = (*names, UNKNOWN) if packing.missing_labels == UNKNOWN and self._scheme.kind == "classes" else names
        self._found = Survey(source.name, names, remarks, cache, packed_in, threads=THREADS, bytes_of_a_label=of_label)
        self._found.form = form_of_source(source)
        self._found.holds_out = not source.has_test_split
        self._source = source
        self._packing = packing
        self._shape = OneShape(source, packing)
        self._fitting = source_fitting(source, packing)
        self._keeping = source_keeping(source, packing)
        self._grays = 0
        self._labels: dict[SplitName, list[NDArray[Any]]] = {split: [] for split in SPLITS}
        self._places: dict[SplitName, list[int]] = {split: [] for split in SPLITS}
        self._images = 0
        self._losses, self._intensity_losses = Tally(), Tally()
        self._damaged: dict[int, tuple[str, str]] = {}
        self._sample = _Sample(_MOST_DECODED)
        shown = evenly_spaced(min(SHEET_CLASSES, len(names)), len(names)).tolist()
        row_length = SHEET_COLUMNS * (1 if len(shown) > 1 else SHEET_ROWS_OF_ONE_CLASS)
        self._sheet = {label: _Sample(row_length) for label in shown}
        self._source_seconds = self._decoding_seconds = 0.0

    def read_headers(self) -> None:
        total = self._source.image_count()
        bar = tqdm(
            total=total,
            desc=f"reading headers of {self._source.name}",
            unit=" images",
            delay=SECONDS_BEFORE_PROGRESS,
            disable=True if total is None else None,
        )
        with bar:
            for block in self._timed(blocks_of(self._source)):
                check_labels(self._source, block, self._scheme, self._packing)
                check_storage(self._source, self._packing, block)
                fits = isinstance(block.images, np.ndarray) and not needs_fitting(
                    self._source, self._packing, block, block.images
                )
                for position in range(len(block.labels)):
                    header = self._header(block, position)
                    if header is not None:
                        self._add(block, position, header, fits)
                    bar.update()

    def decode(self, pool: ThreadPoolExecutor) -> None:
        """Decode the images of the contact sheet, then others at random, for some seconds."""
        if self._found.problem is not None:
            return
        sheet = [one for row in self._sheet.values() for one in row.in_order()]
        queue = list({one.place: one for one in (*sheet, *self._sample.in_random_order())}.values())
        started, done = time.perf_counter(), 0
        while done < len(queue) and (done < len(sheet) or self._decoding_seconds < _SECONDS_OF_DECODING):
            # Some images for each thread at a time: they are kept busy, and come to an end soon after the time is over.
            batch = queue[done : done + THREADS * IMAGES_PER_TASK]
            for place, results in enumerate(pool.map(self._decode, batch), start=done):
                self._take(queue[place], results[0], shown=place < len(sheet))
            done += len(batch)
            self._decoding_seconds = time.perf_counter() - started

    def finish(self) -> Survey:
        """Say what the packed images would be, or why they would be refused."""
        found = self._found
        every_one_decoded = found.decoded == found.to_decode
        for name, reason in self._damaged.values():
            self._leave_out(found.left_out if every_one_decoded else found.damaged, name, reason)
        gone = self._damaged if every_one_decoded else {}
        labels = {
            split: np.array(
                [label for label, place in zip(self._labels[split], places, strict=True) if place not in gone],
                self._scheme.dtype,
            ).reshape(-1, *self._scheme.shape)
            for split, places in self._places.items()
        }
        counts = {split: len(of_split) for split, of_split in labels.items()}
        self._note(lambda: check_counts(self._source, counts, found.left_out))
        self._count_classes(labels)
        found.losses, found.intensity_losses = map(lines_on_losses, (self._losses, self._intensity_losses))
        if found.problem is not None:
            found.sheet.clear()
        elif self._shape.shape is not None:
            stored, height, width = self._shape.shape
            all_gray = self._packing.channels is None and self._grays == self._images
            found.shape = (1 if all_gray else stored, height, width)
            if self._grays and found.shape[0] == 3 and found.form == "images":
                found.changes["are gray and get three equal channels"] = self._grays
            found.sheet = [pixels[: found.shape[0]] for pixels in found.sheet]
            if found.dtype != "uint8" and found.sheet:
                found.values = float(np.min(found.sheet)), float(np.max(found.sheet))
            found.remarks += lines_on_form(self._source, self._packing, self._shape.shape)
            found.seconds = self._estimate()
        return found

    def _timed(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Blocks of the source. Reading them takes packing as long as it takes here."""
        started = time.perf_counter()
        for block in blocks:
            self._source_seconds += time.perf_counter() - started
            yield block
            started = time.perf_counter()

    def _header(self, block: Block, position: int) -> Header | None:
        name = block.name(position)
        try:
            return read_header(block.images[position], self._keeping)
        except UnreadableImage as error:
            self._leave_out(self._found.left_out, name, str(error))
            return None
        except OSError as error:
            raise cannot_read(self._source, name, reason_of(error)) from None
        except MemoryError:
            raise cannot_read(self._source, name, "out of memory") from None

    def _add(self, block: Block, position: int, header: Header, fits: bool) -> None:
        found, name, label = self._found, block.name(position), self._class_of(block, position)
        self._labels[block.split].append(block.labels[position])
        self._places[block.split].append(self._images)
        drawn = [(sample, sample.drawn()) for sample in self._samples(label, fits)]
        if any(number is not None for _, number in drawn):
            one = _Candidate(self._images, fits, _block_of_one(block, position))
            for sample, number in drawn:
                if number is not None:
                    sample.add(number, one)
        self._images += 1
        found.sizes[header.width, header.height] += 1
        found.kinds[header.kind if found.form == "images" else f"{header.dtype} array"] += 1
        found.to_decode += not fits
        if self._packing.packed_as == "encoded":
            encoded = block.images[position]
            found.encoded_bytes += encoded.size if isinstance(encoded, ImageFile) else len(encoded)
        self._grays += header.gray
        fitting, channels = (None, None) if fits else (self._fitting, self._packing.channels)
        # Decoded images that are gray stay so if all are.
        stored = header.channels if fits or header.channels not in (1, 3) else channels or 3
        width, height = fitting[:2] if fitting else (header.width, header.height)
        self._note(lambda: self._shape.check((stored, height, width), name))
        self._note(lambda: self._shape.check_dtype(header.dtype, name))
        if self._packing.decoded_on != "cpu":
            self._note(lambda: refuse_header(name, header, fitting, self._packing.channels))
        found.dtype = header.dtype
        found.changes.update(_changes(header, fitting, channels))
        for kind, detail in header.losses.items():
            self._losses.add(name, detail, kind)

    def _class_of(self, block: Block, position: int) -> int:
        """Class of an image, the last if its label is missing; 0 for labels of other kinds."""
        if self._scheme.kind != "classes":
            return 0
        label = int(block.labels[position])
        return label if label != MISSING else len(self._found.class_names) - 1

    def _samples(self, label: int, fits: bool) -> list[_Sample]:
        """Samples that an image may belong to. One that is packed as it is needs no decoding to be known."""
        shown = [self._sheet[label]] if label in self._sheet else []
        return shown if fits else [*shown, self._sample]

    def _decode(self, one: _Candidate) -> list[Result]:
        return decode_some(self._source, self._packing, one.block, 0)

    def _take(self, one: _Candidate, result: Result, *, shown: bool) -> None:
        self._found.decoded += not one.fits
        name = one.block.name(0)
        if isinstance(result, str):
            self._damaged[one.place] = name, result
            return
        if shown:
            self._found.sheet.append(result.pixels)
            self._found.sheet_labels.append(self._class_of(one.block, 0))
        for kind in result.losses.keys() & INTENSITY_KINDS:
            self._intensity_losses.add(name, result.losses[kind], kind)

    def _leave_out(self, tally: Tally, name: str, reason: str) -> None:
        tally.add(name, reason)
        self._note(lambda: leave_out(self._source, self._packing, Tally(), name, reason))

    def _note(self, check: Callable[[], None]) -> None:
        """Keep the first reason to refuse the source: what else there is to know is still found out."""
        if self._found.problem is None:
            try:
                check()
            except DataError as error:
                self._found.problem = error

    def _count_classes(self, labels: dict[SplitName, NDArray[Any]]) -> None:
        train, test = labels["train"], labels["test"]
        if self._found.holds_out and len(train) > 1:
            order = held_out_order(len(train))
            held_out = held_out_count(len(train), self._packing)
            train, test = train[order[held_out:]], train[order[:held_out]]
        if not len(train):
            self._found.counts = {split: np.zeros(len(self._found.class_names), np.int64) for split in SPLITS}
            return
        found = self._found
        scheme, train, test = completed(self._source.name, self._scheme, train, test)
        found.class_names = scheme.class_names
        found.remarks += lines_on_labels(scheme, train, test)
        found.labels = summary_of_labels(scheme, np.concatenate([train, test]))
        classes = len(scheme.class_names)
        of_each = [labels if scheme.kind == "classes" else np.zeros(len(labels), np.int64) for labels in (train, test)]
        found.counts = {split: np.bincount(of, minlength=classes) for split, of in zip(SPLITS, of_each, strict=True)}

    def _estimate(self) -> float:
        """Seconds that packing takes on this machine, without those of its disk."""
        found = self._found
        decoding = self._decoding_seconds / max(found.decoded, 1) * found.to_decode
        started = time.perf_counter()
        hashlib.sha256(bytes(_BYTES_HASHED_HERE))
        hashing = (time.perf_counter() - started) / _BYTES_HASHED_HERE * found.bytes * _TIMES_HASHED
        return self._source_seconds + decoding + hashing


def _changes(header: Header, fitting: Fitting | None, channels: int | None) -> list[str]:
    """Changes that packing makes to an image, as the ends of sentences about several."""
    changes = [header.converted] if header.converted else []
    if header.turned:
        changes.append("are turned upright")
    changes += fitting.changes((header.width, header.height)) if fitting else []
    if channels == 1 and not header.gray:
        changes.append("lose their colours")
    return changes


def _block_of_one(block: Block, position: int) -> Block:
    image: Encoded = block.images[position]
    held = image.copy() if isinstance(image, np.ndarray) else image  # a view would hold all images of its block
    return Block(block.split, [held], block.labels[position : position + 1], [block.name(position)])


def _bytes_held(one: _Candidate) -> int:
    image = one.block.images[0]
    return len(image) if isinstance(image, bytes) else image.nbytes if isinstance(image, np.ndarray) else 0
