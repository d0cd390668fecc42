"""PSNR: the peak signal-to-noise ratio of reconstructions."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.evaluation.reconstructing import mean_over_pairs

ROUNDING = 1.0 / (12.0 * 255.0**2)
"""Mean squared error that rounding to 8 bits leaves, for intensities in 0..1: 58.9 dB, also for equal images."""
_FLOAT_ROUNDING = 2.0**-48
"""The same for floating-point values, whose intensities are float32."""


def peak_signal_to_noise(images: Tensor, originals: Tensor, rounding: float = ROUNDING) -> Tensor:
    """10 log10(1 / mean squared error) of each image in dB, float64 [B]; for 8-bit images at most 58.9.

    Args:
        images: [B, C, H, W] in 0..255.
        originals: the same. The error is of intensities in 0..1, averaged over pixels and channels.
        rounding: least error, which rounding to the values of the data leaves.
    """
    errors = ((images.double() - originals.double()) / 255.0).square().flatten(1).mean(dim=1)
    return -10.0 * errors.clamp(min=rounding).log10()


def measure(context: Context) -> dict[str, Value]:
    """PSNR of the test images' reconstructions, whose peak is the range of the data's values."""
    scale = context.dataset.scale
    rounding = ROUNDING if scale.is_plain else scale.step**2 / 12.0 or _FLOAT_ROUNDING
    return {"psnr": mean_over_pairs(context, "psnr", partial(peak_signal_to_noise, rounding=rounding))}


register(
    Metric(
        name="psnr",
        label="PSNR",
        group="reconstruction",
        better="more",
        meaning="Peak signal-to-noise ratio of the reconstructions; the peak is the range of the data's values.",
        unit="dB",
        needs=("encoder",),
        measure=measure,
        stage="posterior",
    )
)
