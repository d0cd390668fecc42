"""Latents, KL divergence and gradients in float64, with the sizes of their terms."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_dist.kernels.latent import twin_forward
from gen_dist.kernels.latent_layout import LOGVAR_RANGE
from tests.kernels.latent_calls import Inputs


@dataclass
class Reference:
    """Results of a call in float64, and their scales: the sums of the sizes of their terms.

    Rounding errors are proportional to the scales: where large terms cancel, no float32 arithmetic is near the result.
    """

    latents: Tensor
    latents_scale: Tensor
    kl_nats: Tensor
    kl_scale: Tensor
    parameters: Tensor
    parameters_scale: Tensor
    prior: Tensor | None
    prior_scale: Tensor | None


def reference(inputs: Inputs, *, of_latents: bool = True, of_kl: bool = True) -> Reference:
    """Compute a call by the twin's forward pass in float64 and autograd, so that no formula is written twice."""
    case = inputs.case
    parameters = inputs.parameters.double().requires_grad_()
    prior = None if inputs.prior is None else inputs.prior.double().requires_grad_()
    call = (inputs.rng, case.stream, case.first_row, case.samples, case.deterministic)
    latents, kl_nats = twin_forward(parameters, prior, *call)
    results, weights = [], []
    if of_latents:
        results, weights = [latents], [inputs.latents_gradient.double()]
    if of_kl:
        results, weights = [*results, kl_nats], [*weights, inputs.kl_gradient.double()]
    wanted = [parameters] if prior is None or not of_kl else [parameters, prior]
    gradients = torch.autograd.grad(results, wanted, weights)
    scales = _Scales(inputs, latents.detach(), of_latents, of_kl)
    return Reference(
        latents=latents.detach(),
        latents_scale=scales.latents(),
        kl_nats=kl_nats.detach(),
        kl_scale=scales.kl_nats(),
        parameters=gradients[0],
        parameters_scale=scales.parameters(),
        prior=gradients[1] if len(gradients) == 2 else None,
        prior_scale=scales.prior() if len(gradients) == 2 else None,
    )


class _Scales:
    """Sums of the sizes of the terms of each result, in float64."""

    def __init__(self, inputs: Inputs, latents: Tensor, of_latents: bool, of_kl: bool) -> None:
        rows, samples = inputs.case.shape[0], inputs.case.samples
        self.mean, self.logvar, self.variance = _moments(inputs.parameters)
        self.by_sample = latents.unflatten(0, (rows, samples))
        self.noise_part = (self.by_sample - self.mean[:, None]).abs()
        gradient = inputs.latents_gradient.double().abs().unflatten(0, (rows, samples))
        self.gradient = gradient if of_latents else torch.zeros_like(gradient)
        kl_gradient = inputs.kl_gradient.double().abs().view(-1, *[1] * (inputs.parameters.ndim - 1))
        self.kl_gradient = kl_gradient if of_kl else torch.zeros_like(kl_gradient)
        zeros = torch.zeros_like(self.mean)
        moments = (zeros, zeros, zeros + 1.0) if inputs.prior is None else _moments(inputs.prior)
        prior_mean, self.prior_logvar, prior_variance = moments
        self.precision = 1.0 / prior_variance
        self.distance = self.mean.abs() + prior_mean.abs()
        self.squares = (self.distance**2 + self.variance) * self.precision

    def latents(self) -> Tensor:
        return (self.mean[:, None].abs() + self.noise_part).flatten(0, 1)

    def kl_nats(self) -> Tensor:
        return 0.5 * (self.squares + 1.0 + self.logvar.abs() + self.prior_logvar.abs()).flatten(1).sum(1)

    def parameters(self) -> Tensor:
        by_mean = self.gradient.sum(1) + self.kl_gradient * self.distance * self.precision
        by_logvar = (self.gradient * self.noise_part).sum(1)
        by_logvar = 0.5 * (by_logvar + self.kl_gradient * (self.variance * self.precision + 1.0))
        return torch.cat((by_mean, by_logvar), dim=1)

    def prior(self) -> Tensor:
        by_mean = self.kl_gradient * self.distance * self.precision
        return torch.cat((by_mean, 0.5 * self.kl_gradient * (1.0 + self.squares)), dim=1)


def _moments(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, log-variances and variances, float64."""
    mean, logvar = parameters.double().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return mean, logvar, logvar.exp()
