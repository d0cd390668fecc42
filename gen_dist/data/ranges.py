"""Range of the values of packed images, measured as the config says.

Least and greatest values are those of all images. Percentiles are of the training images: exact for whole numbers, and
of a sample spread over them for floating point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.data import Form
from gen_dist.data.subsets import evenly_spaced
from gen_dist.data.values import PLAIN, ValueScale, format_number
from gen_dist.errors import DataError

_SHOWN_PERCENTILE = 0.5
_BYTES_AT_ONCE = 2**26
_SAMPLED = 2**22
"""Floating-point values that percentiles are taken of, about, and of all channels together: 100 channels take no more
memory than one."""
_LEAST_SAMPLED = 2**14
"""The same of one channel, at least."""
_LEAST_SAMPLED_OF_VECTORS = 2**10
"""The same of one number of vectors, which may have thousands."""
_SAMPLED_IMAGES = 1024
"""Images that a sample is spread over, where there are as many."""


class Measured(NamedTuple):
    """Range of a data set's values."""

    scale: ValueScale
    remarks: list[str]
    """Lines on the range, and on values that lie beyond it."""


def measured_scale(
    source: str, train: NDArray[Any], test: NDArray[Any], packing: DataConfig, form: Form = "images"
) -> Measured:
    """Measure the range of the values of a data set.

    Args:
        source: its name, for errors.
        train: training images [N, C, H, W].
        test: test images.
        packing: how the range is chosen.
        form: what the rows are.

    Raises:
        DataError: the range is that of the dtype, and floating-point values are beyond it.
    """
    dtype = str(train.dtype)
    if dtype == "uint8" and packing.value_range is None and form == "images":
        return Measured(PLAIN, [])
    if form == "vectors" and not packing.range_per_channel:  # one table for all numbers, not one for each
        train, test = (rows.reshape(len(rows), 1, 1, rows.shape[1]) for rows in (train, test))
    tables = [_Values(train, channel) for channel in range(train.shape[1])]
    least, greatest = (
        [min_or_max(found) for found in zip(*(ends(images) for images in (train, test) if images.size), strict=True)]
        for ends, min_or_max in ((_least, min), (_greatest, max))
    )
    lows, highs = _chosen(source, dtype, packing, tables, (least, greatest))
    if not packing.range_per_channel:
        lows, highs = [min(lows)], [max(highs)]
    # Equal values get a range. A part of large ones, since 1 would be lost in their rounding.
    highs = [high if high > low else low + max(1.0, 1e-6 * abs(low)) for low, high in zip(lows, highs, strict=True)]
    scale = ValueScale(dtype, tuple(lows), tuple(highs), form=form)
    if scale.is_plain:
        return Measured(scale, [])
    scale = replace(scale, shown=_shown(scale, tables))
    return Measured(scale, _remarks(scale, tables, (min(least), max(greatest))))


def _chosen(
    source: str,
    dtype: str,
    packing: DataConfig,
    tables: list[_Values],
    of_all: tuple[list[float], list[float]],
) -> tuple[list[float], list[float]]:
    """Least and greatest value of each channel's range."""
    channels = len(tables)
    if (given := packing.given_range) is not None:
        return [given[0]] * channels, [given[1]] * channels
    if packing.value_range == "dtype" or (dtype == "uint8" and packing.value_range is None):
        whole = np.dtype(dtype).kind in "iu"
        ends = (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)) if whole else (0.0, 1.0)
        low, high = min(of_all[0]), max(of_all[1])
        if low < ends[0] or high > ends[1]:
            raise DataError(
                f"{source}: values are {format_number(low)}..{format_number(high)}, beyond 0..1 of --value-range dtype "
                f"for {dtype}; use --value-range data, percentile:1 or LOW:HIGH"
            )
        return [ends[0]] * channels, [ends[1]] * channels
    if packing.percentile is None:
        return of_all
    tables = tables if packing.range_per_channel else [_merged(tables)]
    found = [[table.percentile(share) for table in tables] for share in (packing.percentile, 100 - packing.percentile)]
    return found[0], found[1]


class _Values:
    """Values of one channel of images, as sorted distinct values with their counts."""

    def __init__(self, images: NDArray[Any] | None, channel: int = 0) -> None:
        self.values = np.empty(0)
        self.counts = np.empty(0, np.int64)
        if images is None:
            return
        if images.dtype.kind in "iu":
            lowest = int(np.iinfo(images.dtype).min)
            counts = np.zeros(int(np.iinfo(images.dtype).max) - lowest + 1, np.int64)
            for part in _parts(images):
                counts += np.bincount(part[:, channel].ravel().astype(np.int64) - lowest, minlength=len(counts))
            present = np.flatnonzero(counts)
            self.values, self.counts = present.astype(np.float64) + lowest, counts[present]
            return
        if math.prod(images.shape[2:]) == 1:
            sample = _sampled_numbers(images, channel)
        else:
            sample = np.concatenate([image.ravel()[::stride] for image, stride in _sampled(images, channel)])
        self.values, self.counts = np.unique(sample.astype(np.float64), return_counts=True)

    def percentile(self, share: float) -> float:
        """The least value that at least `share` percent of all values do not exceed."""
        total = np.cumsum(self.counts)
        return float(self.values[min(np.searchsorted(total, share / 100 * total[-1]), len(total) - 1)])

    def outside(self, low: float, high: float) -> float:
        """Share of the values beyond a range."""
        beyond = (self.values < low) | (self.values > high)
        return float(self.counts[beyond].sum() / self.counts.sum())


def _sampled(images: NDArray[Any], channel: int) -> Iterator[tuple[NDArray[Any], int]]:
    """A channel [H, W] of images across all of them, and the stride at which its values are taken."""
    count, size = len(images), math.prod(images.shape[2:])
    most = max(_LEAST_SAMPLED, _SAMPLED // images.shape[1])
    rows = evenly_spaced(min(count, max(_SAMPLED_IMAGES, most // size)), count)
    stride = max(1, len(rows) * size // most)
    while math.gcd(stride, images.shape[3]) > 1:  # else the values of a few columns
        stride += 1
    return ((images[row, channel], stride) for row in rows)


def _sampled_numbers(vectors: NDArray[Any], place: int) -> NDArray[Any]:
    """One number of vectors [N, D, 1, 1] across all of them."""
    count = len(vectors)
    most = max(_LEAST_SAMPLED_OF_VECTORS, _SAMPLED // vectors.shape[1])
    return vectors[evenly_spaced(min(count, most), count), place, 0, 0]


def _merged(tables: list[_Values]) -> _Values:
    merged = _Values(None)
    merged.values, places = np.unique(np.concatenate([table.values for table in tables]), return_inverse=True)
    counts = np.concatenate([table.counts for table in tables])
    merged.counts = np.bincount(places.ravel(), counts).astype(np.int64)
    return merged


def _parts(images: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Some images at a time."""
    rows = max(1, _BYTES_AT_ONCE // max(1, images[:1].nbytes))
    return (images[first : first + rows] for first in range(0, len(images), rows))


def _least(images: NDArray[Any]) -> list[float]:
    return np.min([part.min(axis=(0, 2, 3)) for part in _parts(images)], axis=0).astype(float).tolist()


def _greatest(images: NDArray[Any]) -> list[float]:
    return np.max([part.max(axis=(0, 2, 3)) for part in _parts(images)], axis=0).astype(float).tolist()


def _shown(scale: ValueScale, tables: list[_Values]) -> tuple[float, float]:
    """Intensities that pictures show as black and white: percentiles of the training images."""
    ends = []
    for share, choose in ((_SHOWN_PERCENTILE, min), (100 - _SHOWN_PERCENTILE, max)):
        of_channels = [
            (table.percentile(share) - scale.low[place % len(scale.low)])
            / (scale.high[place % len(scale.low)] - scale.low[place % len(scale.low)])
            for place, table in enumerate(tables)
        ]
        ends.append(min(1.0, max(0.0, choose(of_channels))))
    return (ends[0], ends[1]) if ends[0] < ends[1] else (0.0, 1.0)


def _remarks(scale: ValueScale, tables: list[_Values], of_all: tuple[float, float]) -> list[str]:
    each = " of each channel" if len(scale.low) > 1 else ""
    remarks = [f"values {scale}{each} are the model's range; decoded images have them again"]
    outside = [
        table.outside(scale.low[place % len(scale.low)], scale.high[place % len(scale.low)])
        for place, table in enumerate(tables)
    ]
    share = sum(outside) / len(outside)
    # Test images, and those that a sample of floating-point values lacks, may have others.
    if share or of_all[0] < min(scale.low) or of_all[1] > max(scale.high):
        least, greatest = map(format_number, of_all)
        much = f"{share:.2%} of the" if share >= 5e-5 else "some"
        remarks.append(f"{much} values are beyond that range and are cut off: all are {least}..{greatest}")
    return remarks
