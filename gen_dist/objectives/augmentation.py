"""Differentiable augmentation of what a discriminator sees (DiffAugment: Zhao et al. 2020), and noise on top of it.

Real and generated images are changed alike, and the generator's gradient passes through. Every number drawn is keyed by
(seed, stream, step, global row), so that an image is changed alike whatever rank or micro-batch holds it.

What is moved in or cut out is 0, mid-grey, as in the paper, and not the -1 of a black background. On black a shift or a
cut could not be told from a digit that stands off its centre or is drawn in part: the generator could learn to make
such images. On grey the discriminator sees what was done to an image, and judges the rest of it.

Noise (Soenderby et al. 2017; Arjovsky & Bottou 2017) hides what tells all real images from all
generated ones at a glance, such as a background of exactly one value: the discriminator has to look at the rest.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gen_dist.config import Augmentation
from gen_dist.kernels import Key, normal

DRAWS = 7
"""Numbers drawn for one image, whatever is done to it: leaving one kind out changes no other."""
TRANSLATION = 1 / 8
"""Furthest shift, in sides."""
CUTOUT = 1 / 2
"""Side of the square that is cut out, in sides; the part of it outside the image is lost."""


def augment(images: Tensor, kinds: Sequence[Augmentation], key: Key) -> Tensor:
    """Change colours, then shift, then cut a square out: those of `kinds`, always in this order.

    Args:
        images: float [B, C, H, W] in -1..1.
        kinds: what is done; nothing for none.
        key: key of images[0]; real and generated images need different streams.

    Returns:
        As `images`; changed colours may leave -1..1. Differentiable in the images any number of times.
    """
    if not kinds:
        return images
    brightness, saturation, contrast, *places = uniform(key, len(images), DRAWS).unbind(1)
    if "colour" in kinds:
        images = _change_colours(images, brightness, saturation, contrast)
    kept: Tensor | None = None
    if "translation" in kinds:
        images, kept = _translate(images, *places[:2])
    if "cutout" in kinds:
        outside = _outside_cut(images.shape[2:], *places[2:])
        kept = outside if kept is None else kept & outside
    return images if kept is None else images * kept


def add_noise(images: Tensor, deviation: float, key: Key) -> Tensor:
    """Add normal noise of a standard deviation to images [B, C, H, W]."""
    if not deviation:
        return images
    noise = normal(key, len(images), images[0].numel())
    return images.add(noise.view_as(images), alpha=deviation)


def uniform(key: Key, rows: int, width: int) -> Tensor:
    """Float32 [rows, width] in 0..1, both ends included, keyed as `normal` is: the normal CDF of normal draws."""
    return 0.5 + 0.5 * torch.erf(normal(key, rows, width) * math.sqrt(0.5))


def _integers(uniforms: Tensor, count: int) -> Tensor:
    """One of 0 .. count - 1 for each: int64 [B] of float [B]."""
    return (uniforms * count).to(torch.int64).clamp(max=count - 1)


def _change_colours(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness by -1/2..1/2, saturation times 0..2, contrast times 1/2..3/2, in one pass over the images.

    Saturation stretches each pixel from the mean of its channels, and contrast from the mean of the whole image, which
    saturation leaves as it is: so the three are one sum with a factor for each term.
    """
    brightness, saturation, contrast = (
        draw.to(images.dtype)[:, None, None, None] for draw in (brightness - 0.5, 2.0 * saturation, contrast + 0.5)
    )
    offset = images.mean(dim=(1, 2, 3), keepdim=True) * (1.0 - contrast) + brightness
    if images.shape[1] == 1:  # one channel has no saturation
        return torch.addcmul(offset, images, contrast)
    grey = images.mean(dim=1, keepdim=True)
    return torch.addcmul(offset + grey * ((1.0 - saturation) * contrast), images, saturation * contrast)


def _translate(images: Tensor, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Roll each image by a whole number of pixels; and where that moved nothing in from the other end: [B, 1, H, W].

    A roll is a permutation, so that its backward pass adds no two numbers: it is the same to the bit on any device.
    """
    batch, channels, height, width = images.shape
    from_row, row_is_inside = _shifted(down, height)
    from_column, column_is_inside = _shifted(right, width)
    source = (from_row[:, :, None] * width + from_column[:, None, :]).view(batch, 1, height * width)
    rolled = images.flatten(2).gather(2, source.expand(-1, channels, -1)).view(images.shape)
    return rolled, (row_is_inside[:, :, None] & column_is_inside[:, None, :]).unsqueeze(1)


def _shifted(uniforms: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """For each place along a side: the one that moves there, cyclically, and whether that crossed no end. [B, side]."""
    furthest = int(side * TRANSLATION + 0.5)
    shift = _integers(uniforms, 2 * furthest + 1) - furthest
    source = torch.arange(side, device=uniforms.device) - shift[:, None]
    return source % side, (source >= 0) & (source < side)


def _outside_cut(sides: Sequence[int], middle_row: Tensor, middle_column: Tensor) -> Tensor:
    """Where a rectangle of half the sides, with its middle anywhere in the image, is not: bool [B, 1, H, W]."""
    in_row, in_column = (
        _cut(uniforms, side) for uniforms, side in zip((middle_row, middle_column), sides, strict=True)
    )
    return ~(in_row[:, :, None] & in_column[:, None, :]).unsqueeze(1)


def _cut(uniforms: Tensor, side: int) -> Tensor:
    """Whether each place along a side is in the cut: bool [B, side]."""
    length = int(side * CUTOUT + 0.5)
    # A cut of even length has its middle between two pixels, of which a side has one more than pixels, ends included.
    first = _integers(uniforms, side + 1 - length % 2) - length // 2
    places = torch.arange(side, device=uniforms.device) - first[:, None]
    return (places >= 0) & (places < length)
