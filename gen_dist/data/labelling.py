"""Labels of a source: read from arrays, columns and lists, numbered over its splits, and completed when packed.

While a source is read, -1 stands for a missing class or value of an attribute, and NaN for a missing number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gen_dist.config.labels import UNKNOWN, LabelScheme, classes_named
from gen_dist.data.naming import printable, some
from gen_dist.data.subsets import evenly_spaced
from gen_dist.data.values import format_number
from gen_dist.errors import DataError

MOST_CLASSES = 100_000
MOST_VALUES = 1000
_MOST_LABELS = 4096
EXAMPLES = 20
_SHOWN = 20
MISSING = -1
"""A class or value of an attribute that an image lacks."""

Key = TypeVar("Key", bound=str)


def raw_labels(found: Any, count: int) -> NDArray[Any]:
    """Labels of `count` images in one of five forms, by dtype and number of axes.

    Texts [N] and int64 [N] are classes, texts and int64 [N, A] attributes, and float32 [N, A] numbers. An empty text
    and None are missing labels.

    Args:
        found: an array [N] or [N, A] of integers, booleans, floating point, texts, or Python's objects of one kind.
        count: N.

    Raises:
        DataError: other labels, or not one an image.
    """
    labels = _of_objects(found) if found.dtype.kind == "O" else found
    what = f"the labels are {found.dtype} {list(found.shape)}"
    if labels.ndim not in (1, 2) or labels.shape[0] != count or labels.dtype.kind not in "iufbU" or not labels.size:
        raise DataError(
            f"{what}; integers [{count}], one an image, are needed for classes, or texts; integers or texts "
            f"[{count}, A] for attributes; floating point [{count}] or [{count}, A] for numbers"
        )
    if labels.ndim == 2 and labels.shape[1] > _MOST_LABELS:
        raise DataError(f"{what}: at most {_MOST_LABELS:,} labels an image can be learned")
    if labels.dtype.kind == "f":
        with np.errstate(over="ignore"):
            numbers = labels.reshape(count, -1).astype(np.float32)
        if np.isinf(numbers).any():
            raise DataError(f"{what}, and some are infinite in float32; NaN stands for a missing number")
        return numbers
    if labels.dtype.kind == "b":
        return labels.reshape(count, -1).astype(np.int64)
    if labels.dtype.kind == "U":
        return labels
    most = MOST_CLASSES if labels.ndim == 1 else MOST_VALUES
    if labels.min() < MISSING or labels.max() >= most:
        raise DataError(
            f"the labels go from {labels.min()} to {labels.max()}; 0 to the number of classes - 1 is needed, below "
            f"{most:,}, and -1 for a missing one; give numbers that are no classes as floating point"
        )
    return labels.astype(np.int64)


def joined_columns(columns: Sequence[NDArray[Any]], count: int) -> NDArray[Any]:
    """Raw labels [N, A] from raw labels of one column each: numbers if one has floating point, else attributes.

    Raises:
        DataError: there are no columns, or texts beside numbers.
    """
    flat = [column.reshape(count, -1) for column in columns]
    kinds = {column.dtype.kind for column in flat}
    if not flat:
        raise DataError("there are no columns of labels; give one or more, or leave labels out")
    if "U" in kinds and "f" in kinds:
        raise DataError("the columns of labels are texts and numbers; give texts and integers, or numbers alone")
    if "U" in kinds:
        return np.concatenate(
            [one if one.dtype.kind == "U" else np.where(one == MISSING, "", one.astype(str)) for one in flat], axis=1
        )
    if "f" in kinds:
        wide = [np.where(one == MISSING, np.nan, one) if one.dtype.kind == "i" else one for one in flat]
        return np.concatenate(wide, axis=1).astype(np.float32)
    return np.concatenate(flat, axis=1)


def kind_of(labels: NDArray[Any] | None) -> str:
    """Form of raw labels in words, for errors."""
    if labels is None:
        return "missing"
    form = {"U": "texts", "i": "integers", "f": "numbers"}[labels.dtype.kind]
    return form if labels.ndim == 1 else f"{form} of {labels.shape[1]}"


def numbered(
    parts: Mapping[Key, NDArray[Any]], names: Sequence[str] | None, source: str
) -> tuple[dict[Key, NDArray[Any]], LabelScheme]:
    """Number raw labels of all splits alike.

    Args:
        parts: raw labels by split, of one form; those of `train` first.
        names: names of the classes, attributes or numbers, if the source has any.
        source: its name in errors.

    Returns:
        Labels by split as a `Block` has them, and what they mean.

    Raises:
        DataError: splits have labels of two forms, a split has a class that `train` lacks, or the names do not fit.
    """
    (first, train), *others = parts.items()
    for split, labels in others:
        if (kind := kind_of(labels)) != (of_train := kind_of(train)):
            raise DataError(
                f"{source}: labels of {split} images are {kind}, those of {first} images {of_train}; give both splits "
                "labels of one kind, or none"
            )
    if train.ndim == 1:
        if train.dtype.kind == "U":
            texts = _in_order_of(names, _texts_of(train, MOST_CLASSES, source), source)
            found = {split: _numbers_of_texts(labels, texts, split, source) for split, labels in parts.items()}
            return found, classes_named(list(map(printable, texts)) or ["all"])
        classes = max(int(labels.max(initial=MISSING)) for labels in parts.values()) + 1
        return dict(parts), classes_named(names or list(map(str, range(classes))) or ["all"])
    given = tuple(map(str, names)) if names is not None else tuple(f"label_{i}" for i in range(train.shape[1]))
    if len(given) != train.shape[1] or len(set(given)) != len(given):
        raise DataError(f"{source}: {len(given)} names for {train.shape[1]} labels of an image; give each its own name")
    nothing = (False,) * len(given)
    if train.dtype.kind == "f":
        return dict(parts), LabelScheme("numbers", given, unknown=nothing)
    if train.dtype.kind == "U":
        texts_of_each = [_texts_of(train[:, i], MOST_VALUES, source) for i in range(len(given))]
        columns = {
            split: [_numbers_of_texts(labels[:, i], texts, split, source) for i, texts in enumerate(texts_of_each)]
            for split, labels in parts.items()
        }
        values = tuple(tuple(map(printable, texts)) or ("all",) for texts in texts_of_each)
        numbers = {split: np.stack(of_split, axis=1) for split, of_split in columns.items()}
        return numbers, LabelScheme("attributes", given, values, nothing)
    highest = np.max([labels.max(axis=0, initial=0) for labels in parts.values()], axis=0)
    values = tuple(tuple(map(str, range(max(2, int(most) + 1)))) for most in highest)
    return dict(parts), LabelScheme("attributes", given, values, nothing)


def completed(
    source: str, scheme: LabelScheme, train: NDArray[Any], test: NDArray[Any]
) -> tuple[LabelScheme, NDArray[Any], NDArray[Any]]:
    """Scheme and labels as they are packed: missing ones have numbers, and numbers their mean and deviation.

    Raises:
        DataError: labels are missing, and a class or value is called `unknown`.
    """
    both = (train, test)
    if scheme.kind == "numbers":
        unknown = tuple(np.any([np.isnan(labels).any(axis=0) for labels in both if len(labels)], axis=0).tolist())
        mean, deviation = _moments(train)
        scheme = replace(scheme, unknown=unknown, mean=mean, deviation=deviation)
    elif any((labels == MISSING).any() for labels in both):
        if scheme.kind == "classes" and not any((labels != MISSING).any() for labels in both):
            return classes_named(["all"]), np.zeros_like(train), np.zeros_like(test)
        tables = scheme.values or (scheme.names,)
        columns = [labels.reshape(len(labels), len(tables)) for labels in both]
        lacking = [any(bool((of[:, i] == MISSING).any()) for of in columns) for i in range(len(tables))]
        if twice := [names for names, one in zip(tables, lacking, strict=True) if one and UNKNOWN in names]:
            raise DataError(
                f"{source}: labels are missing, and {len(twice[0])} others have one called {UNKNOWN}; rename it"
            )
        counts = np.array([len(names) for names in tables])
        train, test = (
            np.where(of == MISSING, counts, of).reshape(labels.shape) for of, labels in zip(columns, both, strict=True)
        )
        named = tuple((*names, UNKNOWN) if one else names for names, one in zip(tables, lacking, strict=True))
        if scheme.values:
            scheme = replace(scheme, values=named, unknown=tuple(lacking))
        else:
            scheme = replace(scheme, names=named[0], unknown=(True,))
    if scheme.kind != "classes":
        shown = train[evenly_spaced(min(EXAMPLES, len(train)), len(train))]
        scheme = replace(scheme, examples=tuple(tuple(map(float, row)) for row in shown))
    return scheme, train, test


def lines_on_labels(scheme: LabelScheme, train: NDArray[Any], test: NDArray[Any]) -> list[str]:
    """Lines about labels that are missing.

    Args:
        scheme: meaning of the labels, completed.
        train: labels of the training images.
        test: those of the test images.
    """
    lines = []
    for place, (name, missing) in enumerate(zip(_names_of_columns(scheme), scheme.unknown, strict=True)):
        if missing:
            count = int(sum(_lacking(scheme, labels, place).sum() for labels in (train, test)))
            images = "1 image has" if count == 1 else f"{count:,} images have"
            if _lacking(scheme, train, place).any():
                lines.append(f"{images} no {name}: what stands for it is learned, and `{UNKNOWN}` asks for it")
            else:
                lines.append(f"{images} no {name}, all of them test images: what stands for it is not learned")
    return _few(lines)


def summary_of_labels(scheme: LabelScheme, labels: NDArray[Any]) -> list[str]:
    """Lines about attributes and numbers of all images, for a survey; none for classes."""
    lines = []
    if scheme.kind == "attributes":
        for place, (name, values) in enumerate(zip(scheme.names, scheme.values, strict=True)):
            counts = np.bincount(labels[:, place], minlength=len(values)).tolist()
            named = [f"{value} ({count:,})" for value, count in zip(values, counts, strict=True)]
            lines.append(f"{name}: {some(named)}")
    if scheme.kind == "numbers":
        for place, name in enumerate(scheme.names):
            known = labels[:, place][~np.isnan(labels[:, place])]
            ends = f"{format_number(float(known.min()))}..{format_number(float(known.max()))}" if len(known) else "none"
            gone = len(labels) - len(known)
            lines.append(f"{name}: {ends}" + (f", {gone:,} missing" if gone else ""))
    return _few(lines)


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"and {more:,} more labels alike"] if more > 0 else lines


def _of_objects(found: NDArray[Any]) -> NDArray[Any]:
    """Labels of Python as an array of one kind; None becomes what stands for a missing one.

    Booleans have the form of attributes, as those of an array. If all are None, they are classes.
    """
    known = [one for one in found.ravel().tolist() if one is not None]
    texts = bool(known) and all(isinstance(one, str) for one in known)
    whole = all(isinstance(one, int) for one in known)
    if not texts and not all(isinstance(one, int | float) for one in known):
        return found
    gone: Any = "" if texts else MISSING if whole else math.nan
    flat = [gone if one is None else one for one in found.ravel().tolist()]
    labels = np.array(flat, str if texts else np.int64 if whole else np.float64).reshape(found.shape)
    return labels[:, None] if labels.ndim == 1 and known and all(isinstance(one, bool) for one in known) else labels


def _texts_of(labels: NDArray[Any], most: int, source: str) -> list[str]:
    """Distinct texts of raw labels, sorted, without the empty one.

    Raises:
        DataError: they are more than `most`.
    """
    texts: list[str] = [text for text in np.unique(labels).tolist() if text]
    if len(texts) > most:
        raise DataError(
            f"{source}: the labels have {len(texts):,} different texts, such as {printable(texts[0])[:40]!r}; at most "
            f"{most:,} can be learned: name other labels, or leave them out"
        )
    return texts


def _in_order_of(names: Sequence[str] | None, texts: list[str], source: str) -> list[str]:
    """Texts in the order of the names that the source gives its classes, and names without images; else as they are.

    Raises:
        DataError: a text is none of the names.
    """
    if names is None:
        return texts
    if strange := sorted(set(texts) - set(names)):
        raise DataError(
            f"{source}: the label {printable(strange[0])!r} is none of the {len(names)} names of classes; name it too, "
            "or leave out the names"
        )
    return list(names)


def _numbers_of_texts(labels: NDArray[Any], texts: Sequence[str], split: str, source: str) -> NDArray[np.int64]:
    """Places of labels among some texts; MISSING for the empty one."""
    numbers = {"": MISSING} | {text: number for number, text in enumerate(texts)}
    distinct, places = np.unique(labels, return_inverse=True)
    if strange := [text for text in distinct.tolist() if text not in numbers]:
        raise DataError(f"{source}: {split} images have the class {strange[0]!r}, which train does not have")
    return np.array([numbers[text] for text in distinct.tolist()], np.int64)[places.reshape(labels.shape)]


def _moments(train: NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each column, in float64; 0 and 1 where there is no number."""
    means, deviations = [], []
    for column in train.T.astype(np.float64):
        known = column[~np.isnan(column)]
        means.append(float(known.mean()) if len(known) else 0.0)
        deviations.append((float(known.std()) if len(known) else 0.0) or 1.0)
    return tuple(means), tuple(deviations)


def _names_of_columns(scheme: LabelScheme) -> tuple[str, ...]:
    return ("label",) if scheme.kind == "classes" else scheme.names


def _lacking(scheme: LabelScheme, labels: NDArray[Any], place: int) -> NDArray[np.bool_]:
    column = labels[:, place] if labels.ndim > 1 else labels
    if scheme.kind == "numbers":
        return np.isnan(column)
    table = scheme.values[place] if scheme.values else scheme.names
    lacking: NDArray[np.bool_] = column == len(table) - 1
    return lacking
