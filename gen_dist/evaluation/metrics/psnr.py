"""PSNR: the peak signal-to-noise ratio of reconstructions."""

from __future__ import annotations

from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.evaluation.reconstructing import mean_over_pairs

ROUNDING = 1.0 / (12.0 * 255.0**2)
"""Mean squared error that rounding to 8 bits leaves, for intensities in 0..1: 58.9 dB, also for equal images."""


def peak_signal_to_noise(images: Tensor, originals: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) of each image in dB, float64 [B], at most 58.9.

    Args:
        images: uint8 [B, C, H, W].
        originals: the same. The error is of intensities in 0..1, averaged over pixels and channels.
    """
    errors = ((images.double() - originals.double()) / 255.0).square().flatten(1).mean(dim=1)
    return -10.0 * errors.clamp(min=ROUNDING).log10()


def measure(context: Context) -> dict[str, Value]:
    """PSNR of the test images' reconstructions."""
    return {"psnr": mean_over_pairs(context, "psnr", peak_signal_to_noise)}


register(
    Metric(
        name="psnr",
        label="PSNR",
        group="reconstruction",
        better="more",
        meaning="Peak signal-to-noise ratio of the reconstructions, 8 bits a pixel, mean over test images.",
        unit="dB",
        needs=("encoder",),
        measure=measure,
        stage="posterior",
    )
)
