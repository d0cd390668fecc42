"""Images that samples are compared with: the test split, the training split, or those of any source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.config import DataConfig
from gen_dist.config.addresses import shown
from gen_dist.data import Dataset, Split, open_dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import ConfigError

MOST_IMAGES = 50_000
"""Images of a reference, spread evenly over it if it has more: their features are in memory."""

_FEW: dict[int, Literal[1, 3]] = {1: 1, 3: 3}
"""Channels that images of files can be brought to."""


@dataclasses.dataclass(frozen=True)
class ReferenceImages:
    """Images that samples are compared with, other than the test split."""

    name: str
    """As names of figures have it: `train`, or `ref-` with the start of the digest."""
    digest: str
    """Digest of the data set."""
    which: str
    """Part of the data set, with the number of its images."""
    count: int
    images: Callable[[int, int], Tensor]
    """Range [first, last) of them, in the model's range, on the CPU."""
    source: str
    """Source as the user wrote it."""

    @property
    def described(self) -> str:
        """Source, number and digest, for evaluation.json."""
        return f"{self.count:,} images of {shown(self.source)}, digest {self.digest[:12]}"


def reference_images(
    wanted: str,
    dataset: Dataset,
    data_root: str,
    packing: DataConfig,
    announce: Callable[[str], None],
    most: int | None = None,
) -> ReferenceImages | None:
    """Images of `--reference`; None for `test`, the split of the data set.

    Args:
        wanted: `test`, `train`, or a source such as folder:PATH, of which all images are taken.
        dataset: of the run.
        data_root: directory with torchvision's data sets.
        packing: of the run. Images of another source are brought to the shape that the run's have.
        announce: takes a line if there are more images than are used.
        most: images that are taken at most; None is `MOST_IMAGES`.

    Raises:
        ConfigError: images of the source have another shape or other values.
        DataError: the source is unknown, missing or damaged.
    """
    if wanted == "test":
        return None
    if wanted == "train":
        return _of_splits("train", wanted, dataset.digest, "train", [dataset.train], announce, most)
    if (form := dataset.scale.form) != "images":
        raise ConfigError(f"reference {shown(wanted)}: samples are compared as images, and the data are {form}")
    found = open_dataset(wanted, data_root, packing_like(dataset, packing, wanted), announce)
    of_both = [(one.image_shape, one.scale.dtype, one.scale.low, one.scale.high) for one in (found, dataset)]
    if of_both[0] != of_both[1]:
        raise ConfigError(
            f"reference {shown(wanted)} has images {_sides(found)} of values {found.scale}, and the others are "
            f"{_sides(dataset)} of {dataset.scale}; name images of that kind"
        )
    return all_images(found, wanted, announce, most)


def all_images(data: Dataset, source: str, announce: Callable[[str], None], most: int | None = None) -> ReferenceImages:
    """All images of a data set, those of the test split last; see `reference_images`."""
    splits = [data.train, data.test]
    return _of_splits(f"ref-{data.digest[:8]}", source, data.digest, "both", splits, announce, most)


def packing_like(dataset: Dataset, packing: DataConfig, source: str) -> DataConfig:
    """Packing that brings images of another source to the shape and values of a data set's, as far as it can."""
    channels, height, width = dataset.image_shape
    scale = dataset.scale
    if source.startswith("shards:"):  # whose pages need no options, and whose labels need not be there
        packing = dataclasses.replace(packing, missing_labels="unknown", layout=None, pages=None)
    of_files = source.startswith(("folder:", "parquet:", "shards:"))
    has_range = not scale.is_plain and len(scale.low) == 1
    return dataclasses.replace(
        packing,
        image_size=f"{width}x{height}",
        fit="crop" if packing.fit == "none" else packing.fit,
        channels=None if packing.pages == "channels" else _FEW.get(channels),
        dtype="uint8" if scale.dtype == "uint8" and of_files else packing.dtype,  # deeper files are reduced
        array_of=None,  # of arrays alone, and images are what they are without it
        value_range=f"{scale.low[0]!r}:{scale.high[0]!r}" if has_range else None,
        range_per_channel=packing.range_per_channel and not has_range,
        test_shards=None,
        label_columns=(),
        packed_as="raw",
        decoded_on="cpu",
    )


def _of_splits(
    name: str,
    source: str,
    digest: str,
    part: str,
    splits: list[Split],
    announce: Callable[[str], None],
    most: int | None = None,
) -> ReferenceImages:
    """Images of splits, one after another; those at hand of splits that are not packed."""
    all_of_them = sum(len(split.labels) for split in splits)
    splits = [split.sample for split in splits]
    total = sum(len(split.labels) for split in splits)
    rows = evenly_spaced(min(total, MOST_IMAGES if most is None else most), total)
    if len(rows) < all_of_them:
        announce(f"{shown(source)}: {len(rows):,} of {all_of_them:,} images, spread evenly")
    edges = np.cumsum([0, *(len(split.labels) for split in splits)])

    def images(first: int, last: int) -> Tensor:
        wanted: NDArray[np.int64] = rows[first:last]
        parts = [
            split.for_model(wanted[(wanted >= low) & (wanted < high)] - low)
            for split, low, high in zip(splits, edges[:-1], edges[1:], strict=True)
        ]
        return torch.cat(parts)

    return ReferenceImages(name, digest, f"{part} {len(rows)}", len(rows), images, source)


def _sides(dataset: Dataset) -> str:
    return " x ".join(map(str, dataset.image_shape))
