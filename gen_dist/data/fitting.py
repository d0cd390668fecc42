"""Size that images are brought to, and how those of other sizes and proportions get it."""

from __future__ import annotations

import collections
from typing import NamedTuple

from PIL import Image

from gen_dist.config import DataConfig, Fit
from gen_dist.errors import agreeing

PAPER = "white"
"""Colour beside padded images, and behind transparent ones."""
# Images are reduced in one cheap step to no less than this multiple of the target before the exact resize.
REDUCING_GAP = 3.0


class Fitting(NamedTuple):
    """Size of all images in pixels, and what is done to others."""

    width: int
    height: int
    fit: Fit = "crop"

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    def changes(self, size: tuple[int, int]) -> list[str]:
        """Changes that fitting makes to an image of this (width, height), as the ends of sentences about several."""
        width, height = size
        if size == (self.width, self.height):
            return []
        changes = [f"are resized to {self}"]
        if width * self.height != height * self.width:
            changes.append(_PROPORTIONS[self.fit])
        if (all if self.fit == "pad" else any)((width < self.width, height < self.height)):
            changes.append("are smaller than that and are enlarged")
        return changes


_PROPORTIONS = {
    "crop": "are cropped at their centre to its proportions",
    "pad": f"are padded with {PAPER} to its proportions",
    "stretch": "are stretched to its proportions",
}


def fitting_of(packing: DataConfig, default_size: int | None) -> Fitting | None:
    """Size that packing resizes images to. None leaves them as they are: then all must have one size.

    Args:
        packing: the config.
        default_size: side for sources of images that are not alike.
    """
    if packing.fit == "none":
        return None
    width, height = packing.size or (default_size, default_size)
    return None if width is None or height is None else Fitting(width, height, packing.fit)


def fitted(image: Image.Image, fitting: Fitting | None) -> Image.Image:
    """Image of mode L or RGB in the size of a fitting."""
    if fitting is None or image.size == fitting[:2]:
        return image
    target, (width, height) = fitting[:2], image.size
    if fitting.fit == "pad":
        scale = min(fitting.width / width, fitting.height / height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        canvas = Image.new(image.mode, target, PAPER)
        resized = image.resize(inner, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
        canvas.paste(resized, (round((fitting.width - inner[0]) / 2), round((fitting.height - inner[1]) / 2)))
        return canvas
    box_width: float = width
    box_height: float = height
    if fitting.fit == "crop":
        box_width = min(width, height * fitting.width / fitting.height)
        box_height = min(height, width * fitting.height / fitting.width)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize(target, Image.Resampling.BICUBIC, box=box, reducing_gap=REDUCING_GAP)


def line_on_changes(changes: collections.Counter[str]) -> list[str]:
    """A line that says how many images were resized, and how; none if all are as they were."""
    texts = [f"{count:,} {agreeing(count, change)}" for change, count in changes.most_common()]
    return ["; ".join(texts)] if texts else []
