"""Differentiable augmentation of a discriminator's input (DiffAugment: Zhao et al. 2020), and additive noise.

Real and generated images are augmented alike, and the generator's gradient passes through. Every draw is keyed by
(seed, stream, step, global row), so an image is augmented alike on any rank and in any micro-batch.

Pixels that are moved in or cut out are 0, mid-grey, as in the paper, and not the -1 of a black background. On black, a
shift or a cut would look like a digit that is off-centre or incomplete, and the generator could learn to make such
images. On grey the discriminator can detect the augmentation and score the rest of the image.

Noise (Soenderby et al. 2017; Arjovsky & Bottou 2017) hides features that separate all real images from all generated
ones trivially, such as a background of exactly one value.

Neither changes the images that a model learns to make; `gen_dist.data.augmenting` does.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gen_dist.config import Augmentation
from gen_dist.data.augmenting import integers
from gen_dist.kernels import Key, normal

DRAWS = 7
"""Numbers drawn per image, for any selection of kinds: leaving one kind out changes no other."""
TRANSLATION = 1 / 8
"""Largest shift, as a fraction of the side."""
CUTOUT = 1 / 2
"""Side of the square that is cut out, as a fraction of the image's side; the square may extend beyond the image."""


def augment(images: Tensor, kinds: Sequence[Augmentation], key: Key) -> Tensor:
    """Change colours, shift, and cut out a square: those of `kinds`, always in this order.

    Args:
        images: float [B, C, H, W] in -1..1.
        kinds: augmentations to apply; if empty, the images are returned as they are.
        key: key of images[0]; real and generated images need different streams.

    Returns:
        float [B, C, H, W]; changed colours may leave -1..1. Differentiable in the images any number of times.
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


def add_noise(images: Tensor, deviation: float | Tensor, key: Key) -> Tensor:
    """Add normal noise of a standard deviation to images [B, C, H, W].

    A scheduled deviation is a tensor [], whose value no branch may read: a recorded step is one for all values.
    """
    if not isinstance(deviation, Tensor) and not deviation:
        return images
    noise = normal(key, len(images), images[0].numel()).view_as(images)
    if isinstance(deviation, Tensor):
        return torch.addcmul(images, noise, deviation)
    return images.add(noise, alpha=deviation)


def uniform(key: Key, rows: int, width: int) -> Tensor:
    """Draw uniforms, float32 [rows, width] in [0, 1], keyed like `normal`: the normal CDF of normal draws."""
    return 0.5 + 0.5 * torch.erf(normal(key, rows, width) * math.sqrt(0.5))


def _change_colours(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Change brightness by -1/2..1/2, saturation by a factor 0..2 and contrast by 1/2..3/2, in one pass.

    Saturation scales each pixel's deviation from the mean of its channels, and contrast that from the mean of the whole
    image. Saturation does not change the latter mean, so the three are one sum with a factor for each term.
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
    """Roll each image by whole pixels, and mark the pixels that did not wrap around, bool [B, 1, H, W].

    A roll is a permutation, so its backward pass adds no two numbers and is equal to the bit on any device.
    """
    batch, channels, height, width = images.shape
    from_row, row_is_inside = _shifted(down, height)
    from_column, column_is_inside = _shifted(right, width)
    source = (from_row[:, :, None] * width + from_column[:, None, :]).view(batch, 1, height * width)
    rolled = images.flatten(2).gather(2, source.expand(-1, channels, -1)).view(images.shape)
    return rolled, (row_is_inside[:, :, None] & column_is_inside[:, None, :]).unsqueeze(1)


def _shifted(uniforms: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Source index of each place along a side, cyclic, and True where it did not wrap around: [B, side] each."""
    furthest = int(side * TRANSLATION + 0.5)
    shift = integers(uniforms, 2 * furthest + 1) - furthest
    source = torch.arange(side, device=uniforms.device) - shift[:, None]
    return source % side, (source >= 0) & (source < side)


def _outside_cut(sides: Sequence[int], middle_row: Tensor, middle_column: Tensor) -> Tensor:
    """Mask of the pixels outside a rectangle of half the sides, centred anywhere in the image: bool [B, 1, H, W]."""
    in_row, in_column = (
        _cut(uniforms, side) for uniforms, side in zip((middle_row, middle_column), sides, strict=True)
    )
    return ~(in_row[:, :, None] & in_column[:, None, :]).unsqueeze(1)


def _cut(uniforms: Tensor, side: int) -> Tensor:
    """True at the places along a side that are in the cut: bool [B, side]."""
    length = int(side * CUTOUT + 0.5)
    # The middle of a cut of even length lies between two pixels: side + 1 such places, ends included.
    first = integers(uniforms, side + 1 - length % 2) - length // 2
    places = torch.arange(side, device=uniforms.device) - first[:, None]
    return (places >= 0) & (places < length)
