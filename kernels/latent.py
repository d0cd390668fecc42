"""The latent step of a variational autoencoder: reparameterization and KL divergence (Kingma & Welling 2014).

It has three implementations: that of CPUs (NumPy's noise, then `plain_latents_kl`), the fused kernel of GPUs
(kernels/triton_latent.py), and that kernel's twin in torch operations, for tests and other devices.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .device_noise import device_normal
from .key import Key
from .latent_layout import (
    LOGVAR_RANGE,
    arithmetic_dtype,
    empty_latents,
    latents_per_sample,
    memory_format_of,
)
from .noise import normal, runs_triton


def reparameterize_kl(
    parameters: Tensor,
    key: Key,
    *,
    samples: int = 1,
    deterministic: bool = False,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents z = mean + exp(logvar / 2) * eps and KL(N(mean, exp(logvar)) || prior) (Kingma & Welling 2014, app. B).

    With logvar = log sigma^2 the standard deviation is exp(logvar / 2), not exp(logvar). All arithmetic is float32, or
    float64 for float64 parameters. Gradients flow to `parameters` and `prior`; they are zero at log-variances outside
    LOGVAR_RANGE.

    Args:
        parameters: [B, 2C, ...] of float32, bfloat16, float16 or float64, contiguous or channels_last, the encoder's
            output: means in the first half of the channels, log-variances in the second.
        key: key of the noise of parameters[0], on the device of `parameters`.
        samples: latents drawn per image.
        deterministic: return the mean and draw no noise.
        prior: means and log-variances of a Gaussian prior, as `parameters`; None means N(0, I).

    Returns:
        latents [B * samples, C, ...], with the samples of one image in adjacent rows, dtype and memory format of
        `parameters`; and kl_nats [B], float32 (float64 for float64), summed over an image's latents.

    Raises:
        ValueError: a shape, dtype or number is invalid.
    """
    _check(parameters, key.rng, samples, prior)
    if parameters.device.type != "cpu":
        return reparameterize_kl_operator(parameters, prior, *key, samples, deterministic)
    noise = None
    if not deterministic:
        rows, channels, *spatial = parameters.shape
        noise = normal(key, rows, latents_per_sample(parameters) * samples)
        noise = noise.view(rows, samples, channels // 2, *spatial)
    wide = parameters.to(arithmetic_dtype(parameters))
    if prior is not None:
        latents, kl_nats = plain_latents_kl(wide, noise, samples, prior.to(wide.dtype))
    else:
        combine = plain_latents_kl if torch.compiler.is_compiling() else _LatentsKl.apply
        latents, kl_nats = combine(wide, noise, samples)
    latents = latents.flatten(0, 1).to(parameters.dtype)
    return latents.contiguous(memory_format=memory_format_of(parameters)), kl_nats


def _check(parameters: Tensor, rng: Tensor, samples: int, prior: Tensor | None) -> None:
    if parameters.ndim < 2 or parameters.shape[1] % 2:
        raise ValueError(f"parameters {list(parameters.shape)} are not [B, 2C, ...]: the channels hold mean and logvar")
    if parameters.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"parameters are {parameters.dtype}; use float32, bfloat16, float16 or float64")
    if rng.shape != (2,) or rng.dtype != torch.int64:
        raise ValueError(f"rng is {rng.dtype} {list(rng.shape)}; it must be int64 [2], (seed, step)")
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    if prior is not None and (prior.shape != parameters.shape or prior.dtype != parameters.dtype):
        raise ValueError(
            f"prior is {prior.dtype} {list(prior.shape)}, parameters are {parameters.dtype} {list(parameters.shape)}: "
            "they must be equal"
        )


def plain_latents_kl(
    parameters: Tensor, noise: Tensor | None, samples: int, prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the latent step from given noise, differentiable by autograd; the reference, also for torch.compile.

    Args:
        parameters: float32 or float64 [B, 2C, ...].
        noise: [B, samples, C, ...]; None means zeros.
        samples: latents per image.
        prior: as `parameters`; None means N(0, I).

    Returns:
        latents [B, samples, C, ...] and kl_nats [B].
    """
    mean, logvar = parameters.chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    std = torch.exp(0.5 * logvar)
    if prior is None:
        kl_nats = 0.5 * (mean * mean + std * std - 1.0 - logvar).flatten(1).sum(1)
    else:
        prior_mean, prior_logvar = prior.chunk(2, dim=1)
        prior_logvar = prior_logvar.clamp(*LOGVAR_RANGE)
        distance = mean - prior_mean
        scaled = (distance * distance + std * std) * torch.exp(-prior_logvar)
        kl_nats = 0.5 * (scaled - 1.0 - (logvar - prior_logvar)).flatten(1).sum(1)
    if noise is None:
        return mean.unsqueeze(1).expand(-1, samples, *mean.shape[1:]), kl_nats
    return mean.unsqueeze(1) + std.unsqueeze(1) * noise, kl_nats


class _LatentsKl(torch.autograd.Function):
    """`plain_latents_kl` with an explicit gradient, which takes a third of the operators.

    At a few thousand latents, an operator's overhead exceeds its arithmetic. There is no double backward; use
    `plain_latents_kl` for that.
    """

    @staticmethod
    def forward(ctx: Any, parameters: Tensor, noise: Tensor | None, samples: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(parameters, noise)
        return plain_latents_kl(parameters, noise, samples)

    @staticmethod
    @once_differentiable
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
        # Like torch.clamp, the clamp passes no gradient where it acts.
        logvar_gradient.mul_(0.5).masked_fill_(clamp_acts(raw_logvar), 0.0)
        return gradient, None, None


def clamp_acts(logvar: Tensor) -> Tensor:
    """True where a log-variance is outside LOGVAR_RANGE, False at NaN, so that its gradient is NaN as well."""
    low, high = LOGVAR_RANGE
    return (logvar < low) | (logvar > high)


# The noise is drawn in memory order, so torch.compile must not change strides.
@torch.library.custom_op("gen_dist::reparameterize_kl", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def reparameterize_kl_operator(
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Operator of `reparameterize_kl` with the device noise: the fused kernel on Triton devices, else its twin.

    It is opaque to torch.compile. Backward saves the parameters, the prior and rng, and redraws the noise.
    """
    parameters, prior = _dense(parameters), _like(prior, parameters)
    if runs_triton(parameters.device) and parameters.dtype != torch.float64:
        from . import triton_latent  # macOS and Windows have no Triton

        return triton_latent.forward(parameters, prior, rng, stream, first_row, samples, deterministic)
    return twin_forward(parameters, prior, rng, stream, first_row, samples, deterministic)


@torch.library.custom_op("gen_dist::reparameterize_kl_backward", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def reparameterize_kl_backward_operator(
    latents_gradient: Tensor | None,
    kl_gradient: Tensor | None,
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of `parameters` and, if given, of `prior`; the incoming gradient of an unused output is None."""
    parameters = _dense(parameters)
    prior, latents_gradient = _like(prior, parameters), _like(latents_gradient, parameters)
    if runs_triton(parameters.device) and parameters.dtype != torch.float64:
        from . import triton_latent

        backward = triton_latent.backward
    else:
        backward = twin_backward
    return backward(latents_gradient, kl_gradient, parameters, prior, rng, stream, first_row, samples, deterministic)


def _dense(parameters: Tensor) -> Tensor:
    """Make parameters dense in their memory format."""
    return parameters.contiguous(memory_format=memory_format_of(parameters))


def _like(tensor: Tensor | None, parameters: Tensor) -> Tensor | None:
    """Make a tensor dense in the memory format of `parameters`."""
    return None if tensor is None else tensor.contiguous(memory_format=memory_format_of(parameters))


@reparameterize_kl_operator.register_fake
def _(
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    kl_nats = parameters.new_empty(parameters.shape[0], dtype=arithmetic_dtype(parameters))
    return empty_latents(parameters, samples), kl_nats


@reparameterize_kl_backward_operator.register_fake
def _(
    latents_gradient: Tensor | None,
    kl_gradient: Tensor | None,
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> list[Tensor]:
    gradient = torch.empty_like(parameters, memory_format=memory_format_of(parameters))
    return [gradient] if prior is None else [gradient, torch.empty_like(gradient)]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    parameters, prior, rng, *ctx.numbers = inputs
    ctx.save_for_backward(parameters, prior, rng)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, latents_gradient: Tensor | None, kl_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if latents_gradient is None and kl_gradient is None:
        return (None,) * 7
    parameters, prior, rng = ctx.saved_tensors
    gradients = reparameterize_kl_backward_operator(latents_gradient, kl_gradient, parameters, prior, rng, *ctx.numbers)
    prior_gradient = None if prior is None else gradients[1]
    return gradients[0], prior_gradient, None, None, None, None, None


reparameterize_kl_operator.register_autograd(_differentiate, setup_context=_keep_inputs)


def twin_forward(
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Forward pass of the kernel in torch operations, on any device.

    Args:
        parameters: [B, 2C, ...], dense; computed in `arithmetic_dtype`.
        prior: as `parameters`; None means N(0, I).
        rng: int64 [2], (seed, step).
        stream: stream of the noise.
        first_row: global row of parameters[0].
        samples: latents per image.
        deterministic: draw no noise.

    Returns:
        latents [B * samples, C, ...] as `empty_latents`, and kl_nats [B] in `arithmetic_dtype`.
    """
    dtype = arithmetic_dtype(parameters)
    noise = None if deterministic else _twin_noise(parameters, rng, stream, first_row, samples)
    wide_prior = None if prior is None else prior.to(dtype)
    latents, kl_nats = plain_latents_kl(parameters.to(dtype), noise, samples, wide_prior)
    return empty_latents(parameters, samples).copy_(latents.flatten(0, 1)), kl_nats


def twin_backward(
    latents_gradient: Tensor | None,
    kl_gradient: Tensor | None,
    parameters: Tensor,
    prior: Tensor | None,
    rng: Tensor,
    stream: int,
    first_row: int,
    samples: int,
    deterministic: bool,
) -> list[Tensor]:
    """Backward pass of the kernel in torch operations, with the kernel's formulas.

    Args:
        latents_gradient: [B * samples, C, ...], or None.
        kl_gradient: [B], or None.
        parameters: as in `twin_forward`, like the rest.
        prior: [B, 2C, ...], or None.
        rng: int64 [2].
        stream: stream of the noise.
        first_row: global row of parameters[0].
        samples: latents per image.
        deterministic: the forward pass drew no noise.

    Returns:
        Gradients of `parameters` and, if given, of `prior`, each of the shape, dtype and layout of its tensor.
    """
    dtype = arithmetic_dtype(parameters)
    mean, raw_logvar = parameters.to(dtype).chunk(2, dim=1)
    std = torch.exp(0.5 * raw_logvar.clamp(*LOGVAR_RANGE))
    mean_gradient, logvar_gradient = torch.zeros_like(mean), torch.zeros_like(mean)
    prior_gradient = None if prior is None else torch.zeros_like(prior)
    if latents_gradient is not None:
        by_sample = latents_gradient.to(dtype).unflatten(0, (parameters.shape[0], samples))
        mean_gradient = by_sample.sum(1)
        if not deterministic:
            noise = _twin_noise(parameters, rng, stream, first_row, samples)
            logvar_gradient = 0.5 * std * (by_sample * noise).sum(1)
    if kl_gradient is not None:
        kl_gradient = kl_gradient.to(dtype).view(-1, *[1] * (parameters.ndim - 1))
        distance, ratio = mean, std * std
        if prior is not None:
            prior_mean, raw_prior_logvar = prior.to(dtype).chunk(2, dim=1)
            precision = torch.exp(-raw_prior_logvar.clamp(*LOGVAR_RANGE))
            ratio = ratio * precision
            difference = mean - prior_mean
            distance = difference * precision
            prior_logvar_gradient = kl_gradient * (0.5 * (1.0 - ratio - difference * distance))
            prior_logvar_gradient = prior_logvar_gradient.masked_fill(clamp_acts(raw_prior_logvar), 0.0)
            prior_gradient = _joined(-kl_gradient * distance, prior_logvar_gradient, prior)
        mean_gradient = mean_gradient + kl_gradient * distance
        logvar_gradient = logvar_gradient + kl_gradient * (0.5 * (ratio - 1.0))
    gradient = _joined(mean_gradient, logvar_gradient.masked_fill(clamp_acts(raw_logvar), 0.0), parameters)
    return [gradient] if prior_gradient is None else [gradient, prior_gradient]


def _joined(mean_half: Tensor, logvar_half: Tensor, like: Tensor) -> Tensor:
    """Concatenate the two halves in the dtype and memory format of `like`."""
    return torch.empty_like(like).copy_(torch.cat((mean_half, logvar_half), dim=1))


def _twin_noise(parameters: Tensor, rng: Tensor, stream: int, first_row: int, samples: int) -> Tensor:
    """Device noise in the memory order of the latents: [B, samples, C, ...] in `arithmetic_dtype`."""
    rows, channels, *spatial = parameters.shape
    noise = device_normal(
        rng,
        stream,
        first_row,
        rows,
        latents_per_sample(parameters),
        samples=samples,
        dtype=arithmetic_dtype(parameters),
    )
    if parameters.is_contiguous():
        return noise.view(rows, samples, channels // 2, *spatial)
    return noise.view(rows, samples, *spatial, channels // 2).movedim(-1, 2)
