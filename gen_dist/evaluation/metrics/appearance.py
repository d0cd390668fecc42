"""Sharpness and diversity: metrics of pixels alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register

ROWS_PER_CHUNK = 500
NUMBERS_PER_PART = 2**24
"""Numbers in the images that are float32 at once."""
LARGEST_SIDE = 32
"""Side to which larger images are reduced before their pixels are compared. Classes and collapse still show at it."""


def laplacian_variances(images: Tensor) -> Tensor:
    """Variance of the Laplacian of each image, which blur lowers (Pech-Pacheco et al. 2000): float64 [N].

    Args:
        images: [N, C, H, W] in 0..255, H and W at least 3. Channels are averaged, intensities are in 0..1, and the
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
        images: [N, C, H, W] in 0..255.
        largest_side: sides of larger images are reduced to it.
    """
    height, width = images.shape[2:]
    sides = (min(height, largest_side), min(width, largest_side))

    def points_of(some: Tensor) -> Tensor:
        intensities = some.to(torch.float32) / 255.0
        if sides != (height, width):
            intensities = functional.adaptive_avg_pool2d(intensities, sides)
        points = intensities.flatten(1)
        return points / points.shape[1] ** 0.5

    return torch.cat([points_of(some) for some in images.split(max(1, NUMBERS_PER_PART // images[0].numel()))])


def pair_distance_sum(points: Tensor, first: int, last: int) -> Tensor:
    """Sum of the distances of points[first:last] to all points [N, P]: float64 []."""
    # Centred, because rounding would swallow the differences of nearly equal points.
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


def _mean_sharpness(context: Context, images: Tensor) -> Tensor:
    """Mean over images [N, C, H, W] of `laplacian_variances`: float64 []."""
    compute = lambda first, last: (laplacian_variances(images[first:last]),)  # noqa: E731
    return context.rows(len(images), "sharpness", compute)[0].mean()


def _mean_distance(context: Context, images: Tensor) -> Tensor:
    """Mean distance of two different images of a set [N, C, H, W]: float64 []."""
    points, count = pixel_points(images), len(images)
    return context.summed(pair_distance_sum(points, *context.share(count))) / (count * (count - 1))


def measure_sharpness(context: Context) -> dict[str, Value]:
    """Sharpness of the samples and of the test images."""
    of_data = context.reference("sharpness", lambda: _mean_sharpness(context, context.real.images))
    return {"sharpness": float(_mean_sharpness(context, context.sampled.images)), "sharpness_data": float(of_data)}


def measure_diversity(context: Context) -> dict[str, Value]:
    """Diversity of the samples and of the test images."""
    of_data = context.reference("diversity", lambda: _mean_distance(context, context.real.images))
    return {"diversity": float(_mean_distance(context, context.sampled.images)), "diversity_data": float(of_data)}


register(
    Metric(
        name="sharpness",
        label="sharpness",
        group="pixels",
        better="data",
        meaning="Variance of the Laplacian of the samples; blur lowers it, noise raises it.",
        needs=("samples", "test images", "images"),
        counts="samples",
        measure=measure_sharpness,
    )
)
register(
    Metric(
        name="diversity",
        label="diversity",
        group="pixels",
        better="data",
        meaning="Mean distance of two samples; near 0 where a generator has collapsed.",
        needs=("samples", "test images"),
        counts="samples",
        measure=measure_diversity,
    )
)
