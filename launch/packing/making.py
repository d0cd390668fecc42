"""One shard, made of its part of a source: every byte is a function of the source and the options."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen_dist.config.addresses import shown
from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.decoding import Decoded, decode_image
from gen_dist.data.deep_files import Keeping
from gen_dist.data.fitting import Fitting, fitting_of
from gen_dist.data.image_files import Encoded, ImageFile, image_warnings_as_intended
from gen_dist.data.naming import printable
from gen_dist.data.parquet_reading import image_rows
from gen_dist.data.shards.contents import BLOCK_BYTES, ENDS, MISSING, Contents
from gen_dist.data.shards.fetching import Facts, Fetcher
from gen_dist.data.shards.labels import LabelRequest, is_missing, request_of
from gen_dist.data.shards.places import kind_of
from gen_dist.data.shards.tar_contents import tar_contents
from gen_dist.data.shards.writing import CLASS_KEY, Sample, parquet_shard, tar_shard
from gen_dist.errors import DataError
from gen_dist.files import reason_of
from gen_dist.launch.packing.options import ShardOptions
from gen_dist.launch.packing.plan import LabelNames, ShardTask

_NAMES_KEPT = 3
DAMAGED, SMALL = "unreadable", "too small"


@dataclass
class Report:
    """Facts about a shard that was made."""

    name: str
    images: int = 0
    bytes: int = 0
    sha256: str = ""
    left_out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    """Number of images that were left out, and the first names, by the reason; and the source's shard under the kind of
    its end, where images may be missing by it."""
    changes: dict[str, int] = field(default_factory=dict)
    """Number of images by what their resizing does to them; see `Fitting.changes`."""
    losses: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Number of images by what they lose, with the values of the first; see `gen_dist.data.losses`."""
    labels: list[str] = field(default_factory=list)
    """Names of the labels."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Number of images by the type of their values, and their channels if those are neither one nor three."""

    def add(self, found: Decoded, fitting: Fitting | None) -> None:
        """Count what is done to an image."""
        self.images += 1
        channels = len(found.pixels)
        kind = f"{found.pixels.dtype}" + ("" if channels in (1, 3) else f" of {channels} channels")
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        for change in fitting.changes(found.size) if fitting else ():
            self.changes[change] = self.changes.get(change, 0) + 1
        for kind, detail in found.losses.items():
            count, first = self.losses.get(kind, (0, detail))
            self.losses[kind] = count + 1, first

    def leave_out(self, why: str, name: str) -> None:
        """Count an image."""
        count, names = self.left_out.get(why, (0, []))
        self.left_out[why] = count + 1, [*names, name][:_NAMES_KEPT]


def make_shard(
    source: str, task: ShardTask, labels: LabelNames, options: ShardOptions, fetcher: Fetcher
) -> tuple[bytes, Report]:
    """Make a shard.

    Args:
        source: name of the source in error messages.
        task: its part of the source.
        labels: names of the labels.
        options: what is done to the images.
        fetcher: reader of shards.

    Returns:
        Bytes of the shard, and facts about it.

    Raises:
        DataError: the source cannot be read, has changed, or has an image that is refused; one line.
    """
    report = Report(task.file_name(options.container))
    packing = options.packing()
    fitting = fitting_of(packing, None)
    # Of images in shards training takes the first page.
    keeping = Keeping(deep=True, pages="first" if task.kind == "shard" else packing.pages)
    if packing.dtype == "uint8":
        keeping = keeping._replace(deep=False)
    samples: list[Sample] = []
    with image_warnings_as_intended():
        inputs = _inputs(source, task, labels, request_of(packing), fetcher, report)
        for number, (encoded, values, name) in enumerate(inputs, start=task.first):
            try:
                decoded = decode_image(encoded, fitting, options.channels, keeping)
            except UnreadableImage as error:
                if options.unreadable_images == "error":
                    way_out = "repair or remove it, or use --unreadable-images skip"
                    raise DataError(f"{source}: {name} is unreadable ({error}); {way_out}") from None
                report.leave_out(DAMAGED, name)
                continue
            except OSError as error:
                reason = reason_of(error)
                raise DataError(f"{source}: cannot read {name}: {reason}; repair that and try again") from None
            if min(decoded.size) < options.least_side:
                report.leave_out(SMALL, name)
                continue
            report.add(decoded, fitting)
            image, ending = _encoded(decoded, options)
            samples.append(Sample(_key(task, number), image, ending, values, name))
    found = dict.fromkeys(name for sample in samples for name in sample.labels)
    # Shards say themselves what their labels are called.
    names = labels.names if found.keys() <= set(labels.names) else tuple(sorted(found))
    is_tar = options.container == "tar"
    content = tar_shard(samples) if is_tar else parquet_shard(samples, names, labels.classes)
    report.labels = list(names)
    report.bytes, report.sha256 = len(content), hashlib.sha256(content).hexdigest()
    return content, report


def index_of(report: Report, content: bytes) -> bytes:
    """Contents of a shard, by which its readers need not look for its images: see `Contents.to_bytes`."""
    columns = () if report.labels in ([], [CLASS_KEY]) else tuple(report.labels)
    if kind_of("", report.name) == "tar":
        blocks = (content[first : first + BLOCK_BYTES] for first in range(0, len(content), BLOCK_BYTES))
        contents = tar_contents("", report.name, blocks, columns)
    else:
        from gen_dist.data.shards.parquet_contents import parquet_contents

        at_hand: Any = _AtHand(content)
        request = LabelRequest(columns, may_miss=True)
        contents = parquet_contents("", report.name, Facts(len(content), ""), at_hand, request)
    contents.facts = Facts(len(content), "")
    return contents.to_bytes()


class _AtHand:
    """Reader of bytes in memory, as a Fetcher reads a file."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, _place: str, first: int, last: int) -> bytes:
        return self._content[first:last]


def _key(task: ShardTask, number: int) -> str:
    """Name of an image, which no other of the set has."""
    return f"{task.number:05}-{number:06}" if task.kind == "shard" else f"{number:010}"


Input = tuple[Encoded, Mapping[str, Any], str]
"""An encoded image, its labels by name, and its name."""


def _inputs(
    source: str, task: ShardTask, labels: LabelNames, request: LabelRequest, fetcher: Fetcher, report: Report
) -> Iterator[Input]:
    if task.kind == "shard":
        yield from _images_of_shard(source, Facts(*task.inputs[1:]), task.inputs[0], request, fetcher, report)
        return
    images: Iterator[Encoded]
    if task.kind == "files":
        images = (ImageFile(*one) for one in task.inputs)
    else:
        images = (
            image
            for path, column, first, count in task.inputs
            for block in image_rows(source, Path(path), column, first, count)
            for image in block
        )
    for image, values, name in zip(images, task.labels, task.names, strict=True):
        yield image, dict(zip(labels.names, values, strict=True)), name


def _images_of_shard(
    source: str, facts: Facts, place: str, request: LabelRequest, fetcher: Fetcher, report: Report
) -> Iterator[Input]:
    if fetcher.facts(place) != facts:
        raise DataError(f"{source}: {printable(shown(place))} has changed since the packing began; give an empty --out")
    names: list[str] = []
    if kind_of(source, place) == "tar":
        starts = range(0, facts.size, BLOCK_BYTES)
        whole = b"".join(fetcher.read(place, first, min(first + BLOCK_BYTES, facts.size)) for first in starts)
        blocks = (whole[first : first + BLOCK_BYTES] for first in starts)
        contents = tar_contents(source, place.rpartition("/")[2], blocks, request.columns, names)
        for end in (end for end in ENDS if end in contents.left_out):
            report.leave_out(end, place)
    else:
        from gen_dist.data.shards.parquet_contents import parquet_contents, row_group

        contents = parquet_contents(source, place, facts, fetcher, request)
        groups = range(len(contents.block_starts))
        whole = b"".join(row_group(source, place, facts, fetcher, group) for group in groups)
        names = [f"{printable(place.rpartition('/')[2])} row {row}" for row in range(len(contents.sizes))]
    columns = contents.offsets.tolist(), contents.sizes.tolist(), _labels_of(contents), names
    for offset, size, values, name in zip(*columns, strict=True):
        yield whole[offset : offset + size], values, name


def _labels_of(contents: Contents) -> list[dict[str, Any]]:
    """Labels of the images of a shard by name; those that are missing are left out."""
    if contents.table is None:
        return [{} if label == MISSING else {CLASS_KEY: label} for label in contents.labels.tolist()]
    missing = is_missing(contents.table).tolist()
    return [
        {name: value for name, value, gone in zip(contents.columns, row, gone_of_row, strict=True) if not gone}
        for row, gone_of_row in zip(contents.table.tolist(), missing, strict=True)
    ]


def _encoded(found: Decoded, options: ShardOptions) -> tuple[bytes, str]:
    """An image in the format of the options, and the ending of its name. Values that no format keeps are an array."""
    stream, pixels = io.BytesIO(), found.pixels
    if pixels.dtype != np.uint8 or len(pixels) not in (1, 3):
        np.save(stream, pixels[:1] if found.gray and options.channels != 3 else pixels, allow_pickle=False)
        return stream.getvalue(), "npy"
    gray = options.channels != 3 and (found.gray or len(pixels) == 1)
    image = Image.fromarray(pixels[0] if gray else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.save(stream, options.image_format, **_settings(options))
    return stream.getvalue(), "jpg" if options.image_format == "jpeg" else options.image_format


def _settings(options: ShardOptions) -> dict[str, Any]:
    if options.image_format == "png":
        return {}
    if options.image_format == "jpeg":
        return {"quality": options.quality}
    return {"lossless": True} if options.quality == 100 else {"quality": options.quality, "method": 4}
