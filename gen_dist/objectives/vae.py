"""Variational autoencoders: VAE, beta-VAE and importance-weighted VAE, with Bernoulli or Gaussian likelihood."""

import math

import torch
from torch import Tensor, nn

from gen_dist.config import NetworkConfig, VaeConfig
from gen_dist.losses import (
    bernoulli_nll,
    gaussian_nll,
    importance_weighted_bound,
    normal_log_density,
    standard_normal_log_density,
)
from gen_dist.objectives.base import Batch, EncoderDecoder, Phase, TurnResult, unit_interval
from gen_dist.randomness import Stream
from kernels import LOGVAR_RANGE, binarize, reparameterize_kl


class Vae(EncoderDecoder):
    """Encoder to the posterior's mean and log-variance, decoder to the likelihood's parameters."""

    generates = True

    def __init__(self, config: VaeConfig, network: NetworkConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config.likelihood, network, image_shape, encoder_outputs=2 * network.latent_dim)
        self.config = config
        self.evaluation_samples = config.importance_samples
        if config.likelihood == "gaussian":
            self.networks["scale"] = GaussianScale(config.gaussian_scale)

    def phases(self) -> dict[str, Phase]:
        if self.config.importance_samples > 1:
            return {"iwae": MaximizeImportanceWeightedBound(self)}
        return {"vae": MaximizeElbo(self)}

    def targets(self, batch: Batch, stream: Stream) -> Tensor:
        """What the decoder has to explain: float32 [B, C, H, W] in 0..1, binarized anew if so configured."""
        if self.config.dynamic_binarization:
            return binarize(batch.images, batch.rng, stream, batch.first_row)
        return unit_interval(batch.images)

    def nll(self, decoded: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """-log p(x given z), nats per image [B]."""
        if self.config.likelihood == "bernoulli":
            return bernoulli_nll(decoded, targets, dtype)
        return gaussian_nll(decoded, targets, self.networks["scale"](), dtype)

    def nll_and_kl(self, targets: Tensor, batch: Batch, stream: Stream) -> tuple[Tensor, Tensor]:
        """The two terms of the negative ELBO with one latent sample: nats per image, [B] each."""
        parameters = self.networks["encoder"](targets)
        latents, kl_nats = reparameterize_kl(parameters, batch.rng, stream, batch.first_row)
        return self.nll(self.networks["decoder"](latents), targets), kl_nats

    def log_weights(self, targets: Tensor, batch: Batch, stream: Stream, samples: int) -> tuple[Tensor, Tensor]:
        """log p(x, z_k) - log q(z_k given x) of K latent samples, float64 [B, K], and the KL, [B]; in nats."""
        # Latents rounded to half precision would not be draws of the density that is divided out.
        parameters = self.networks["encoder"](targets).float()
        latents, kl_nats = reparameterize_kl(parameters, batch.rng, stream, batch.first_row, samples=samples)
        mean, logvar = parameters.double().repeat_interleave(samples, dim=0).chunk(2, dim=1)
        nll = self.nll(self.networks["decoder"](latents), targets.repeat_interleave(samples, dim=0), torch.float64)
        latents, logvar = latents.double(), logvar.clamp(*LOGVAR_RANGE)  # as the latents were drawn
        log_weights = standard_normal_log_density(latents) - normal_log_density(latents, mean, logvar) - nll
        return log_weights.view(-1, samples), kl_nats

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.networks["encoder"](unit_interval(images)).float().chunk(2, dim=1)
        return mean, logvar

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        targets = self.targets(batch, Stream.TEST_BINARIZATION)
        nll, kl_nats = self.nll_and_kl(targets, batch, Stream.TEST_LATENTS)
        metrics = {"negative_elbo": nll + kl_nats, "nll": nll, "kl": kl_nats}
        samples = self.config.importance_samples
        if samples > 1:
            log_weights, _ = self.log_weights(targets, batch, Stream.TEST_IMPORTANCE, samples)
            metrics[f"negative_bound_k{samples}"] = -importance_weighted_bound(log_weights)
        return metrics


class GaussianScale(nn.Module):
    """Logarithm of one standard deviation for all pixels, fixed or learned (Rybkin et al. 2021)."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        # 0.2 is about the spread of pixels around their mean: a start from which either direction is near.
        self.log_scale = nn.Parameter(torch.tensor(math.log(0.2 if scale is None else scale)), scale is None)

    def forward(self) -> Tensor:
        return self.log_scale


class MaximizeElbo(Phase):
    """Minimize nll + beta * kl (Kingma & Welling 2014, eq. 10; beta: Higgins et al. 2017)."""

    objective: Vae

    def forward(self, batch: Batch) -> TurnResult:
        config = self.objective.config
        targets = self.objective.targets(batch, Stream.BINARIZATION)
        nll, kl = (term.mean() for term in self.objective.nll_and_kl(targets, batch, Stream.LATENTS))
        weight: float | Tensor = config.beta
        if config.kl_warmup_steps:
            # From the step on the device: a Python number that changes each step would recompile the phase.
            weight = config.beta * (batch.rng[1] / config.kl_warmup_steps).clamp(max=1.0)
        loss = nll + weight * kl
        return TurnResult(loss, {"loss": loss.detach(), "nll": nll.detach(), "kl": kl.detach()})


class MaximizeImportanceWeightedBound(Phase):
    """Minimize the negative K-sample bound (Burda et al. 2016, eq. 8)."""

    objective: Vae

    def forward(self, batch: Batch) -> TurnResult:
        targets = self.objective.targets(batch, Stream.BINARIZATION)
        samples = self.objective.config.importance_samples
        log_weights, kl_nats = self.objective.log_weights(targets, batch, Stream.LATENTS, samples)
        loss = -importance_weighted_bound(log_weights).mean().float()
        return TurnResult(loss, {"loss": loss.detach(), "kl": kl_nats.mean().detach()})
