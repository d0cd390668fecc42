"""Augmentations of a discriminator's input that are each made with a probability (Karras et al. 2020a, appendix B).

As long as the probability is below one, images that are not augmented remain the most frequent ones, and the generator
learns those (section 2.2). Every draw is keyed by (seed, stream, step, global row), as in `augmentation`.

Geometry is one affine map, of which the inverse says where each pixel comes from; images continue beyond their borders
by reflection. Pixels are interpolated between their four neighbours, without the wavelet filters of the paper, which
need up to 36 times the pixels. It has derivatives of any order, which add in one order on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from gen_dist.config import RandomAugmentation
from gen_dist.config.objectives import COLOUR_TRANSFORMATIONS, transformations
from gen_dist.data.augmenting import integers
from gen_dist.kernels import Key, normal, pixels_at

GATES, UNIFORMS, NORMALS = 14, 10, 7
DRAWS = GATES + UNIFORMS + NORMALS
"""Numbers drawn per image, for any selection of kinds: leaving one out changes no other."""
SHIFT = 0.125
"""Largest shift by whole pixels, and standard deviation of one by fractions, relative to the side."""
SCALE = 0.2
"""Standard deviation of the binary logarithm of a scale, and that of the brightness."""
CONTRAST = 0.5
"""Standard deviation of the binary logarithm of the contrast; that of the saturation is 1."""
CUTOUT = 0.5
"""Side of the square that is cut out, relative to that of the image."""


def randomly_augment(
    images: Tensor, kinds: Sequence[RandomAugmentation], probability: Tensor, key: Key, colour_factor: float = 1.0
) -> Tensor:
    """Augment images: blits and geometry, colours, then a square is cut out.

    Args:
        images: float32 [B, C, H, W] in -1..1.
        kinds: transformations to make, and groups of them.
        probability: float32 [], that of each transformation by itself.
        key: key of images[0]; real and generated images need different streams.
        colour_factor: factor of the probability for changes of colour.

    Returns:
        float32 [B, C, H, W]; changed colours may leave -1..1. Differentiable in the images any number of times.
    """
    draws = normal(key, len(images), DRAWS).to(images.dtype)
    uniforms = 0.5 + 0.5 * torch.erf(draws[:, : GATES + UNIFORMS] * math.sqrt(0.5))
    gates = uniforms[:, :GATES].unbind(1)
    given, normals = uniforms[:, GATES:].unbind(1), draws[:, GATES + UNIFORMS :].unbind(1)
    probability = probability.to(images.dtype)
    made = transformations(kinds)
    # Half precision would round the places of pixels.
    with torch.autocast(images.device.type, enabled=False):
        inverses = [
            *_blits(made, gates[:3], given[:4], probability, images.shape[2:]),
            *_geometry(made, gates[3:8], given[4:6], normals[:4], probability, images.shape[2:]),
        ]
        if inverses:
            images = _moved(images, _composed(inverses))
        if made & COLOUR_TRANSFORMATIONS:
            images = _recoloured(made, images, gates[8:13], given[6:8], normals[4:], probability * colour_factor)
        if "cutout" in made:
            images = images * _outside_cut(images, gates[13] < probability, given[8:])
    return images


def _blits(
    made: AbstractSet[str],
    gates: tuple[Tensor, ...],
    given: tuple[Tensor, ...],
    probability: Tensor,
    sides: torch.Size,
) -> list[Tensor]:
    """Inverse maps of a reflection, of a turn by a multiple of 90 degrees, and of a shift by whole pixels: of each that
    is in `made`.
    """
    found = []
    if "mirror" in made:
        mirror = torch.where(gates[0] < probability, integers(given[0], 2), 0)
        found.append(_scaling(1 - 2 * mirror, 1, like=gates[0]))
    if "turn" in made:
        turns = torch.where(gates[1] < probability, integers(given[1], 4), 0)
        # Cosine and sine of whole turns are whole, so that a turn moves pixels and blends none.
        found.append(_rotation((turns - 2).abs() - 1, 1 - (turns - 1).abs(), like=gates[1]))
    if "shift" in made:
        right, down = (
            torch.where(gates[2] < probability, torch.round((2.0 * one - 1.0) * SHIFT * side), 0.0)
            for one, side in zip(given[2:], (sides[1], sides[0]), strict=True)
        )
        found.append(_translation(-right, -down))
    return found


def _geometry(
    made: AbstractSet[str],
    gates: tuple[Tensor, ...],
    given: tuple[Tensor, ...],
    normals: tuple[Tensor, ...],
    probability: Tensor,
    sides: torch.Size,
) -> list[Tensor]:
    """Inverse maps of a scale, of a stretch between two rotations, and of a shift by fractions of pixels: of each that
    is in `made`.
    """
    # The probability that at least one of the two rotations is made is that of the others.
    of_rotation = 1.0 - (1.0 - probability).clamp(0.0, 1.0).sqrt()

    def factor(place: int) -> Tensor:
        return torch.where(gates[2 * place] < probability, torch.exp2(SCALE * normals[place]), 1.0)

    def rotation(place: int) -> Tensor:
        angle = torch.where(gates[2 * place + 1] < of_rotation, (2.0 * given[place] - 1.0) * math.pi, 0.0)
        return _rotation(angle.cos(), angle.sin(), like=angle)

    found = []
    if "scale" in made:
        inverse = 1.0 / factor(0)
        found.append(_scaling(inverse, inverse, like=inverse))
    if "rotation" in made:
        found.append(rotation(0))
    if "stretch" in made:
        stretch = factor(1)
        found.append(_scaling(1.0 / stretch, stretch, like=stretch))
    if "rotation" in made:
        found.append(rotation(1))
    if "drift" in made:
        right, down = (
            torch.where(gates[4] < probability, SHIFT * one * side, 0.0)
            for one, side in zip(normals[2:], (sides[1], sides[0]), strict=True)
        )
        found.append(_translation(-right, -down))
    return found


def _matrix(rows: tuple[tuple[Tensor | float, ...], ...], like: Tensor) -> Tensor:
    """Matrices [B, 3, 3] of homogeneous coordinates, from two rows of numbers [B]; the third is 0 0 1."""
    entries = [
        (one if isinstance(one, Tensor) else torch.full_like(like, one)).to(like.dtype)
        for row in (*rows, (0.0, 0.0, 1.0))
        for one in row
    ]
    return torch.stack(entries, dim=1).view(-1, 3, 3)


def _scaling(x: Tensor | float, y: Tensor | float, like: Tensor) -> Tensor:
    return _matrix(((x, 0.0, 0.0), (0.0, y, 0.0)), like)


def _rotation(cosine: Tensor, sine: Tensor, like: Tensor) -> Tensor:
    return _matrix(((cosine, -sine, 0.0), (sine, cosine, 0.0)), like)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix(((1.0, 0.0, x), (0.0, 1.0, y)), x)


def _composed(matrices: list[Tensor]) -> Tensor:
    """Product of matrices [B, 3, 3], by sums: reduced precision of matrix products would round places of pixels."""
    product = matrices[0]
    for matrix in matrices[1:]:
        product = (product[:, :, :, None] * matrix[:, None, :, :]).sum(dim=2)
    return product


def _moved(images: Tensor, inverse: Tensor) -> Tensor:
    """Images whose pixel at (x, y), from the middle, comes from inverse (x, y, 1): [B, C, H, W]."""
    _, _, height, width = images.shape
    x, y = (torch.arange(side, device=images.device, dtype=images.dtype) - (side - 1) / 2 for side in (width, height))
    entries = inverse[:, :2, :, None, None]
    from_x, from_y = (
        (entries[:, row, 0] * x + entries[:, row, 1] * y[:, None] + entries[:, row, 2] + (side - 1) / 2).flatten(1)
        for row, side in enumerate((width, height))
    )
    left, right, in_x = _neighbours(from_x, width)
    above, below, in_y = _neighbours(from_y, height)
    places = torch.cat(
        [above * width + left, above * width + right, below * width + left, below * width + right], dim=1
    )
    corners = pixels_at(images.flatten(2), places).unflatten(2, (4, height * width))
    in_x, in_y = in_x[:, None], in_y[:, None]
    upper = torch.lerp(corners[:, :, 0], corners[:, :, 1], in_x)
    lower = torch.lerp(corners[:, :, 2], corners[:, :, 3], in_x)
    return torch.lerp(upper, lower, in_y).view(images.shape)


def _neighbours(places: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels before and after places [B, N] along a side, int64 [B, N], and the share of the one after, [B, N].

    Beyond the first pixel and the last the image is reflected there.
    """
    last = side - 1
    inside = last - (torch.remainder(places, 2 * last) - last).abs() if last else torch.zeros_like(places)
    before = inside.floor().clamp(0, max(0, last - 1))
    return before.to(torch.int64), (before + 1).clamp(max=last).to(torch.int64), inside - before


def _recoloured(
    made: AbstractSet[str],
    images: Tensor,
    gates: tuple[Tensor, ...],
    given: tuple[Tensor, ...],
    normals: tuple[Tensor, ...],
    probability: Tensor,
) -> Tensor:
    """Change brightness and contrast, negate the luma, and turn and scale colours around it: each that is in `made`.

    The paper multiplies matrices of colours. They turn and scale around the grey axis alone, so the mean of the three
    channels and their deviations from it are changed each by itself.
    """
    never = torch.zeros_like(probability)

    def of(name: str) -> Tensor:
        return probability if name in made else never

    brightness, contrast, saturation = (
        torch.where(gate < of(name), change, neutral)[:, None, None, None]
        for name, gate, change, neutral in (
            ("brightness", gates[0], SCALE * normals[0], 0.0),
            ("contrast", gates[1], torch.exp2(CONTRAST * normals[1]), 1.0),
            ("saturation", gates[4], torch.exp2(normals[2]), 1.0),
        )
    )
    negated = torch.where(gates[2] < of("negative"), integers(given[0], 2), 0)[:, None, None, None]
    hue = torch.where(gates[3] < of("hue"), (2.0 * given[1] - 1.0) * math.pi, 0.0)[:, None, None, None]
    images = (images + brightness) * contrast
    luma = images.mean(dim=1, keepdim=True)
    sign = (1 - 2 * negated).to(images.dtype)
    if images.shape[1] == 1:  # grey has neither hue nor saturation
        return luma * sign
    colours = images - luma
    # Cross product with the unit vector of the grey axis.
    turned = (colours.roll(1, dims=1) - colours.roll(2, dims=1)) / math.sqrt(3.0)
    return luma * sign + saturation * (hue.cos() * colours + hue.sin() * turned)


def _outside_cut(images: Tensor, cut: Tensor, middles: tuple[Tensor, ...]) -> Tensor:
    """Mask of the pixels outside a square around a point of the image, bool [B, 1, H, W]; all where `cut` is False."""
    in_column, in_row = (
        ((torch.arange(side, device=images.device) + 0.5) / side - middle[:, None]).abs() < CUTOUT / 2
        for side, middle in zip((images.shape[3], images.shape[2]), middles, strict=True)
    )
    return ~(in_row[:, None, :, None] & in_column[:, None, None, :] & cut[:, None, None, None])
