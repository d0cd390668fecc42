"""A contact sheet: images of a source as training would see them, a row for each class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gen_dist.data.survey import Survey
from gen_dist.data.surveying import SHEET_COLUMNS
from gen_dist.data.values import PLAIN, ValueScale
from gen_dist.pictures.grids import PAPER, save_grid
from gen_dist.pictures.lettering import lettering_of
from gen_dist.pictures.plots import bar_of, tiles

_LONGEST_SIDE = 96


def save_contact_sheet(path: Path, survey: Survey) -> None:
    """Draw the images of a survey in a grid. Large ones are reduced, and rows of classes have their names.

    Args:
        path: the picture to write.
        survey: a survey with a sheet of at least one image.

    Raises:
        ConfigError: the file's name is of a format that is not written.
        OSError: the file cannot be written.
    """
    scale = _scale_of(survey)
    images = [_reduced(tiles(image[None], scale)[0]) for image in survey.sheet]
    if len(survey.class_names) == 1:
        save_grid(path, np.stack(images), SHEET_COLUMNS, bar=bar_of(scale))
        return
    shown = sorted(set(survey.sheet_labels))
    blank = np.full_like(images[0], PAPER)
    rows = []
    for label in shown:
        row = [image for image, of_class in zip(images, survey.sheet_labels, strict=True) if of_class == label]
        rows += [*row, *[blank] * (SHEET_COLUMNS - len(row))]
    names = lettering_of(survey.class_names).names
    captions = [names[label] for label in shown]
    save_grid(path, np.stack(rows), SHEET_COLUMNS, captions, bar=bar_of(scale))


def _scale_of(survey: Survey) -> ValueScale:
    """Scale from black to white: percentiles of the values on the sheet, but for 8-bit images."""
    if survey.values is None:
        return replace(PLAIN, form=survey.form)
    low, high = (float(end) for end in np.percentile(np.stack(survey.sheet), (0.5, 99.5)))
    return ValueScale(survey.dtype, (low,), (high if high > low else low + 1.0,), form=survey.form)


def _reduced(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image uint8 [C, H, W] whose longer side is at most that of a sheet."""
    channels, height, width = image.shape
    if max(height, width) <= _LONGEST_SIDE:
        return image
    scale = _LONGEST_SIDE / max(height, width)
    picture = Image.fromarray(image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    return np.asarray(small).reshape(small.height, small.width, channels).transpose(2, 0, 1)
