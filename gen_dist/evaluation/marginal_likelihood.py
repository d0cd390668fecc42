"""-log p(x) of a VAE by importance sampling with many samples (Burda et al. 2016, eq. 8, as a bound of log p(x))."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.kernels import LOGVAR_RANGE, Key, binarize, normal
from gen_dist.objectives import Batch
from gen_dist.objectives.losses import importance_weighted_bound, log_likelihoods_of_binary_image
from gen_dist.objectives.vae import Vae
from gen_dist.randomness import Stream

DECODED_PER_CHUNK = 1000
"""Most latents decoded at once. Images of 28 x 28 then fit in a processor's cache."""
NUMBERS_PER_CHUNK = 2**22
"""Most numbers in images decoded at once; a decoder's own maps take ten times their memory and more."""


def is_binarized(objective: Vae) -> bool:
    """True if `negative_log_likelihoods` binarizes pixels, as it does for every Bernoulli likelihood.

    Cross-entropy with real-valued pixels is not a likelihood.
    """
    return objective.likelihood == "bernoulli"


def negative_log_likelihoods(objective: Vae, batch: Batch, samples: int) -> Tensor:
    """Negative K-sample bound of each image, float64 [B], in nats. It approaches -log p(x) from above as K grows.

    The posterior is the proposal. An image's noise is keyed by its row alone, whatever the batch. Log-weights and the
    logarithm of their mean are float64; sums over pixels are of float32 values.

    Args:
        objective: in eval mode.
        batch: images of the test split; `first_row` is the place of the first.
        samples: K.
    """
    if is_binarized(objective):
        targets = binarize(batch.images, batch.key(Stream.TEST_BINARIZATION))
    else:
        targets = objective.targets(batch, Stream.TEST_BINARIZATION)
    means, logvars = objective.networks["encoder"](targets).float().chunk(2, dim=1)
    logvars = logvars.clamp(*LOGVAR_RANGE)
    bounds = []
    at_once = max(1, min(DECODED_PER_CHUNK, NUMBERS_PER_CHUNK // batch.images[0].numel()))
    for row, (target, mean, logvar) in enumerate(zip(targets, means, logvars, strict=True)):
        noise = normal(Key(batch.rng, Stream.TEST_IMPORTANCE, batch.first_row + row), 1, samples * mean.numel())
        # One image after another: all that is decoded at once has one target.
        weights = [
            _log_weights(objective, target, batch.labels[row], mean, logvar, chunk)
            for chunk in noise.view(samples, *mean.shape).split(at_once)
        ]
        bounds.append(importance_weighted_bound(torch.cat(weights)[None]))
    return -torch.cat(bounds)


def _log_weights(objective: Vae, target: Tensor, label: Tensor, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """log p(x, z_k) - log q(z_k given x) of the latents that noise [K, *latent_shape] draws: float64 [K].

    A conditional VAE has log p(x, z_k given its label).

    log p(z) - log q(z) is (|noise|^2 - |z|^2 + sum of logvar) / 2.
    """
    latents = torch.addcmul(mean, noise, torch.exp(0.5 * logvar))
    labels = label.expand(len(latents), *label.shape) if objective.conditional else None
    decoded = objective.decoded(latents, labels)
    if objective.likelihood == "bernoulli":
        log_likelihood = log_likelihoods_of_binary_image(decoded, target)
    else:
        log_likelihood = -objective.nll(decoded, target.expand_as(decoded), torch.float64)
    squares = (noise * noise - latents * latents).flatten(1).sum(dim=1, dtype=torch.float64)
    prior_to_posterior = squares + logvar.double().sum()
    return log_likelihood + 0.5 * prior_to_posterior
