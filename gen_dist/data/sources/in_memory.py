"""`array:`: images given from Python, found again by the digest of their content, and files of NumPy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config.data import Form
from gen_dist.config.labels import LabelScheme
from gen_dist.data.given import Given, names_of_labels
from gen_dist.data.labelling import numbered
from gen_dist.data.sources.array_files import SUFFIXES, ArrayFile
from gen_dist.data.sources.source import Block, Request, Source, SplitName, register
from gen_dist.errors import DataError

_KEY = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{32})?")
_BLOCK = 1024


@dataclass(frozen=True)
class ArraySource:
    """Images by their digests: without the images themselves, only a packed cache of them can be opened."""

    key: str
    """Digest of the train split, then that of the test split, if there is one, after a hyphen."""
    given: Mapping[SplitName, Given] | None = None
    packed: LabelScheme | None = None
    """Meaning of labels that are as they were packed."""

    @property
    def name(self) -> str:
        """Short form of what the config says."""
        return f"array:{self.key[:8]}"

    @property
    def slug(self) -> str:
        """See Source."""
        return "array"

    @property
    def has_test_split(self) -> bool:
        """True if test images were given too."""
        return "-" in self.key

    @property
    def default_size(self) -> int | None:
        """None: the size of the images."""
        return None

    @property
    def form(self) -> Form:
        """See `HasForm`."""
        return self.given["train"].form if self.given else "images"

    def fingerprint(self) -> object:
        """The digests."""
        return self.key

    def remarks(self) -> list[str]:
        """None."""
        return []

    def fetch(self) -> None:
        """Raise DataError if there are no images to pack."""
        if self.given is None:
            raise DataError(
                f"{self.name} was given from Python, and this cache has no packed images of it; name that of the run "
                "with --cache-dir or $GEN_DIST_CACHE, or give the images again: gen_dist.train(config, data=...)"
            )

    def class_names(self) -> tuple[str, ...]:
        """See Source."""
        return self.label_scheme().class_names

    def label_scheme(self) -> LabelScheme:
        """See `HasLabels`."""
        return self._numbered[1]

    @cached_property
    def _numbered(self) -> tuple[dict[SplitName, NDArray[Any]], LabelScheme]:
        """Labels by split, and their meaning."""
        self.fetch()
        assert self.given is not None
        if self.packed is not None:
            return {split: part.labels for split, part in self.given.items()}, self.packed
        names = names_of_labels(list(self.given.values()))
        if names is None and all(_are_zero(part.labels) for part in self.given.values()):
            names = ("all",)  # arrays without labels have the label 0
        return numbered({split: part.labels for split, part in self.given.items()}, names, "data")

    def image_count(self) -> int | None:
        """Images in all splits."""
        return sum(len(part.labels) for part in self.given.values()) if self.given else None

    def blocks(self) -> Iterator[Block]:
        """Some images at a time, so that a view with another order of axes is not copied whole."""
        self.fetch()
        assert self.given is not None
        for split, part in self.given.items():
            for first in range(0, len(part.labels), _BLOCK):
                rows = slice(first, first + _BLOCK)
                names = [f"image {place} of {split} data" for place in range(len(part.labels))[rows]]
                images = part.images[rows]
                if isinstance(images, np.ndarray):
                    images = np.ascontiguousarray(images)
                yield Block(split, images, self._numbered[0][split][rows], names)


def given_source(train: Given, test: Given | None) -> ArraySource:
    """The source of images in memory."""
    given: dict[SplitName, Given] = {"train": train}
    if test:
        given["test"] = test
        if test.form != train.form:
            raise DataError(f"train data are {train.form} and test data {test.form}; give both as one (--array-of)")
    return ArraySource("-".join(part.digest() for part in given.values()), given)


def packed_source(
    source: ArraySource,
    splits: Mapping[SplitName, tuple[NDArray[Any], NDArray[Any]]],
    labels: LabelScheme,
    form: Form,
) -> ArraySource:
    """The source with its images and labels as they were packed, both splits of them."""
    given = {split: Given(images, of_images, labels.names, form=form) for split, (images, of_images) in splits.items()}
    # Two digests: what was held out when they were packed is not held out again.
    return ArraySource(source.key if source.has_test_split else f"{source.key}-{source.key}", given, labels)


def _open(request: Request) -> Source:
    key = str(request.path)
    if request.path.suffix in SUFFIXES:
        return ArrayFile(request.path, request.packing.layout, request.packing.array_of)
    if not _KEY.fullmatch(key):
        raise DataError(
            f"array:{key[:80]} is neither a .npy or .npz file nor a digest of images; a run that was given images from "
            "Python has their digest in its config.json"
        )
    return ArraySource(key)


register("array", _open, takes_path=True)


def _are_zero(labels: NDArray[Any]) -> bool:
    return labels.ndim == 1 and labels.dtype.kind == "i" and not labels.max(initial=0)
