"""Class names of a set of shards, and the numbers of their labels."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.naming import printable
from gen_dist.data.shards.contents import MISSING, Contents
from gen_dist.errors import DataError

_MOST_CLASSES = 1_000_000
_INTEGER = re.compile("-?[0-9]+")


class Labels:
    """Labels of all shards: numbers, or texts that get the numbers of their order."""

    def __init__(self, name: str) -> None:
        """`name` is the source in error messages."""
        self._name = name
        self._texts: set[str] = set()
        self._named: tuple[str, ...] | None = None
        self._images = 0
        self._numbers: dict[str, int] = {}

    def add(self, place: str, contents: Contents) -> None:
        """Take note of a shard's labels.

        Raises:
            DataError: shards disagree about the names of the classes, or there are too many.
        """
        if not len(contents.labels):
            return
        if self._named not in (None, contents.class_names):
            raise DataError(f"{self._name}: {printable(place)} has other class names than the shards before it")
        self._named = contents.class_names
        self._texts.update(np.unique(contents.labels).tolist())
        self._images += len(contents.labels)
        if len(self._texts) > _MOST_CLASSES:
            raise DataError(f"{self._name}: more than {_MOST_CLASSES:,} different labels; those are no classes")

    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; `all` if no image has a label.

        Raises:
            DataError: some images have labels and others have none, or a number is out of range.
        """
        if self._texts <= {MISSING}:
            self._numbers = {MISSING: 0}
            return ("all",)
        if MISSING in self._texts:
            raise DataError(
                f"{self._name}: some images have labels and some have none; add the .cls files that are missing"
            )
        if self._named:
            names = self._named
        elif all(map(_INTEGER.fullmatch, self._texts)):
            self._numbers = {text: int(text) for text in self._texts}
            highest, lowest = max(self._numbers.values()), min(self._numbers.values())
            if lowest < 0:
                raise DataError(
                    f"{self._name}: label {lowest} is out of range: classes have numbers from 0 on; leave images "
                    "without a label out"
                )
            if highest >= self._images:
                raise DataError(
                    f"{self._name}: label {highest} is out of range: it would make more classes than there are images "
                    f"({self._images:,})"
                )
            return tuple(map(str, range(highest + 1)))
        else:
            names = tuple(sorted(self._texts))
        self._numbers = {text: number for number, text in enumerate(names)}
        if missing := sorted(self._texts - set(names)):
            raise DataError(f"{self._name}: label {printable(missing[0])} has no class name")
        return tuple(map(printable, names))

    def numbers(self, texts: NDArray[np.str_]) -> NDArray[np.int64]:
        """Numbers of labels, int64 [n], after `class_names`."""
        distinct, places = np.unique(texts, return_inverse=True)
        return np.array([self._numbers[text] for text in distinct.tolist()], np.int64)[places]
