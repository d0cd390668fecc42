"""The latent step of a variational autoencoder: reparameterization and KL divergence (Kingma & Welling 2014)."""

from typing import Any

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
    rows, channels, *spatial = parameters.shape
    noise = None
    if not deterministic:
        width = parameters[0].numel() // 2 * samples
        noise = normal(rng, stream, first_row, rows, width).view(rows, samples, channels // 2, *spatial)
    combine = plain_latents_kl if torch.compiler.is_compiling() else _LatentsKl.apply
    latents, kl_nats = combine(parameters.float(), noise, samples)
    return latents.flatten(0, 1), kl_nats


def plain_latents_kl(parameters: Tensor, noise: Tensor | None, samples: int) -> tuple[Tensor, Tensor]:
    """The latent step given its noise, differentiated by autograd: the reference, and what torch.compile takes.

    Args:
        parameters: float32 [B, 2C, ...].
        noise: float32 [B, samples, C, ...]; None stands for zeros.
        samples: latents per image.

    Returns:
        latents [B, samples, C, ...] and kl_nats [B].
    """
    mean, logvar = parameters.chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    std = torch.exp(0.5 * logvar)
    kl_nats = 0.5 * (mean * mean + std * std - 1.0 - logvar).flatten(1).sum(1)
    if noise is None:
        return mean.unsqueeze(1).expand(-1, samples, *mean.shape[1:]), kl_nats
    return mean.unsqueeze(1) + std.unsqueeze(1) * noise, kl_nats


class _LatentsKl(torch.autograd.Function):
    """`plain_latents_kl` with the gradient written out: a third of the operators, each of which costs more than its
    arithmetic at a few thousand latents."""

    @staticmethod
    def forward(ctx: Any, parameters: Tensor, noise: Tensor | None, samples: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(parameters, noise)
        return plain_latents_kl(parameters, noise, samples)

    @staticmethod
    def backward(ctx: Any, latents_gradient: Tensor, kl_gradient: Tensor) -> tuple[Tensor, None, None]:
        parameters, noise = ctx.saved_tensors
        mean, raw_logvar = parameters.chunk(2, dim=1)
        std = raw_logvar.clamp(*LOGVAR_RANGE).mul_(0.5).exp_()
        kl_gradient = kl_gradient.view(-1, *[1] * (parameters.ndim - 1))
        gradient = torch.empty_like(parameters)
        mean_gradient, logvar_gradient = gradient.chunk(2, dim=1)
        torch.addcmul(latents_gradient.sum(1), kl_gradient, mean, out=mean_gradient)
        torch.mul(kl_gradient, std * std - 1.0, out=logvar_gradient)
        if noise is not None:
            logvar_gradient.addcmul_(std, (latents_gradient * noise).sum(1))
        # The clamp passes no gradient where it acts, as torch.clamp's does not.
        low, high = LOGVAR_RANGE
        logvar_gradient.mul_(0.5).masked_fill_((raw_logvar < low) | (raw_logvar > high), 0.0)
        return gradient, None, None
