"""Data as tiles of pictures: images as they are, signals as lines, and vectors as bars or a line.

Plots are small pictures, so that grids of samples, pairs, walks and contact sheets hold them as they hold images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gen_dist.data.forms import as_held
from gen_dist.data.values import ValueScale
from gen_dist.pictures.figures import CLASS_COLOURS
from gen_dist.pictures.grids import Bar, Images

TILE = 56, 88
"""Height and width of a plot in pixels."""
MOST_BARS = 32
"""Numbers of vectors that are drawn as bars; more are a line."""
_FINER = 2
"""Factor of both sides while lines are drawn; reduced by it, they are smooth."""
_PAPER, _PALE = (248, 248, 248), (185, 185, 185)
_EDGE = (215, 215, 215)
"""Left edge of a plot: those of a pair or a walk have no gap between them."""
_ROWS_AT_ONCE = 64


def tiles(values: NDArray[Any], scale: ValueScale, under: NDArray[Any] | None = None) -> Images:
    """Values as tiles of a picture, uint8 [N, 1 or 3, H, W].

    Args:
        values: images [N, C, H, W], signals [N, C, L] or [N, C, 1, L], or vectors [N, D] or [N, D, 1, 1].
        scale: their values, and the range of them that is shown.
        under: values of the same shape that plots are drawn over, in grey.
    """
    if scale.form == "images":
        return scale.eight_bit(values)
    parts = []
    for first in range(0, len(values), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        parts.append(_plots(values[some], scale, None if under is None else under[some]))
    return np.concatenate(parts)


def bar_of(scale: ValueScale, *, pairs: bool = False) -> Bar | None:
    """Values of black and white; for plots, a line on their range. None for 8-bit images, which need neither."""
    if scale.form == "images":
        return scale.shown_values
    low, high = scale.shown_values or ("", "")
    return f"each plot is from {low} to {high}" + (", a reconstruction over its original in grey" if pairs else "")


def _plots(values: NDArray[Any], scale: ValueScale, under: NDArray[Any] | None) -> Images:
    height, width = TILE[0] * _FINER, TILE[1] * _FINER
    canvas = np.empty((len(values), height, width, 3), np.uint8)
    canvas[:] = _PAPER
    canvas[:, :, :_FINER] = _EDGE
    if under is not None:
        for mask in _masks(under, scale, height, width):
            canvas[mask] = _PALE
    for place, mask in enumerate(_masks(values, scale, height, width)):
        canvas[mask] = _rgb(CLASS_COLOURS[place % len(CLASS_COLOURS)])
    finer = canvas.reshape(len(values), TILE[0], _FINER, TILE[1], _FINER, 3)
    return np.rint(finer.mean(axis=(2, 4))).astype(np.uint8).transpose(0, 3, 1, 2)


def _masks(values: NDArray[Any], scale: ValueScale, height: int, width: int) -> list[NDArray[np.bool_]]:
    """Places of the ink of each line, bool [N, height, width]: one for each channel of signals."""
    held = np.ascontiguousarray(as_held(scale.form, values))
    intensities = scale.for_model(torch.from_numpy(held)).double().numpy() / 255.0
    dark, bright = scale.shown
    shares = ((intensities - dark) / (bright - dark)).clip(0.0, 1.0)
    if scale.form == "signals":
        return [_between(*_line(shares[:, channel, 0], width), height) for channel in range(held.shape[1])]
    shares = shares.reshape(len(held), -1)
    if shares.shape[1] > MOST_BARS:
        return [_between(*_line(shares, width), height)]
    zeros = (-np.array(scale.low)) / (np.array(scale.high) - np.array(scale.low))
    zeros = ((zeros - dark) / (bright - dark)).clip(0.0, 1.0)
    return [_between(*_bars(shares, np.broadcast_to(zeros, shares.shape), width), height)]


Span = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Lowest and highest ink of each column, [N, width] in 0..1; NaN where there is none."""


def _line(shares: NDArray[np.float64], width: int) -> Span:
    """Line through values [N, L] in 0..1: of many, the least and greatest in each column."""
    length = shares.shape[1]
    if length < width:
        places = np.linspace(0.0, length - 1.0, width)
        before = np.minimum(places.astype(int), max(length - 2, 0))
        after = np.minimum(before + 1, length - 1)
        low = high = shares[:, before] + (places - before) * (shares[:, after] - shares[:, before])
    else:
        starts = np.arange(width) * length // width
        low, high = (reduce.reduceat(shares, starts, axis=1) for reduce in (np.minimum, np.maximum))
    # Columns without a common height meet half way, so that the line has no gaps.
    rise, fall = (low[:, 1:] + high[:, :-1]) / 2, (high[:, 1:] + low[:, :-1]) / 2
    low, high = low.copy(), high.copy()
    high[:, :-1], low[:, 1:] = np.maximum(high[:, :-1], rise), np.minimum(low[:, 1:], rise)
    low[:, :-1], high[:, 1:] = np.minimum(low[:, :-1], fall), np.maximum(high[:, 1:], fall)
    return low, high


def _bars(shares: NDArray[np.float64], zeros: NDArray[np.float64], width: int) -> Span:
    """Bars from zero to values [N, D], with a little space between them."""
    places = np.arange(width) * shares.shape[1] / width
    which = places.astype(int)
    ends = np.stack([shares[:, which], zeros[:, which]])
    ends[:, :, places - which < 0.15] = np.nan
    return ends.min(axis=0), ends.max(axis=0)


def _between(low: NDArray[np.float64], high: NDArray[np.float64], height: int) -> NDArray[np.bool_]:
    rows = np.arange(height)[None, :, None]
    top, bottom = (((1.0 - ends) * (height - 1))[:, None, :] for ends in (high, low))
    mask: NDArray[np.bool_] = (rows >= top - 1.0) & (rows <= bottom + 1.0)
    return mask


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
