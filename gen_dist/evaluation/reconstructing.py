"""Reconstructions of the test split, computed once for all metrics of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.objectives.phase import unit_interval


class Reconstructed(NamedTuple):
    """Latents and reconstructions of the test images. Every process has all rows."""

    means: Tensor
    """Posterior means, or the latents themselves, [N, *latent_shape]."""
    errors: Tensor
    """Squared errors summed over pixels, of intensities in 0..1, float64 [N]."""
    images: Tensor
    """Decoded from the means: [N, C, H, W] as `evaluation.context.Images` has them."""
    variances: Tensor
    """Posterior variance of each channel, averaged over places: float64 [N, C]. 0 without a posterior."""
    kl_nats: Tensor | None
    """KL divergence of each posterior from N(0, I), float64 [N]. None without a posterior."""


def reconstructed(context: Context) -> Reconstructed:
    """Encode and decode all test images."""
    objective = context.objective

    def compute(first: int, last: int) -> tuple[Tensor, ...]:
        images, labels = context.test_batch(first, last)[:2]
        means, logvars = objective.encode(images)
        intensities = objective.pixels(objective.decode(means, labels if objective.conditional else None))
        errors = (intensities.double() - unit_interval(images)).square().flatten(1).sum(dim=1)
        rounded = context.dataset.scale.rounded(intensities)
        if logvars is None:
            return means, errors, rounded, means.new_zeros(means.shape[:2], dtype=torch.float64)
        wide, logvars = means.double(), logvars.double()
        variances = logvars.exp().flatten(1).unflatten(1, (means.shape[1], -1)).mean(dim=2)
        kl_nats = 0.5 * (logvars.exp() + wide.square() - 1.0 - logvars).flatten(1).sum(dim=1)
        return means, errors, rounded, variances, kl_nats

    def measure() -> Reconstructed:
        columns = context.rows(len(context.dataset.test.images), "reconstructions", compute)
        means, errors, images, variances, *kl_nats = columns
        return Reconstructed(means, errors, images, variances, kl_nats[0] if kl_nats else None)

    return context.once("reconstructions", measure)


def mean_over_pairs(context: Context, what: str, value: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean over the test images of a function of (reconstructions, originals) to [B].

    Both are [B, C, H, W] in 0..255: uint8, or float32 for values other than 8-bit ones.
    """
    images = reconstructed(context).images

    def compute(first: int, last: int) -> tuple[Tensor]:
        return (value(images[first:last], context.test_batch(first, last).images).double(),)

    return float(context.rows(len(images), what, compute)[0].mean())
