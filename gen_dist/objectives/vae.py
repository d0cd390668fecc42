"""Variational autoencoders: VAE, beta-VAE and importance-weighted VAE, with four likelihoods of pixels."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.config import Roles, VaeConfig
from gen_dist.config.labels import LabelScheme, refuse_unlabelled, scheme_of
from gen_dist.data.values import PLAIN, ValueScale
from gen_dist.errors import ConfigError
from gen_dist.kernels import LOGVAR_RANGE, binarize, reparameterize_kl
from gen_dist.networks.label_inputs import LabelVectors, with_labels
from gen_dist.objectives.base import EncoderDecoder
from gen_dist.objectives.losses import (
    bernoulli_nll,
    discretized_logistic_nll,
    gaussian_nll,
    importance_weighted_bound,
    laplace_nll,
    normal_log_density,
    standard_normal_log_density,
)
from gen_dist.objectives.phase import Batch, Phase, TurnResult, unit_interval
from gen_dist.randomness import Stream


class ImportanceSamples(NamedTuple):
    """K latent samples of each of B images."""

    log_weights: Tensor
    """log p(x, z_k) - log q(z_k given x): float64 [B, K], nats."""
    kl_nats: Tensor
    """KL of the posterior from the prior, [B]."""


class Vae(EncoderDecoder):
    """Variational autoencoder: the encoder gives the posterior's parameters, the decoder the likelihood's."""

    config: VaeConfig
    takes_any_labels = True
    step: Tensor
    """Distance of neighbouring whole numbers in intensities, float32 [1 or C, 1, 1]."""

    def __init__(
        self, config: VaeConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int | LabelScheme
    ) -> None:
        labels = scheme_of(classes)
        if conditional := config.conditioning != "none":
            refuse_unlabelled(labels, config.conditioning)
        label_vectors = LabelVectors(labels) if conditional else None
        width = label_vectors.width if label_vectors else 0
        super().__init__(config.likelihood, roles, image_shape, outputs_per_latent=2, label_width=width)
        self.conditional, self.label_vectors = conditional, label_vectors
        self.config = config
        self.evaluation_samples = config.importance_samples
        if config.likelihood in _FIRST_SCALES:
            given = config.gaussian_scale if config.likelihood == "gaussian" else config.likelihood_scale
            self.networks["scale"] = PixelScale(given, _FIRST_SCALES[config.likelihood])

        # A buffer, so that it is on the device: a step copies nothing there.
        self.register_buffer("step", PLAIN.steps(), persistent=False)
        self.dtype_of_data = PLAIN.dtype

    def phases(self) -> dict[str, Phase]:
        if self.config.importance_samples > 1:
            return {"iwae": MaximizeImportanceWeightedBound(self)}
        return {"vae": MaximizeElbo(self)}

    def targets(self, batch: Batch, stream: Stream) -> Tensor:
        """Targets of the likelihood: float32 [B, C, H, W] in 0..1, freshly binarized if so configured."""
        if self.config.dynamic_binarization:
            return binarize(batch.images, batch.key(stream))
        return unit_interval(batch.images)

    def nll(self, decoded: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """-log p(x given z), nats per image [B]."""
        match self.config.likelihood:
            case "bernoulli":
                return bernoulli_nll(decoded, targets, dtype)
            case "gaussian":
                return gaussian_nll(decoded, targets, self.networks["scale"](), dtype)
            case "laplace":
                return laplace_nll(decoded, targets, self.networks["scale"](), dtype)
            case "discretized-logistic":
                return discretized_logistic_nll(decoded, targets, self.networks["scale"](), self.step, dtype)

    def take_values(self, values: ValueScale) -> None:
        self.dtype_of_data = values.dtype
        self.step = values.steps()
        if self.config.likelihood != "discretized-logistic":
            return
        if not values.is_whole:
            raise ConfigError(
                f"likelihood discretized-logistic is a probability of whole numbers, and the data have {values.dtype} "
                "values; use gaussian or laplace"
            )

    def refuse_new(self, values: ValueScale) -> None:
        whole = all(end == round(end) for end in (*values.low, *values.high))
        if self.config.likelihood == "discretized-logistic" and not whole:
            raise ConfigError(
                f"likelihood discretized-logistic is a probability of whole numbers, and the range of the values is "
                f"{values}, whose ends are none: give whole numbers to --value-range, or use gaussian or laplace"
            )

    def nll_and_kl(self, targets: Tensor, batch: Batch, stream: Stream) -> tuple[Tensor, Tensor]:
        """Both terms of the negative ELBO with one latent sample: nats per image, [B] each."""
        parameters = self.networks["encoder"](targets)
        latents, kl_nats = reparameterize_kl(parameters, batch.key(stream))
        return self.nll(self.decoded(latents, batch.labels), targets), kl_nats

    def nll_and_path_kl(self, targets: Tensor, batch: Batch, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """Terms of the negative ELBO for the path gradient, [B] each: nll, sampled KL, analytic KL.

        The sampled KL, log q - log p, has a gradient through the latents alone; the analytic KL has none.
        """
        parameters = self.networks["encoder"](targets).float()
        latents, kl_nats = reparameterize_kl(parameters, batch.key(stream))
        nll = self.nll(self.decoded(latents, batch.labels), targets)
        return nll, -self._log_prior_to_posterior(latents, parameters.detach()), kl_nats.detach()

    def log_weights(self, targets: Tensor, batch: Batch, stream: Stream, samples: int) -> ImportanceSamples:
        """Draw K latent samples per image, with importance weights.

        With gradient `path`, the weights have gradients through the latents alone, and the gradient that the bound's
        loss gives the latents counts each sample with its normalized weight once more (Tucker et al. 2019).
        """
        # Latents rounded to half precision would not be draws from the density in the denominator.
        parameters = self.networks["encoder"](targets).float()
        latents, kl_nats = reparameterize_kl(parameters, batch.key(stream), samples=samples)
        zeros = None
        if self.config.gradient == "path":
            latents, zeros = _GradientTimesWeights.apply(latents, samples)
            parameters = parameters.detach()
        labels = batch.labels.repeat_interleave(samples, dim=0) if self.conditional else None
        nll = self.nll(self.decoded(latents, labels), targets.repeat_interleave(samples, dim=0), torch.float64)
        density = parameters.double().repeat_interleave(samples, dim=0)
        log_weights = self._log_prior_to_posterior(latents.double(), density) - nll
        if zeros is not None:
            log_weights = log_weights + zeros
        return ImportanceSamples(log_weights.view(-1, samples), kl_nats)

    def _log_prior_to_posterior(self, latents: Tensor, parameters: Tensor) -> Tensor:
        """log p(z) - log q(z given x), [B], from latents [B, C, ...] and the encoder's output [B, 2 C, ...]."""
        mean, logvar = parameters.chunk(2, dim=1)
        logvar = logvar.clamp(*LOGVAR_RANGE)  # as in `reparameterize_kl`, which drew the latents
        return standard_normal_log_density(latents) - normal_log_density(latents, mean, logvar)

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.decoded(latents, labels).float()

    def decoded(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Output of the decoder for latents [B, *latent_shape], and labels [B] or [B, A] of a conditional VAE."""
        if self.label_vectors is not None:
            assert labels is not None
            latents = with_labels(latents, self.label_vectors(labels))
        found: Tensor = self.networks["decoder"](latents)
        return found

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.networks["encoder"](unit_interval(images)).float().chunk(2, dim=1)
        return mean, logvar

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        targets = self.targets(batch, Stream.TEST_BINARIZATION)
        nll, kl_nats = self.nll_and_kl(targets, batch, Stream.TEST_LATENTS)
        metrics = {"negative_elbo": nll + kl_nats, "nll": nll, "kl": kl_nats}
        samples = self.config.importance_samples
        if samples > 1:
            drawn = self.log_weights(targets, batch, Stream.TEST_IMPORTANCE, samples)
            metrics[f"negative_bound_k{samples}"] = -importance_weighted_bound(drawn.log_weights)
        return metrics


class _GradientTimesWeights(torch.autograd.Function):
    """Latents of K samples, [B K, ...], whose gradient is multiplied by the samples' normalized weights.

    The weights follow from the latents, so that they are not known here. But the bound's gradient with respect to log
    weights is a multiple of them: zeros float64 [B K] beside the latents, which the caller adds to the log weights,
    bring it back. (A hook on the latents, set once the weights are known, cannot be compiled by each torch.)
    """

    @staticmethod
    def forward(ctx: Any, latents: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        ctx.samples = samples
        return latents.view_as(latents), latents.new_zeros(len(latents), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_latents, of_log_weights = gradients
        rows = of_log_weights.view(-1, ctx.samples)
        total = rows.sum(dim=1, keepdim=True)
        weights = (rows / torch.where(total == 0, 1.0, total)).float()  # the total is 0 where the loss counts 0 times
        return of_latents * weights.view(-1, *[1] * (of_latents.ndim - 1)), None


_FIRST_SCALES = {
    "gaussian": 0.2,
    "laplace": 0.2 / math.sqrt(2.0),
    "discretized-logistic": 0.2 * math.sqrt(3.0) / math.pi,
}
"""Scales with a standard deviation of 0.2, about that of pixels around their mean."""


class PixelScale(nn.Module):
    """Logarithm of one scale for all pixels, fixed or learned (Rybkin et al. 2021)."""

    def __init__(self, scale: float | None, first: float) -> None:
        """`scale` is fixed. None learns it, beginning at `first`."""
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(first if scale is None else scale)), scale is None)

    def forward(self) -> Tensor:
        return self.log_scale


_PATH = "a path gradient omits the density's own gradient, whose mean is 0"


class MaximizeElbo(Phase):
    """Minimize nll + beta * kl (Kingma & Welling 2014, eq. 10; beta: Higgins et al. 2017)."""

    objective: Vae

    def __init__(self, objective: Vae) -> None:
        super().__init__(objective)
        if objective.config.gradient == "path":
            self.stops_gradients = _PATH

    def forward(self, batch: Batch) -> TurnResult:
        config = self.objective.config
        targets = self.objective.targets(batch, Stream.BINARIZATION)
        if config.gradient == "path":
            terms = self.objective.nll_and_path_kl(targets, batch, Stream.LATENTS)
            nll, trained_kl, kl = (term.mean() for term in terms)
        else:
            nll, kl = (term.mean() for term in self.objective.nll_and_kl(targets, batch, Stream.LATENTS))
            trained_kl = kl
        weight: float | Tensor = config.beta
        if config.kl_warmup_steps:
            # The step is read on the device: a Python number that changes each step would recompile the phase.
            weight = config.beta * (batch.rng[1] / config.kl_warmup_steps).clamp(max=1.0)
        loss = nll + weight * trained_kl
        return TurnResult(loss, {"loss": loss.detach(), "nll": nll.detach(), "kl": kl.detach()})


class MaximizeImportanceWeightedBound(Phase):
    """Minimize the negative K-sample bound (Burda et al. 2016, eq. 8)."""

    objective: Vae

    def __init__(self, objective: Vae) -> None:
        super().__init__(objective)
        if objective.config.gradient == "path":
            self.stops_gradients = _PATH

    def forward(self, batch: Batch) -> TurnResult:
        targets = self.objective.targets(batch, Stream.BINARIZATION)
        samples = self.objective.config.importance_samples
        drawn = self.objective.log_weights(targets, batch, Stream.LATENTS, samples)
        loss = -importance_weighted_bound(drawn.log_weights).mean().float()
        return TurnResult(loss, {"loss": loss.detach(), "kl": drawn.kl_nats.mean().detach()})
