"""The latent step of a variational autoencoder: reparameterization and KL divergence (Kingma & Welling 2014)."""

import torch
from torch import Tensor

from kernels.noise import normal

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this range, so that one wild activation does not end a run. NaN passes through."""


def reparameterize_kl(
    parameters: Tensor, rng: Tensor, stream: int, first_row: int, *, samples: int = 1, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """Latents z = mean + exp(logvar / 2) * eps and KL(N(mean, exp(logvar)) || N(0, I)) (Kingma & Welling 2014, app. B).

    With logvar = log sigma^2 the standard deviation is exp(logvar / 2), not exp(logvar).

    Args:
        parameters: [B, 2D] or [B, 2C, ...], the encoder's output: means in the first half, log-variances in the second.
        rng: int64 [2], (seed, step), on the device of `parameters`.
        stream: stream of the noise.
        first_row: global row of parameters[0].
        samples: latents drawn per image.
        deterministic: give the mean and draw nothing.

    Returns:
        latents float32 [B * samples, D] or [B * samples, C, ...], the samples of one image in adjoining rows, and
        kl_nats float32 [B].
    """
    # The clamp's lower bound is below any logvar that float32 training reaches; it costs nothing against exp.
    mean, logvar = parameters.float().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    std = torch.exp(0.5 * logvar)
    kl_nats = 0.5 * (mean * mean + std * std - 1.0 - logvar).flatten(1).sum(1)
    if samples > 1:
        mean, std = mean.repeat_interleave(samples, dim=0), std.repeat_interleave(samples, dim=0)
    if deterministic:
        return mean, kl_nats
    width = mean[0].numel() * samples
    noise = normal(rng, stream, first_row, parameters.shape[0], width)
    return mean + std * noise.view(mean.shape), kl_nats
