"""Random changes of training images, as a function of (seed, step, global row) on any device.

They make other images of the same distribution, so the model learns them as data. Not to be confused with a GAN's
augmentation (`gen_dist.objectives.augmentation`), which hides real and generated images alike from its discriminator.

Flips, shifts and turns move whole pixels. A crop is resized bilinearly and rounded to values that the data can have.
Arithmetic is per image, so its bits do not depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.config.augmentation import ImageChanges
from gen_dist.config.data import Form
from gen_dist.data.values import ValueScale
from gen_dist.errors import ConfigError

DRAWS = 7
"""Numbers drawn per image, for any selection of changes: leaving one out changes no other."""


def integers(uniforms: Tensor, count: int) -> Tensor:
    """Map uniforms [B] to integers 0 .. count - 1, int64 [B]."""
    return (uniforms * count).to(torch.int64).clamp(max=count - 1)


def refuse_bad_changes(changes: ImageChanges, image_shape: tuple[int, int, int], form: Form = "images") -> None:
    """Raise ConfigError if images of a shape (C, H, W) cannot be changed so, or rows are no images."""
    if form != "images" and changes != ImageChanges():
        raise ConfigError(f"augment is for images, and the data are {form}; leave it out")
    _, height, width = image_shape
    if changes.rotate90 and height != width:
        raise ConfigError(
            f"augment rotate90 turns images by 90 degrees, and these are {width}x{height}: leave it out, or give a "
            "square --image-size"
        )
    if changes.shift >= min(height, width):
        most = min(height, width) // 2
        raise ConfigError(
            f"augment shift:{changes.shift} moves images of {width}x{height} out of themselves; "
            + (f"use at most shift:{most}" if most else "leave it out")
        )


def augmented(images: Tensor, changes: ImageChanges, scale: ValueScale, draws: Tensor) -> Tensor:
    """Crop, shift, mirror and turn images, in this order, each as it draws.

    Args:
        images: [B, C, H, W] in 0..255 as `Batch` has them: uint8, or float32 for values other than 8-bit ones.
        changes: what may happen to them.
        scale: values that the data can have.
        draws: uniforms float32 [B, DRAWS] in [0, 1], keyed by the row of each image.

    Returns:
        Images of the same shape and dtype.
    """
    size, top, left, down, right, mirror, turns = draws.unbind(1)
    if changes.crop < 1.0:
        images = _cropped(images, changes.crop + (1.0 - changes.crop) * size, top, left, scale)
    if changes == ImageChanges(crop=changes.crop):
        return images
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)[None, :, None].expand(len(images), height, width)
    columns = torch.arange(width, device=images.device)[None, None, :].expand(len(images), height, width)
    # From the place of a pixel in the result back to its place in the image: the last change first.
    if changes.rotate90:
        rows, columns = _turned(rows, columns, integers(turns, 4)[:, None, None], height)
    if changes.flip:
        columns = torch.where(mirror[:, None, None] < 0.5, width - 1 - columns, columns)
    if changes.shift:
        most = changes.shift
        rows = (rows - (integers(down, 2 * most + 1) - most)[:, None, None]).clamp(0, height - 1)
        columns = (columns - (integers(right, 2 * most + 1) - most)[:, None, None]).clamp(0, width - 1)
    places = (rows * width + columns).view(len(images), 1, -1).expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, places).view(images.shape)


def _turned(rows: Tensor, columns: Tensor, turns: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Places before a square was turned counterclockwise `turns` times."""
    last = side - 1
    before = ((columns, last - rows), (last - rows, last - columns), (last - columns, rows))
    found = rows, columns
    for turn, (of_rows, of_columns) in enumerate(before, start=1):
        found = torch.where(turns == turn, of_rows, found[0]), torch.where(turns == turn, of_columns, found[1])
    return found


def _cropped(images: Tensor, share: Tensor, top: Tensor, left: Tensor, scale: ValueScale) -> Tensor:
    """Parts with a share of both sides, resized to the whole: bilinear, between the pixels' middles."""
    height, width = images.shape[2:]
    found = _resampled(images.float(), share, top, height, 2)
    found = _resampled(found, share, left, width, 3)
    if images.dtype == torch.uint8:
        return found.round().clamp(0, 255).to(torch.uint8)
    return scale.rounded(found / 255.0) if scale.is_whole else found


def _resampled(images: Tensor, share: Tensor, start: Tensor, side: int, axis: int) -> Tensor:
    """Stretch a part of an axis, [B], over its whole length. `start` in 0..1 is its place among all possible ones."""
    length = share * side
    first = start * (side - length)
    middles = (torch.arange(side, device=images.device) + 0.5)[None, :]
    places = (first[:, None] + middles * share[:, None] - 0.5).clamp(0, side - 1)
    before = places.floor().clamp(max=max(side - 2, 0))
    weight = places - before
    shape = [len(images), 1, 1, 1]
    shape[axis] = side
    index, after = (
        one.to(torch.int64).view(shape).expand(images.shape) for one in (before, (before + 1).clamp(max=side - 1))
    )
    weight = weight.view(shape)
    return images.gather(axis, index) * (1.0 - weight) + images.gather(axis, after) * weight
