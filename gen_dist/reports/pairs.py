"""Originals, reconstructions and their difference, cut from the newest picture of a run's reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gen_dist.data.values import scale_of_json
from gen_dist.pictures.grids import mosaic, split_pairs
from gen_dist.reports.run_record import RunRecord
from gen_dist.reports.thumbnails import SHOWN_PIXELS, data_uris, read_picture

PAIR_PICTURES = 3
MOST_COLUMNS = 8
MOST_FACTOR = 16


@dataclass(frozen=True)
class Pairs:
    """Three pictures of the same test images."""

    step: int
    panes: Mapping[str, str]
    """Pictures as data URIs by what they show, in the order of the slider."""


def newest_pairs(run: RunRecord, page_pictures: int) -> Pairs | None:
    """The three pictures of the newest step. None if there is no picture of reconstructions, or one of another layout,
    or of plots.

    Raises:
        CheckpointError: the picture is damaged.
    """
    pictures = run.pictures_by_step("reconstructions")
    scale = scale_of_json(run.state.get("values"))
    if not pictures or scale.form != "images":  # the difference of two plots says nothing
        return None
    step = max(pictures)
    picture = np.asarray(read_picture(pictures[step]))
    channels, height, width = run.state["image_shape"]
    shape = (channels, height, width) if channels in (1, 3) else (1, height, channels * width)  # side by side
    has_bar = scale.shown_values is not None
    found = split_pairs(picture if picture.ndim == 3 else picture[:, :, None], shape, has_bar=has_bar)
    if found is None:
        return None
    originals, reconstructions = found
    columns = max(1, min(MOST_COLUMNS, SHOWN_PIXELS // shape[2]))
    shown = slice(columns * max(1, min(MOST_COLUMNS, SHOWN_PIXELS // shape[1])))
    difference, factor = visible_difference(originals[shown], reconstructions[shown])
    times = f", {factor} times" if factor > 1 else ""
    labels = ("originals", "reconstructions", f"difference{times}")
    images = [_grid(some, columns) for some in (originals[shown], reconstructions[shown], difference)]
    return Pairs(step, dict(zip(labels, data_uris(images, page_pictures), strict=True)))


def visible_difference(originals: NDArray[np.uint8], others: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """Absolute difference of images, times the whole factor that brings all but its largest 0.5 % to 255 or less."""
    difference = np.abs(originals.astype(np.int16) - others)
    factor = int(max(1, min(MOST_FACTOR, 255 // max(1.0, float(np.quantile(difference, 0.995))))))
    return (difference * factor).clip(0, 255).astype(np.uint8), factor


def _grid(images: NDArray[np.uint8], columns: int) -> Image.Image:
    canvas: NDArray[Any] = mosaic(images, [1] * min(columns, len(images)), 1, 1)
    return Image.fromarray(canvas[:, :, 0] if canvas.shape[2] == 1 else canvas)
