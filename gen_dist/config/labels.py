"""Meaning of a data set's labels: classes, several attributes, or numbers, and how words of the user become them.

Labels are arrays: int64 [N] of classes, int64 [N, A] of attributes, or float32 [N, A] of numbers. A missing class or
value of an attribute has a number of its own, the last, whose name is `unknown`; a missing number is NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gen_dist.errors import ConfigError, UserError, number_of, shortened

LabelKind = Literal["classes", "attributes", "numbers"]
UNKNOWN = "unknown"
_MISSING_WORDS = (UNKNOWN, "nan")
_LARGEST = 3.4e38
"""Magnitude of numbers, which are float32."""

Row = tuple[float, ...]
"""Label of one image: one number, or A of them. Those of classes and attributes are whole."""


@dataclass(frozen=True)
class LabelScheme:
    """Meaning of the labels of a data set."""

    kind: LabelKind
    names: tuple[str, ...]
    """Names of the classes 0, 1, ...; or those of the A attributes or numbers."""
    values: tuple[tuple[str, ...], ...] = ()
    """Names of the values 0, 1, ... of each attribute."""
    unknown: tuple[bool, ...] = (False,)
    """True where labels may be missing: one entry for classes, else one for each attribute or number."""
    mean: tuple[float, ...] = ()
    """Mean of each number over the training images that have it."""
    deviation: tuple[float, ...] = ()
    """Standard deviation of the same; 1 where all are equal. Networks see (number - mean) / deviation."""
    examples: tuple[Row, ...] = ()
    """Some labels of training images: attributes and numbers are asked for as they occur together."""

    @property
    def is_plain(self) -> bool:
        """True for classes that no image lacks."""
        return self.kind == "classes" and not any(self.unknown)

    @property
    def classes(self) -> int:
        """Number of classes, with that of unknown ones; 1 for other labels, as without any."""
        return len(self.names) if self.kind == "classes" else 1

    @property
    def known_classes(self) -> int:
        """Number of classes without that of unknown ones."""
        return self.classes - (self.kind == "classes" and any(self.unknown))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; one name for other labels."""
        return self.names if self.kind == "classes" else ("all",)

    @property
    def are_labels(self) -> bool:
        """False if no image has a label: there is one class."""
        return self.kind != "classes" or len(self.names) > 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's label: () or (A,)."""
        return () if self.kind == "classes" else (len(self.names),)

    @property
    def dtype(self) -> str:
        """Type of the labels, by NumPy's and torch's name."""
        return "float32" if self.kind == "numbers" else "int64"

    @property
    def meaning(self) -> str:
        """Labels in a few words, for cards and ports."""
        match self.kind:
            case "classes":
                return f"0 to {self.classes - 1}: {', '.join(self.names)}"
            case "attributes":
                named = (f"{name} ({', '.join(of)})" for name, of in zip(self.names, self.values, strict=True))
                return f"numbers of the values of {', '.join(named)}"
        missing = "; NaN is unknown" if any(self.unknown) else ""
        return f"{', '.join(self.names)}, in the data's units{missing}"

    def takes(self, other: LabelScheme) -> bool:
        """True if labels of another scheme, such as that of other data, mean the same in this one."""
        if self.kind != other.kind or (self.kind != "classes" and self.names != other.names):
            return False
        if self.kind == "numbers":
            return all(mine or not theirs for mine, theirs in zip(self.unknown, other.unknown, strict=True))
        tables = zip(self.values or (self.names,), other.values or (other.names,), strict=True)
        return all(mine[: len(theirs)] == theirs for mine, theirs in tables)

    def in_turn(self, count: int) -> list[Row]:
        """Labels of `count` images: all classes in turn, or labels as training images have them."""
        rows = [(float(label),) for label in range(self.classes)] if self.kind == "classes" else self.examples
        return list(itertools.islice(itertools.cycle(rows), count))

    def caption(self, row: Sequence[float]) -> str:
        """Label of one image for people: `cat`, `hat yes, smile no` or `age 31.5`."""
        if self.kind == "classes":
            return self.names[int(row[0])]
        if self.kind == "attributes":
            told = (of[int(value)] for of, value in zip(self.values, row, strict=True))
        else:
            told = (UNKNOWN if math.isnan(value) else f"{value:.4g}" for value in row)
        return ", ".join(f"{name} {value}" for name, value in zip(self.names, told, strict=True))

    def row_of(self, text: str) -> Row:
        """Label that a user writes: a class by name or number; attributes and numbers separated by commas.

        Raises:
            UserError: there is no such label.
        """
        if self.kind == "classes":
            return (float(_place(text, self.names, "class")),)
        words = text.split(",")
        if len(words) != len(self.names):
            raise UserError(
                f"label {text[:60]!r} has {number_of(len(words), 'value')}; {len(self.names)} are needed, with "
                f"commas between them: {shortened(', '.join(self.names))}"
            )
        if self.kind == "attributes":
            return tuple(
                float(_place(word, of, f"value of {name}"))
                for word, of, name in zip(words, self.values, self.names, strict=True)
            )
        return tuple(
            self._number(word, name, missing)
            for word, name, missing in zip(words, self.names, self.unknown, strict=True)
        )

    def refuse(self, row: Sequence[float]) -> None:
        """Raise UserError if a row is not a label of this scheme."""
        if self.kind == "numbers":
            for value, name, missing in zip(row, self.names, self.unknown, strict=True):
                if not (abs(value) <= _LARGEST or (missing and math.isnan(value))):
                    raise UserError(f"label {name} {value} is not a number that the model can take")
            return
        tables = [self.names] if self.kind == "classes" else self.values
        for value, of in zip(row, tables, strict=True):
            if not 0 <= value < len(of):
                raise UserError(f"labels have {value:.0f}; the model's are 0 to {len(of) - 1}")

    def as_json(self) -> dict[str, Any]:
        """The scheme as JSON values. Missing numbers of examples are None: JSON has no NaN."""
        return {
            "kind": self.kind,
            "names": list(self.names),
            "values": [list(of) for of in self.values],
            "unknown": list(self.unknown),
            "mean": list(self.mean),
            "deviation": list(self.deviation),
            "examples": [[None if math.isnan(value) else value for value in row] for row in self.examples],
        }

    @staticmethod
    def _number(word: str, name: str, may_miss: bool) -> float:
        if word.strip().lower() in _MISSING_WORDS and may_miss:
            return math.nan
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not abs(value) <= _LARGEST:
            raise UserError(f"label {name} {word!r} is not a number that the model can take")
        return value


NO_LABELS = LabelScheme("classes", ("all",))
"""Images without labels."""


def classes_named(names: Sequence[str]) -> LabelScheme:
    """Scheme of classes that all images have."""
    return LabelScheme("classes", tuple(names))


def scheme_of(labels: int | LabelScheme) -> LabelScheme:
    """Scheme from a number of classes, or as it is."""
    return classes_named([str(label) for label in range(labels)]) if isinstance(labels, int) else labels


def scheme_of_json(found: Mapping[str, Any] | None, class_names: Sequence[str]) -> LabelScheme:
    """Scheme that `as_json` wrote; that of plain classes for None.

    Raises:
        ValueError: it is not one.
    """
    if found is None:
        return classes_named(class_names)
    try:
        kind, names = found["kind"], tuple(map(str, found["names"]))
        values = tuple(tuple(map(str, of)) for of in found["values"])
        unknown = tuple(map(bool, found["unknown"]))
        mean, deviation = (tuple(map(float, found[name])) for name in ("mean", "deviation"))
        examples = tuple(
            tuple(math.nan if value is None else float(value) for value in row) for row in found["examples"]
        )
        counts = {
            "classes": [len(unknown) == 1],
            "attributes": [len(values) == len(unknown) == len(names), all(values), bool(examples)],
            "numbers": [len(mean) == len(deviation) == len(unknown) == len(names), bool(examples)],
        }
        whole = kind in get_args(LabelKind) and bool(names) and all(counts[kind])
        whole = whole and all(math.isfinite(one) for one in mean) and all(0 < one < math.inf for one in deviation)
        if whole:
            scheme = LabelScheme(kind, names, values, unknown, mean, deviation, examples)
            for row in examples:
                scheme.refuse(row)
            return scheme
    except (KeyError, TypeError, OverflowError, UserError) as error:
        raise ValueError(f"no meaning of labels: {type(error).__name__} {error}") from None
    raise ValueError(f"no meaning of labels: {str(dict(found))[:100]}")


def refuse_unlabelled(labels: LabelScheme, conditioning: str) -> None:
    """Raise ConfigError if a conditional model would be trained on images without labels."""
    if not labels.are_labels:
        raise ConfigError(
            f"conditioning {conditioning} needs labelled images, but these have no classes; use another --data, or "
            "--conditioning none"
        )


def _place(text: str, names: Sequence[str], what: str) -> int:
    """Number of a name. Numbers stand for themselves unless they are names, as those of digits."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and len(text) < 10 and int(text) < len(names):
        return int(text)
    few = ", ".join([*names[:10], "..."] if len(names) > 10 else names)
    raise UserError(f"label {text[:60]!r} is no {what}; there are {few}, or 0 to {len(names) - 1}")
