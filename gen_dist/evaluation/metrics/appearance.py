"""What pixels alone tell of images: how sharp each is, and how different they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS_PER_CHUNK = 500
LARGEST_SIDE = 32
"""Larger images are reduced to this side, where classes and collapse still show, before their pixels are compared."""


def laplacian_variances(images: Tensor) -> Tensor:
    """Variance of the Laplacian of each image, which blur lowers (Pech-Pacheco et al. 2000): float64 [N].

    Args:
        images: uint8 [N, C, H, W], H and W at least 3. Channels are averaged, intensities are in 0..1, and the
            Laplacian (four neighbours less four times the middle) is taken where all neighbours are there.
    """
    grey = images.double().mean(dim=1) / 255.0
    middle = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (around - 4.0 * middle).flatten(1).var(dim=1, unbiased=False)


def pixel_points(images: Tensor, largest_side: int = LARGEST_SIDE) -> Tensor:
    """Images as points float32 [N, P], whose distances are roots of mean squared differences.

    Intensities are in 0..1, and so are distances.

    Args:
        images: uint8 [N, C, H, W].
        largest_side: sides of larger images are reduced to it.
    """
    intensities = images.to(torch.float32) / 255.0
    height, width = images.shape[2:]
    if max(height, width) > largest_side:
        sides = (min(height, largest_side), min(width, largest_side))
        intensities = functional.adaptive_avg_pool2d(intensities, sides)
    points = intensities.flatten(1)
    return points / points.shape[1] ** 0.5


def pair_distance_sum(points: Tensor, first: int, last: int) -> Tensor:
    """Sum of the distances of points[first:last] to all points [N, P]: float64 []."""
    # Around their mean, so that points that are nearly the same do not lose their difference in rounding.
    wide = points.double()
    wide = wide - wide.mean(dim=0)
    squares = wide.square().sum(dim=1)
    total = torch.zeros((), dtype=torch.float64, device=points.device)
    for start in range(first, last, ROWS_PER_CHUNK):
        end = min(start + ROWS_PER_CHUNK, last)
        sums = squares[start:end, None] + squares
        distances = torch.addmm(sums, wide[start:end], wide.T, alpha=-2.0).clamp_(min=0.0).sqrt_()
        places = torch.arange(end - start, device=points.device)
        distances[places, places + start] = 0.0  # rounding leaves a little of a point's distance to itself
        total += distances.sum()
    return total
