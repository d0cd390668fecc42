"""Forms of data: images, signals and vectors, all of which are [N, C, H, W] inside.

A signal [C, L] is held as [C, 1, L], and a vector [D] as D channels of one value, [D, 1, 1]. So whatever is done for
each channel of images is done for each channel of signals and for each number of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.config import DataConfig
from gen_dist.config.data import Form
from gen_dist.data.sources.source import HasForm, Source, form_of_source

_LONG = 8
"""Ratio of two sides from which on an image is likely a signal."""

Rows = TypeVar("Rows", Tensor, NDArray[np.generic])


def own_shape(form: Form, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of one row as its user has it, of [C, H, W]: the same, (C, L) or (D,)."""
    channels, height, width = shape
    return {"images": (channels, height, width), "signals": (channels, width), "vectors": (channels,)}[form]


def as_own(form: Form, rows: Rows) -> Rows:
    """Rows as their user has them, of [N, C, H, W]: the same, [N, C, L] or [N, D]."""
    return {"images": rows, "signals": rows[:, :, 0], "vectors": rows[:, :, 0, 0]}[form]


def as_held(form: Form, rows: Rows) -> Rows:
    """Rows [N, C, H, W] of those that a user has; others than those of the form are returned as they are."""
    if form == "vectors" and rows.ndim == 2:
        return rows[:, :, None, None]
    return rows[:, :, None, :] if form == "signals" and rows.ndim == 3 else rows


def lines_on_form(source: Source, packing: DataConfig, shape: Sequence[int] | None) -> list[str]:
    """Lines on an array of rows [C, H, W] that were taken for grey images, and may be signals [C, L]."""
    if shape is None or packing.array_of is not None or not isinstance(source, HasForm):
        return []
    channels, height, width = shape
    if form_of_source(source) != "images" or channels != 1 or max(height, width) < _LONG * min(height, width):
        return []
    return [
        f"[N, {height}, {width}] was taken for grey images of {width}x{height}; for signals [N, C, L] say --array-of "
        "signals"
    ]


def written(form: Form, shape: Sequence[int]) -> str:
    """Form and shape of rows [C, H, W] in words: `3 x 32 x 32`, `signals of 2 x 128`, `vectors of 8`."""
    sides = " x ".join(map(str, own_shape(form, shape)))
    return sides if form == "images" else f"{form} of {sides}"
