"""Names of files, splits and classes: their meaning, and lines for the user where they have two."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import overload

_SUFFIX = r"(?:[ _.-]?(?:set|data|split|images?|imgs?|samples?))?"
_TRAIN = re.compile(rf"(?:train|training|trn){_SUFFIX}")
_TEST = re.compile(rf"(?:test|testing|tst|val|valid|validation|eval|evaluation|dev){_SUFFIX}")
# C0 and C1 controls, line separators, and marks that turn the direction of text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_NUMBER = re.compile(r"[0-9]{1,18}")
_SHOWN = 3


class Names(Sequence[str]):
    """Names in the order of images, each found as it is asked for."""

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        rows = range(len(self))[place]
        return self.name_of(rows) if isinstance(rows, int) else [self.name_of(row) for row in rows]

    def name_of(self, row: int) -> str:
        """Name of the image in a row, counted from 0."""
        raise NotImplementedError


def printable(name: str) -> str:
    """Show bytes that are no text, and control characters, as escapes: the name stays on one line."""
    try:
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which is not a valid file name
        text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def names_train(name: str) -> bool:
    """True if a name is a spelling of `train`, such as Train or training_set."""
    return bool(_TRAIN.fullmatch(name.casefold().strip(" _.-")))


def names_test(name: str) -> bool:
    """True if a name is a spelling of `test` or `validation`, such as Val or testing."""
    return bool(_TEST.fullmatch(name.casefold().strip(" _.-")))


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def spelled_twice(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that differ only in how Unicode composes their letters, such as é and e with an accent; else None."""
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            return other, name
    return None


def remarks_on_classes(names: Sequence[str]) -> list[str]:
    """Lines about class names that may not say what their author meant."""
    remarks = []
    if list(names) == sorted(names) and (pair := _out_of_numeric_order(names)):
        remarks.append(
            f"classes are in the order of text, not of numbers: label {names.index(pair[0])} is {pair[0]!r}, before "
            f"{pair[1]!r}; write leading zeros to change that"
        )
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(" ".join(name.casefold().split()), name)
        if other != name:
            remarks.append(
                f"classes {other!r} and {name!r} differ in capitals or spaces only; rename one if they are one"
            )
            break
    return remarks


def _out_of_numeric_order(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that differ in their numbers alone, the first of which has the larger one; else None."""
    last: dict[tuple[str, ...], str] = {}
    for name in names:
        letters = tuple(_NUMBER.split(name))
        other = last.get(letters, name)
        if [int(number) for number in _NUMBER.findall(other)] > [int(number) for number in _NUMBER.findall(name)]:
            return other, name
        last[letters] = name
    return None
