"""SSIM: structural similarity of images and their reconstructions (Wang et al. 2004)."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, UnavailableError, Value, register
from gen_dist.evaluation.reconstructing import mean_over_pairs

WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
"""Constants of the paper's section III.B for intensities in 0..1."""
PIXELS_PER_PART = 2**20
"""Pixels at once: ten times as many float64 are in memory."""


def structural_similarity(images: Tensor, originals: Tensor) -> Tensor:
    """Mean SSIM of each image over channels and over all places whose 11 x 11 window lies inside: float64 [B].

    Wang et al. 2004, eq. 13, with Gaussian windows of standard deviation 1.5.

    Args:
        images: [B, C, H, W] in 0..255, H and W at least 11.
        originals: the same.
    """
    at_once = max(1, PIXELS_PER_PART // images[0].numel())
    parts = zip(images.split(at_once), originals.split(at_once), strict=True)
    return torch.cat([_similarity(one.double() / 255.0, other.double() / 255.0) for one, other in parts])


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x * mean_x
    variance_y = _windowed(y * y) - mean_y * mean_y
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2.0 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    structure = (2.0 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _windowed(maps: Tensor) -> Tensor:
    """Weighted mean of each window of maps float64 [B, C, H, W]: [B, C, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2.0 * SIGMA**2))
    weights = weights / weights.sum()
    for axis in (2, 3):
        places = maps.shape[axis] - WINDOW + 1
        total = maps.new_zeros(())
        for at, weight in enumerate(weights.tolist()):
            total = total + weight * maps.narrow(axis, at, places)
        maps = total
    return maps


def measure(context: Context) -> dict[str, Value]:
    """SSIM of the test images and their reconstructions."""
    height, width = context.dataset.image_shape[1:]
    if min(height, width) < WINDOW:
        raise UnavailableError(f"its windows are {WINDOW} x {WINDOW}, the images {height} x {width}")
    return {"ssim": mean_over_pairs(context, "ssim", structural_similarity)}


register(
    Metric(
        name="ssim",
        label="SSIM",
        group="reconstruction",
        better="more",
        meaning="Structural similarity of test images and reconstructions: 1 for equal ones.",
        needs=("encoder", "images"),
        measure=measure,
        stage="posterior",
    )
)
