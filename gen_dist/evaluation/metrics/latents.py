"""Of latent spaces: which latents are used, and what a likelihood is in bits."""

from __future__ import annotations

import math

from torch import Tensor

LEAST_ACTIVITY = 0.01


def active_units(posterior_means: Tensor) -> int:
    """Latents whose posterior mean, [N, D], varies by more than 0.01 over the data (Burda et al. 2016, section 5.2)."""
    return int((posterior_means.double().var(dim=0) > LEAST_ACTIVITY).sum())


def bits_per_dimension(nll_nats: float, image_shape: tuple[int, int, int]) -> float:
    """A negative log-likelihood in nats per image as bits per pixel and channel, for discrete pixels."""
    return nll_nats / (math.log(2.0) * math.prod(image_shape))
