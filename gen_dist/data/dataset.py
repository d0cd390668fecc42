"""A data set as training sees it: images and labels of two splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.config.labels import LabelScheme, classes_named
from gen_dist.data.on_demand import ImagesOnDemand
from gen_dist.data.values import PLAIN, ValueScale


@dataclass(frozen=True)
class Split:
    """Images of one split, in the source's order; those held out of a train split in keyed order."""

    name: str
    """Name in error messages: `train split of mnist5k`."""
    images: NDArray[Any]
    """[N, C, H, W] of the scale's dtype, memory-mapped. Read-only by convention: a write stays private to the process.
    Those of `on_demand` are no array, but have its shape, its type and its ways to take rows."""
    labels: NDArray[Any]
    """int64 [N], indices into the class names of the data set, all 0 for a source without labels; or int64 [N, A] of
    attributes, float32 [N, A] of numbers. The scheme of the data set says which."""
    names: Sequence[str] | None = None
    """Name of each image, such as its path in a folder. None for sources without, and for caches of older versions."""
    scale: ValueScale = PLAIN
    """Range of the values, which models see as 0..1."""
    counts: NDArray[np.int64] | None = None
    """Images of each shard, int64 [shards], of a split whose order is that of `gen_dist.data.shard_order`. None for
    others."""
    some: Split | None = None
    """Some of the images, packed; see `sample`."""

    @property
    def on_demand(self) -> ImagesOnDemand | None:
        """Images that are decoded when they are asked for; None if they are packed."""
        images: Any = self.images
        return images if isinstance(images, ImagesOnDemand) else None

    @property
    def sample(self) -> Split:
        """The split itself if all of it is at hand, else some of its images: for statistics of the whole."""
        return self.some or self

    def some_rows(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
        """Rows first .. last - 1, int64 [n], with their images and labels. A damaged image gives way to another, whose
        row and label are given."""
        rows = np.arange(first, last)
        if self.on_demand is None:
            return rows, self.images[first:last], self.labels[first:last]
        images = np.empty((len(rows), *self.images.shape[1:]), self.images.dtype)
        rows = self.on_demand.gather(rows, images)
        return rows, images, self.labels[rows]

    def for_model(self, rows: slice | NDArray[np.int64]) -> Tensor:
        """Some images as objectives take them, on the CPU: uint8 [n, C, H, W], or float32 in 0..255 for other values
        than 8-bit ones."""
        return self.scale.for_model(torch.from_numpy(self.images[rows]))


@dataclass(frozen=True)
class Dataset:
    """A packed source: both splits have one image shape and one set of classes."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    """Names of the labels 0, 1, ...; one name for a source without classes."""
    digest: str
    """SHA-256 of images, labels, class names and range of the values: equal digests are equal data, whatever the path
    or machine."""
    scheme: LabelScheme | None = None
    """Meaning of the labels. None: they are the classes of `class_names`, which no image lacks."""

    @property
    def labels(self) -> LabelScheme:
        """Meaning of the labels of both splits."""
        return self.scheme or classes_named(self.class_names)

    @property
    def scale(self) -> ValueScale:
        """Range of the values of both splits."""
        return self.train.scale

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width
