"""Survey of a source before it is packed: its record, and the lines that say it."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config.data import Form
from gen_dist.data.forms import own_shape
from gen_dist.data.sources.source import SPLITS, SplitName
from gen_dist.data.tally import Tally
from gen_dist.data.values import format_number
from gen_dist.errors import DataError

_SHOWN_CLASSES = 20
_SHOWN_KINDS = 12
_WIDTH = 10


@dataclass
class Survey:
    """Images of a source, and what packing would make of them."""

    source: str
    class_names: tuple[str, ...]
    remarks: list[str]
    """Lines on what is not used, or may not be meant."""
    cache: Path
    """Directory of packed images."""
    packed_in: Path | None = None
    """Packed images of this source with these options. None if there are none."""
    counts: dict[SplitName, NDArray[np.int64]] = field(default_factory=dict)
    """Images of each class, int64 [classes], after some are held out."""
    labels: list[str] = field(default_factory=list)
    """Lines on attributes or numbers; none for classes."""
    bytes_of_a_label: int = 8
    holds_out: bool = False
    """True if the test images are taken out of those to train on."""
    sizes: collections.Counter[tuple[int, int]] = field(default_factory=collections.Counter)
    """Number of images by (width, height)."""
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    """Number of images by format and mode."""
    changes: collections.Counter[str] = field(default_factory=collections.Counter)
    """Number of images by what becomes of them, as the end of a sentence."""
    left_out: Tally = field(default_factory=Tally)
    """Images that are unreadable by their headers; if every image was decoded, all unreadable ones."""
    damaged: Tally = field(default_factory=Tally)
    """Images with a readable header that could not be decoded, unless every image was decoded."""
    losses: list[str] = field(default_factory=list)
    """Lines on pages and channels that are dropped."""
    intensity_losses: list[str] = field(default_factory=list)
    """Lines on grey levels that are lost in the images that were decoded."""
    decoded: int = 0
    """Images that were decoded, of those that packing decodes or resizes."""
    to_decode: int = 0
    """Images with a readable header that packing decodes or resizes."""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of the packed images. None if packing is refused."""
    dtype: str = "uint8"
    """Type of their values."""
    form: Form = "images"
    """Kind of rows: images, signals or vectors."""
    values: tuple[float, float] | None = None
    """Least and greatest value of the images that were looked at. None for 8-bit images."""
    encoded_bytes: int = 0
    """Size of the images that would be packed as they are encoded. 0 if their values would be."""
    seconds: float = 0.0
    """Estimate of the time of packing, without that of the disk."""
    threads: int = 1
    sheet: list[NDArray[Any]] = field(default_factory=list)
    """Some images [C, H, W] as they would be packed; empty if packing is refused."""
    sheet_labels: list[int] = field(default_factory=list)
    """Class of each of them."""
    problem: DataError | None = None
    """Why packing is refused."""

    @property
    def images(self) -> int:
        """Images that would be packed."""
        return sum(int(counts.sum()) for counts in self.counts.values())

    @property
    def bytes(self) -> int:
        """Size of the packed images and labels."""
        if self.shape is None:
            return 0
        if self.encoded_bytes:
            return self.encoded_bytes + self.images * (8 + self.bytes_of_a_label)  # and an offset
        return self.images * (int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize + self.bytes_of_a_label)

    def lines(self) -> list[str]:
        """The survey as lines of text: what is there, then what packing would make of it."""
        state = f"packed already in {self.packed_in}" if self.packed_in else "not packed yet"
        lines = [f"{self.source}: {self.images:,} {self.form}, {state}"]
        lines += listed("splits", [self._splits()])
        lines += listed("classes", [self.classes_text()] if len(self.class_names) > 1 else [])
        lines += listed("labels", self.labels)
        lines += listed("sizes", [sizes_text(self.sizes)] if self.sizes and self.form == "images" else [])
        lines += listed("kinds", [counted(self.kinds)] if self.kinds else [])
        lines += listed(
            "left out", [f"{self.left_out.count:,} unreadable: {self.left_out}"] * bool(self.left_out.count)
        )
        lines += listed("note", self.remarks)
        if self.shape is None:
            return lines
        lines.append("packing makes of them")
        size = f"{'as encoded, ' if self.encoded_bytes else ''}{size_text(self.bytes)} in {self.cache}"
        lines += listed(self.form, [f"{self.dtype} {list(own_shape(self.form, self.shape))} each, {size}"])
        if self.values:
            low, high = map(format_number, self.values)
            lines += listed("values", [f"{low}..{high} in the {len(self.sheet):,} {self.form} of the contact sheet"])
        lines += listed("changes", [f"{count:,} {change}" for change, count in self.changes.most_common()])
        lines += listed("losses", [*self.losses, *(f"{line}{self._among()}" for line in self.intensity_losses)])
        if self.damaged.count:
            lines += listed("damage", [f"{self.damaged.count:,} unreadable{self._among()}: {self.damaged}"])
        return [*lines, *listed("time", [self._time()])]

    def _among(self) -> str:
        return "" if self.decoded == self.to_decode else f", among the {self.decoded:,} decoded here"

    def _splits(self) -> str:
        counts = " and ".join(f"{int(self.counts[split].sum()):,} {split}" for split in SPLITS)
        return counts + (", held out of one split" if self.holds_out else "")

    def classes_text(self) -> str:
        """Classes with their numbers of images."""
        of_all = np.sum([self.counts[split] for split in SPLITS], axis=0)
        named = [f"{name} ({count:,})" for name, count in zip(self.class_names, of_all.tolist(), strict=True)]
        more = len(named) - _SHOWN_CLASSES
        if more <= 0:
            return f"{len(named)}: {', '.join(named)}"
        least, most = int(of_all.min()), int(of_all.max())
        return (
            f"{len(named):,} with {least:,} to {most:,} images: {', '.join(named[:_SHOWN_CLASSES])} and {more:,} more"
        )

    def _time(self) -> str:
        about = f"about {self.seconds:.1f} s" if self.seconds < 100 else f"about {self.seconds / 60:.0f} min"
        how = (
            f"{self.decoded:,} of them decoded here by {self.threads} threads" if self.to_decode else "none is decoded"
        )
        return f"{about}, without the disk: an estimate, {how}"


def listed(heading: str, texts: Sequence[str]) -> list[str]:
    """Lines of one sort, the first with a heading."""
    return [f"  {heading if not place else '':{_WIDTH}}{text}" for place, text in enumerate(texts)]


def sizes_text(sizes: collections.Counter[tuple[int, int]]) -> str:
    """Sizes (width, height) of images in a few words."""
    (size, count), *others = sizes.most_common()
    common = f"{size[0]}x{size[1]}"
    if not others:
        return f"all {common}"
    least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
    text = f"{len(sizes):,}, from {least[0]}x{least[1]} to {most[0]}x{most[1]} (width x height)"
    return f"{text}; {count:,} are {common}" if count > 1 else f"{text}, no two alike"


def counted(kinds: collections.Counter[str], most: int = _SHOWN_KINDS) -> str:
    """Kinds of images with their numbers, the most frequent first."""
    named = [f"{count:,} {kind}" for kind, count in kinds.most_common()]
    return (
        ", ".join(named) if len(named) <= most else f"{', '.join(named[:most])} and {len(named) - most:,} other kinds"
    )


def size_text(count: int) -> str:
    """A number of bytes in few letters."""
    units = ("bytes", "KiB", "MiB", "GiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count / 1024**power:,.{1 if power else 0}f} {units[power]}"
