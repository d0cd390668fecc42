"""Counts of images by the kind of their fault or loss."""

from __future__ import annotations

import re
from typing import NamedTuple

from gen_dist.data.naming import printable, some
from gen_dist.errors import number_of

_MOST_KINDS = 5
_MOST_NAMES = 4
_LONGEST_REASON = 100


class _Kind(NamedTuple):
    detail: str
    """Text of the first image: numbers in it differ from image to image."""
    names: list[str]
    """Names of the first images."""


class Tally:
    """Number of images of each kind, and the names of the first."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, _Kind] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, detail: str, kind: str | None = None) -> None:
        """Count an image. Without a kind, details that differ in numbers only are one."""
        detail = printable(" ".join(detail.split()))[:_LONGEST_REASON]
        kind = re.sub(r"\d[\d,.]*", "#", detail) if kind is None else kind
        self.count += 1
        self._counts[kind] = self._counts.get(kind, 0) + 1
        names = self._kinds.setdefault(kind, _Kind(detail, [])).names
        if len(names) < _MOST_NAMES:
            names.append(name)

    def kinds(self) -> list[tuple[str, int, str, list[str]]]:
        """Kind, number of images, detail of the first and first names; the most frequent kind first."""
        order = sorted(self._kinds, key=lambda kind: -self._counts[kind])
        return [(kind, self._counts[kind], *self._kinds[kind]) for kind in order]

    @property
    def first(self) -> str:
        """The first image with its detail."""
        kind = next(iter(self._kinds.values()))
        return f"{kind.names[0]}: {kind.detail}"

    def __str__(self) -> str:
        kinds = self.kinds()
        texts = [
            f"{shown_names(count, names)} ({f'{count:,}: ' if count > 1 else ''}{detail})"
            for _, count, detail, names in kinds
        ]
        more = len(texts) - _MOST_KINDS
        return ", ".join(texts[:_MOST_KINDS]) + (f" and {more} more reasons" if more > 0 else "")


def shown_names(count: int, names: list[str]) -> str:
    """The first of `count` names, of which some are known."""
    shown = some(names)
    return shown if count <= len(names) else re.sub(r" and .* more$", "", shown) + ", ..."


def unreadable_images(count: int) -> str:
    """Number of unreadable images in words."""
    return number_of(count, "unreadable image")
