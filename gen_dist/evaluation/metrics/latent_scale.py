"""Scale of latents over the data: mean and standard deviation of each channel, and the factor of latent models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, UnavailableError, Value, register
from gen_dist.evaluation.reconstructing import reconstructed


class Scale(NamedTuple):
    """Moments of the latents that are drawn from the posteriors of a set of images."""

    means: Tensor
    """float64 [C]."""
    deviations: Tensor
    """Standard deviations float64 [C]: over images, places and draws."""
    deviation: float
    """Standard deviation over all latents of all channels."""


def latent_scale(means: Tensor, variances: Tensor) -> Scale:
    """Moments of latents by the law of total variance, so that nothing is drawn.

    Args:
        means: posterior means [N, C] or [N, C, h, w].
        variances: posterior variances, averaged over places, float64 [N, C]; 0 without a posterior.
    """
    channels = means.double().transpose(0, 1).flatten(1)
    of_channels = channels.mean(dim=1)
    squares = channels.square().mean(dim=1) + variances.mean(dim=0)
    deviation = (squares.mean() - of_channels.mean().square()).clamp(min=0.0).sqrt()
    return Scale(of_channels, (squares - of_channels.square()).clamp(min=0.0).sqrt(), float(deviation))


def _scale(context: Context) -> Scale:
    def compute() -> Scale:
        found = reconstructed(context)
        return latent_scale(found.means, found.variances)

    return context.once("scale of latents", compute)


def measure_means(context: Context) -> dict[str, Value]:
    """Mean of each channel over the test images."""
    return {"latent_mean": _scale(context).means.tolist()}


def measure_deviations(context: Context) -> dict[str, Value]:
    """Standard deviation of each channel over the test images."""
    return {"latent_std": _scale(context).deviations.tolist()}


def measure_factor(context: Context) -> dict[str, Value]:
    """1 / standard deviation over all latents of the test images (Rombach et al. 2022, appendix G)."""
    deviation = _scale(context).deviation
    if not deviation > torch.finfo(torch.float32).eps:
        raise UnavailableError("the latents do not vary")
    return {"scaling_factor": 1.0 / deviation}


register(
    Metric(
        name="latent_mean",
        label="mean of the latents",
        group="latents",
        better=None,
        meaning="Mean of each channel of the latents over the test images.",
        needs=("encoder",),
        measure=measure_means,
        stage="posterior",
    )
)
register(
    Metric(
        name="latent_std",
        label="standard deviation of the latents",
        group="latents",
        better=None,
        meaning="Standard deviation of each channel of the latents over the test images.",
        needs=("encoder",),
        measure=measure_deviations,
        stage="posterior",
    )
)
register(
    Metric(
        name="scaling_factor",
        label="scaling factor",
        group="latents",
        better=None,
        meaning="Factor that gives all latents a standard deviation of 1, as latent models want them.",
        needs=("encoder",),
        measure=measure_factor,
        stage="posterior",
    )
)
