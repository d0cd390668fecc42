"""A look at a set of shards before it is indexed: at all of a small set, and at some shards of a large one.

Shards are read as for an index, and refused for the same reasons. Nothing stays on the disk.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.labels import LabelScheme
from gen_dist.data.cache import cache_directory
from gen_dist.data.headers import Header
from gen_dist.data.image_files import image_warnings_as_intended
from gen_dist.data.labelling import lines_on_labels, summary_of_labels
from gen_dist.data.losses import lines_on_losses
from gen_dist.data.naming import remarks_on_classes
from gen_dist.data.packing import THREADS
from gen_dist.data.refusals import held_out_count
from gen_dist.data.shards.building import MOST_HELD_OUT, SAMPLED
from gen_dist.data.shards.contents import LeftOut
from gen_dist.data.shards.fetching import Fetcher
from gen_dist.data.shards.indexing import ShardContents
from gen_dist.data.shards.labels import Labels, request_of
from gen_dist.data.shards.opening import ShardSet, index_directory, reader_of, shard_set
from gen_dist.data.shards.packed_parts import Look, PackedParts, Picked
from gen_dist.data.shards.places import kind_of
from gen_dist.data.sources.source import SPLITS, SplitName
from gen_dist.data.subsets import evenly_spaced
from gen_dist.data.survey import Survey, counted, listed, size_text, sizes_text
from gen_dist.data.surveying import SHEET_CLASSES, SHEET_COLUMNS, SHEET_ROWS_OF_ONE_CLASS
from gen_dist.data.tally import Tally
from gen_dist.errors import DataError, number_of

_MOST_SHARDS = 8
"""Shards that are read of a large set."""
_MOST_BYTES = 2**28
"""Bytes that are read; one shard is read in any case."""
_MOST_ASKED = 256
"""Shards whose sizes are asked for."""
_HEADERS = 256
_BYTES_AN_IMAGE = 40
"""Bytes of an index for an image, with those of what each shard holds."""


@dataclass
class ShardSurvey(Survey):
    """Images of a set of shards, and what training would make of them."""

    kind: str = ""
    shards: int = 0
    shards_read: int = 0
    shard_bytes: int = 0
    """Size of all shards; an estimate of very many."""
    images_read: int = 0
    """Images of the shards that were read."""
    headers: int = 0
    """Images that were looked at one by one."""
    totals: dict[SplitName, int] = field(default_factory=dict)
    """Images of each split: estimates unless all shards were read."""
    cache_gib: float = 0.0

    @property
    def is_whole(self) -> bool:
        """True if all shards were read."""
        return self.shards_read == self.shards

    @property
    def images(self) -> int:
        """Images of both splits."""
        return sum(self.totals.values())

    @property
    def bytes(self) -> int:
        """Size of an index with the images that are packed in it."""
        packed = (self.totals["test"] + SAMPLED) * math.prod(self.shape or ()) * np.dtype(self.dtype).itemsize
        return _BYTES_AN_IMAGE * self.images + packed

    def lines(self) -> list[str]:
        """The survey as lines of text: what is there, then what training would make of it."""
        about = "" if self.is_whole else "about "
        state = f"indexed already in {self.packed_in}" if self.packed_in else "not indexed yet"
        size = size_text(self.shard_bytes)
        images, shards = number_of(self.images, "image"), number_of(self.shards, f"{self.kind} shard")
        lines = [f"{self.source}: {about}{images} in {shards}, {size}, {state}"]
        if not self.is_whole:
            read = f"{number_of(self.shards_read, 'shard')} with {number_of(self.images_read, 'image')}; "
            read += "the others are taken to be like them"
            lines += listed("read", [read])
        held_out = ", held out by key" if self.holds_out else ""
        lines += listed("splits", [f"{about}{self.totals['train']:,} train and {self.totals['test']:,} test{held_out}"])
        lines += listed("classes", [self.classes_text()] if len(self.class_names) > 1 else [])
        lines += listed("labels", self.labels)
        lines += listed("sizes", [sizes_text(self.sizes) + self._among()] if self.sizes else [])
        lines += listed("kinds", [counted(self.kinds) + self._among()] if self.kinds else [])
        lines += listed("note", self.remarks)
        if self.shape is None:
            return lines
        index = f"{about}{size_text(self.bytes)} of index and packed test images in {self.cache}"
        parts = f"parts of remote ones within --cache-gib {self.cache_gib:g}"
        lines.append("training makes of them")
        lines += listed("images", [f"{self.dtype} {list(self.shape)} each, decoded as they are needed"])
        lines += listed("disk", [f"{index}, {parts}"])
        lines += listed(
            "changes", [f"{count:,} {change}{self._among()}" for change, count in self.changes.most_common()]
        )
        lines += listed("losses", [f"{line}{self._among()}" for line in self.losses])
        if self.damaged.count:
            lines += listed("damage", [f"{self.damaged.count:,} unreadable{self._among()}: {self.damaged}"])
        took = f"{self.seconds:.1f} s" if self.seconds < 100 else f"{self.seconds / 60:.0f} min"
        return [*lines, *listed("time", [f"about {took} to read all shards once for the index: an estimate"])]

    def _among(self) -> str:
        return "" if self.headers >= self.images else f", among the {self.headers:,} looked at here"


class _Chosen(NamedTuple):
    """Shards of a split that are read for all of them."""

    places: list[str]
    all: int
    """Shards of the split."""
    bytes: int
    """Size of these."""
    all_bytes: int
    """Size of all, an estimate of very many."""


def survey_shards(pattern: str, packing: DataConfig, announce: Callable[[str], None]) -> ShardSurvey:
    """Look at shards as training would index them.

    Args:
        pattern: as for `open_shards`.
        packing: size and channels of the images, labels and test split.
        announce: takes lines about servers that fail.

    Returns:
        The survey. If the images would be refused, it has the reason.

    Raises:
        DataError: there are no such shards, or one cannot be read or is damaged; one line.
    """
    shards, fetcher = shard_set(pattern, packing, announce)
    index = index_directory(shards, packing)
    found = ShardSurvey(shards.name, ("all",), [], cache_directory(packing), threads=THREADS)
    found.packed_in = index if (index / "meta.json").exists() else None
    found.kind, found.cache_gib = kind_of(shards.name, shards.places[0]), packing.cache_gib
    found.holds_out = not shards.test_places
    with fetcher.threads() as pool:
        chosen = {
            split: _choose(places, fetcher, pool)
            for split, places in zip(SPLITS, (shards.places, shards.test_places), strict=True)
        }
    found.shards = sum(one.all for one in chosen.values())
    found.shards_read = sum(len(one.places) for one in chosen.values())
    found.shard_bytes = sum(one.all_bytes for one in chosen.values())
    with tempfile.TemporaryDirectory(prefix="gen_dist-") as temporary, image_warnings_as_intended():
        contents = ShardContents(shards.name, Path(temporary), fetcher, request_of(packing))
        started = time.perf_counter()
        contents.make([place for one in chosen.values() for place in one.places])
        seconds = time.perf_counter() - started
        _Surveyor(found, shards, packing, fetcher, contents).survey(chosen)
    found.seconds = seconds / max(1, sum(one.bytes for one in chosen.values())) * found.shard_bytes
    return found


def _choose(places: list[str], fetcher: Fetcher, pool: ThreadPoolExecutor) -> _Chosen:
    """Shards that stand for all: a small set whole, else some spread over it."""
    asked = [places[place] for place in evenly_spaced(min(len(places), _MOST_ASKED), len(places))]
    sizes = dict(zip(asked, (facts.size for facts in pool.map(fetcher.facts, asked)), strict=True))
    of_all = round(sum(sizes.values()) / max(1, len(asked)) * len(places))
    if len(asked) == len(places) and of_all <= _MOST_BYTES:
        return _Chosen(places, len(places), of_all, of_all)
    chosen: list[str] = []
    for place in evenly_spaced(min(len(asked), _MOST_SHARDS), len(asked)).tolist():
        if not chosen or sum(sizes[one] for one in [*chosen, asked[place]]) <= _MOST_BYTES:
            chosen.append(asked[place])
    return _Chosen(chosen, len(places), sum(sizes[one] for one in chosen), of_all)


class _Surveyor:
    """Filler of a survey, from the contents of the shards that stand for all."""

    def __init__(
        self, found: ShardSurvey, shards: ShardSet, packing: DataConfig, fetcher: Fetcher, contents: ShardContents
    ) -> None:
        self._found = found
        self._packing = packing
        self._contents = contents
        self._parts = PackedParts(shards.name, packing, fetcher, reader_of(shards.name, fetcher, contents))
        self._places: list[str] = []
        """Shards that were read, those of the training split first."""
        self._starts = [0]
        """Images before each of them, and all."""

    def survey(self, chosen: dict[SplitName, _Chosen]) -> None:
        """Count images and labels, and look at some images."""
        found, left_out = self._found, LeftOut()
        for split, one in chosen.items():
            count = 0
            for place in one.places:
                contents = self._contents(place)
                self._places.append(place)
                self._starts.append(self._starts[-1] + len(contents.sizes))
                count += len(contents.sizes)
                left_out.add(place, contents.left_out)
            found.totals[split] = round(count / max(1, len(one.places)) * one.all)
        found.images_read = self._starts[-1]
        found.remarks += left_out.lines("left out")
        if found.totals["train"] < 2 or (not found.holds_out and not found.totals["test"]):
            found.problem = DataError(f"{found.source}: its shards have fewer than two images with a name as 0001.jpg")
            return
        if found.holds_out:
            all_of = found.totals["train"]
            found.totals["test"] = min(MOST_HELD_OUT, held_out_count(all_of, self._packing))
            found.totals["train"] = all_of - found.totals["test"]
        try:
            self._take_images(self._take_labels())
        except DataError as error:
            found.problem = error

    def _take_labels(self) -> NDArray[np.int64]:
        """Find out what the labels mean; returns the class of each image, all 0 for other labels."""
        found = self._found
        labels = Labels(found.source, request_of(self._packing), others=found.images - found.images_read)
        for place in self._places:
            labels.add(place, self._contents(place))
        scheme: LabelScheme = labels.scheme()
        of_images = np.concatenate([labels.of(self._contents(place)) for place in self._places])
        found.class_names = scheme.class_names
        found.remarks += [*remarks_on_classes(scheme.class_names), *lines_on_labels(scheme, of_images, of_images[:0])]
        found.labels = summary_of_labels(scheme, of_images)
        classes = of_images if scheme.kind == "classes" else np.zeros(len(of_images), np.int64)
        of_each = np.bincount(classes, minlength=len(scheme.class_names))
        found.counts = {"train": of_each, "test": np.zeros_like(of_each)}
        return classes

    def _take_images(self, classes: NDArray[np.int64]) -> None:
        """Look at the headers of some images, and decode those of the contact sheet."""
        found, count = self._found, self._found.images_read
        some = self._picked(evenly_spaced(min(_HEADERS, count), count).tolist())
        told: set[Picked] = set()
        for one, header in self._parts.headers(some):
            self._take_header(one, header)
            if isinstance(header, str):
                told.add(one)
        found.headers = len(some)
        look = self._parts.look(some)
        places = _on_sheet(classes, len(found.class_names))
        losses = Tally()
        for place, (one, decoded) in zip(places, self._parts.decoded(self._picked(places), look), strict=True):
            if isinstance(decoded, str):
                if one not in told:
                    found.damaged.add(one.name, decoded)
                continue
            found.sheet.append(decoded.pixels)
            found.sheet_labels.append(int(classes[place]))
            for kind, detail in decoded.losses.items():
                losses.add(one.name, detail, kind)
        if found.damaged.count and self._packing.unreadable_images == "error":
            way_out = "repair or remove it, or use --unreadable-images skip"
            raise DataError(f"{found.source}: unreadable: {found.damaged}; {way_out}")
        if not found.sheet:
            raise DataError(f"{found.source}: no image that was decoded here is readable ({found.damaged.first})")
        self._take_look(look, losses)

    def _picked(self, rows: list[int]) -> list[Picked]:
        """Some images of the shards that were read, in their order."""
        found = []
        for number, place in enumerate(self._places):
            first, end = self._starts[number : number + 2]
            if of_shard := [row - first for row in rows if first <= row < end]:
                contents = self._contents(place)
                found += [Picked(place, int(contents.offsets[row]), int(contents.sizes[row]), 0) for row in of_shard]
        return found

    def _take_header(self, one: Picked, header: Header | str) -> None:
        if isinstance(header, str):
            self._found.damaged.add(one.name, header)
            return
        self._found.sizes[header.width, header.height] += 1
        self._found.kinds[header.kind] += 1

    def _take_look(self, look: Look, losses: Tally) -> None:
        found = self._found
        found.shape, found.dtype = look.shape, look.dtype
        if look.fitting:
            for size, count in found.sizes.items():
                for change in look.fitting.changes(size):
                    found.changes[change] += count
        found.losses = lines_on_losses(losses)
        if found.dtype != "uint8" and found.sheet:
            found.values = float(np.min(found.sheet)), float(np.max(found.sheet))


def _on_sheet(classes: NDArray[np.int64], count: int) -> list[int]:
    """Places of the images of a contact sheet: a row for each of some classes, or several rows of one."""
    if count == 1:
        return evenly_spaced(min(len(classes), SHEET_COLUMNS * SHEET_ROWS_OF_ONE_CLASS), len(classes)).tolist()
    found: list[int] = []
    with_images = np.unique(classes)
    for label in with_images[evenly_spaced(min(SHEET_CLASSES, len(with_images)), len(with_images))].tolist():
        of_class = np.flatnonzero(classes == label)
        found += of_class[evenly_spaced(min(SHEET_COLUMNS, len(of_class)), len(of_class))].tolist()
    return sorted(found)
