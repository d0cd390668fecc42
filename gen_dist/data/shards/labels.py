"""Labels of a set of shards: what they mean in all of them, and the numbers that they get, one shard at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.addresses import shown
from gen_dist.config.labels import UNKNOWN, LabelScheme, classes_named
from gen_dist.data.labelling import MISSING as MISSING_NUMBER
from gen_dist.data.labelling import MOST_VALUES
from gen_dist.data.naming import printable
from gen_dist.data.shards.contents import MISSING, Contents
from gen_dist.errors import DataError

_MOST_CLASSES = 1_000_000
INTEGER = re.compile("-?[0-9]+")
_KINDS = {"U": "texts", "i": "integers", "f": "numbers"}
_WAY_OUT = "or use --missing-labels unknown"


class LabelRequest(NamedTuple):
    """Labels that are read of each image."""

    columns: tuple[str, ...] = ()
    """Keys of a sidecar, or columns of a parquet file. None named takes the usual one."""
    may_miss: bool = False
    """True if images may lack them."""


USUAL_LABELS = LabelRequest()
"""The class of each image, which none lacks."""


def request_of(packing: DataConfig) -> LabelRequest:
    """Labels that a config asks for."""
    return LabelRequest(packing.label_columns, packing.missing_labels == UNKNOWN)


class Labels:
    """Labels of all shards: classes, which are numbers or texts that get the numbers of their order; or tables with a
    column for each attribute or number. Shards are added one after another; only what they mean is kept."""

    def __init__(self, name: str, request: LabelRequest = USUAL_LABELS, others: int = 0) -> None:
        """
        Args:
            name: the source in error messages.
            request: the labels that are asked for.
            others: images of shards that are not added, where some stand for all.
        """
        self._name = name
        self._request = request
        self._texts: set[str] = set()
        self._named: tuple[str, ...] | None = None
        self._images = others
        self._numbers: dict[str, int] = {}
        self._table: _TableLabels | None = None

    def add(self, place: str, contents: Contents) -> None:
        """Take note of a shard's labels.

        Raises:
            DataError: shards disagree about the names of the classes or the kind of the labels, or there are too many.
        """
        if not len(contents.labels):
            return
        self._images += len(contents.labels)
        if contents.table is not None:
            self._table = self._table or _TableLabels(self._name, contents.columns)
            self._table.add(place, contents.columns, contents.table)
        else:
            if self._named not in (None, contents.class_names):
                raise DataError(
                    f"{self._name}: {printable(shown(place))} has other class names than the shards before it"
                )
            self._named = contents.class_names
            self._texts.update(np.unique(contents.labels).tolist())
            if len(self._texts) > _MOST_CLASSES:
                raise DataError(f"{self._name}: more than {_MOST_CLASSES:,} different labels; those are no classes")
        if self._table and self._texts - {MISSING}:
            raise DataError(
                f"{self._name}: labels of {printable(shown(place))} are of another kind than those of the shards "
                "before it; write classes, attributes or numbers in all of them"
            )

    def scheme(self) -> LabelScheme:
        """Meaning of the labels; one class `all` if no image has any. See `finished` for what is added later.

        Raises:
            DataError: some images have labels and others have none, or a number is out of range.
        """
        if self._table:
            return self._table.scheme(MISSING in self._texts, self._request.may_miss)
        if self._texts <= {MISSING}:
            if self._request.columns:
                raise DataError(
                    f"{self._name}: no image has {', '.join(map(printable, self._request.columns))} of --label-columns"
                )
            self._numbers = {MISSING: 0}
            return classes_named(["all"])
        lacking = MISSING in self._texts
        if lacking and not self._request.may_miss:
            raise DataError(
                f"{self._name}: some images have labels and some have none; add the .cls files that are missing, "
                f"{_WAY_OUT}"
            )
        names = self._class_names()
        if not lacking:
            return classes_named(names)
        if UNKNOWN in names:
            raise DataError(f"{self._name}: labels are missing, and a class is called {UNKNOWN}; rename it")
        self._numbers[MISSING] = len(names)
        return replace(classes_named((*names, UNKNOWN)), unknown=(True,))

    def of(self, contents: Contents, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[Any]:
        """Labels of images of a shard as the scheme has them, after `scheme`."""
        if self._table:
            return self._table.of(contents, rows)
        distinct, places = np.unique(contents.labels[rows], return_inverse=True)
        return np.array([self._numbers[text] for text in distinct.tolist()], np.int64)[places]

    def finished(self, scheme: LabelScheme, kept: Moments, sample: NDArray[Any]) -> LabelScheme:
        """Scheme with moments and examples of training images.

        Args:
            scheme: that of `scheme`.
            kept: moments of the numbers of the training images.
            sample: labels of some of them.
        """
        if scheme.kind == "classes":
            return scheme
        if scheme.kind == "numbers":
            mean, deviation = kept.found()
            scheme = replace(scheme, mean=mean, deviation=deviation)
        return replace(scheme, examples=tuple(tuple(map(float, row)) for row in sample))

    def _class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ... that images have."""
        texts = self._texts - {MISSING}
        if self._named:
            names = self._named
        elif all(map(INTEGER.fullmatch, texts)):
            self._numbers = {text: int(text) for text in texts}
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
            names = tuple(sorted(texts))
        self._numbers = {text: number for number, text in enumerate(names)}
        if missing := sorted(texts - set(names)):
            raise DataError(f"{self._name}: label {printable(missing[0])} has no class name")
        return tuple(map(printable, names))


class Moments:
    """Mean and standard deviation of columns, in float64, of parts that come one after another.

    Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", eq. 2.1.
    """

    def __init__(self) -> None:
        self._counts = self._means = self._squares = np.zeros(0)

    def add(self, numbers: NDArray[Any]) -> None:
        """Take numbers [n, A]; NaN is none."""
        if not self._counts.size:
            self._counts, self._means, self._squares = np.zeros((3, numbers.shape[1]))
        for place, column in enumerate(numbers.T.astype(np.float64)):
            known = column[~np.isnan(column)]
            if not len(known):
                continue
            mean, before = known.mean(), self._counts[place]
            self._counts[place] += len(known)
            off = mean - self._means[place]
            self._squares[place] += known.var() * len(known) + off**2 * before * len(known) / self._counts[place]
            self._means[place] += off * len(known) / self._counts[place]

    def found(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each column; 0 and 1 where there is no number, or only one."""
        deviations = np.sqrt(self._squares / np.maximum(self._counts, 1))
        return tuple(self._means.tolist()), tuple(float(one) or 1.0 for one in deviations)


class _TableLabels:
    """Attributes or numbers of all shards."""

    def __init__(self, name: str, columns: tuple[str, ...]) -> None:
        self._name = name
        self._columns = columns
        self._kind = ""
        self._texts: list[set[str]] = [set() for _ in columns]
        self._highest = np.ones(len(columns), np.int64)
        self._lacking = np.zeros(len(columns), bool)
        self._places: list[dict[str, int]] = []
        self._values: tuple[tuple[str, ...], ...] = ()

    def add(self, place: str, columns: tuple[str, ...], table: NDArray[Any]) -> None:
        kind, missing = table.dtype.kind, is_missing(table)
        if columns == self._columns and missing.all():  # which kind they would be, nothing says
            self._lacking[:] = True
            return
        whole_and_not = {self._kind, kind} == {"i", "f"}  # JSON writes 31.0 as 31
        if columns != self._columns or (self._kind not in ("", kind) and not whole_and_not):
            raise DataError(
                f"{self._name}: labels of {printable(shown(place))} are {len(columns)} {_KINDS[kind]}, those of the "
                f"shards before it {len(self._columns)} {_KINDS.get(self._kind, 'labels')}; write them alike"
            )
        self._kind = "f" if whole_and_not else kind
        self._lacking |= missing.any(axis=0)
        if kind == "i":
            self._highest = np.maximum(self._highest, table.max(axis=0))
        if kind == "U":
            for texts, column in zip(self._texts, table.T, strict=True):
                texts.update(text for text in np.unique(column).tolist() if text)
                if len(texts) > MOST_VALUES:
                    raise DataError(
                        f"{self._name}: a label has more than {MOST_VALUES:,} different texts; name other labels with "
                        "--label-columns"
                    )

    def scheme(self, some_have_none: bool, may_miss: bool) -> LabelScheme:
        if not self._kind:
            raise DataError(f"{self._name}: no image has {', '.join(map(printable, self._columns))}")
        self._lacking |= some_have_none
        if self._lacking.any() and not may_miss:
            lacked = self._columns[int(np.argmax(self._lacking))]
            raise DataError(f"{self._name}: some images have no label {printable(lacked)}; add it, {_WAY_OUT}")
        unknown, names = tuple(self._lacking.tolist()), tuple(map(printable, self._columns))
        if self._kind == "f":
            return LabelScheme("numbers", names, unknown=unknown)
        if self._kind == "U":
            tables = [sorted(texts) or ["all"] for texts in self._texts]
        else:
            tables = [list(map(str, range(int(highest) + 1))) for highest in self._highest]
        self._places = [{text: number for number, text in enumerate(table)} for table in tables]
        for column, table, lacking in zip(names, tables, unknown, strict=True):
            if lacking and UNKNOWN in table:
                raise DataError(f"{self._name}: {column} is missing, and a value is called {UNKNOWN}; rename it")
        values = [(*map(printable, table), *([UNKNOWN] * one)) for table, one in zip(tables, unknown, strict=True)]
        return LabelScheme("attributes", names, tuple(values), unknown)

    def of(self, contents: Contents, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        table = contents.table
        if table is None:
            table = np.full((len(contents.labels), len(self._columns)), "")
        table = table[rows]
        if self._kind == "f":
            if table.dtype.kind == "U":  # a shard none of whose images has one
                return np.full(table.shape, np.nan, np.float32)
            return np.where(is_missing(table), np.nan, table).astype(np.float32)
        numbers = np.empty(table.shape, np.int64)
        for place, known in enumerate(self._places):
            texts, places = np.unique(table[:, place], return_inverse=True)
            found = [known.get(str(text), len(known)) for text in texts.tolist()]  # a missing one comes last
            numbers[:, place] = np.array(found, np.int64)[places]
        return numbers


def is_missing(table: NDArray[Any]) -> NDArray[np.bool_]:
    """True where a table of raw labels has none."""
    missing: NDArray[np.bool_]
    if table.dtype.kind == "f":
        missing = np.isnan(table)
    else:
        missing = table == ("" if table.dtype.kind == "U" else MISSING_NUMBER)
    return missing
