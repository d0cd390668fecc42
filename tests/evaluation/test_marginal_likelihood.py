"""The likelihood from importance samples equals a closed form, float64, and that of each image alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from gen_dist.config import MlpConfig, Roles, VaeConfig
from gen_dist.evaluation import marginal_likelihood
from gen_dist.evaluation.marginal_likelihood import negative_log_likelihoods
from gen_dist.kernels import Key, binarize, normal
from gen_dist.objectives import Batch
from gen_dist.objectives.vae import Vae
from gen_dist.randomness import Stream
from tests.support.digits import digits

RNG = torch.tensor([3, 0])


def _batch(images: Tensor, first_row: int = 0) -> Batch:
    return Batch(images, torch.zeros(len(images), dtype=torch.int64), RNG, first_row)


def _digits_vae() -> tuple[Vae, Tensor]:
    """An untrained VAE on digits.

    Its decoder starts at the mean digit, so some pixels are certain and others are not.
    """
    images = torch.from_numpy(digits()[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = Vae(VaeConfig(), Roles.all_of(MlpConfig(hidden_sizes=(50, 40), latent_dim=6)), (1, 28, 28), 10)
    objective.start_at(images.float().mean(dim=0) / 255)
    return objective.eval(), images[:100]


@torch.no_grad()
def test_binary_images_have_the_likelihood_of_float64() -> None:
    objective, images = _digits_vae()
    images, samples = images[:5], 2300
    found = negative_log_likelihoods(objective, _batch(images, first_row=4), samples)
    assert found.dtype == torch.float64
    targets = binarize(images, Key(RNG, Stream.TEST_BINARIZATION, 4))
    parameters = objective.networks["encoder"](targets)
    networks = objective.networks.double()
    for row, target in enumerate(targets.double()):
        noise = normal(Key(RNG, Stream.TEST_IMPORTANCE, 4 + row), 1, samples * 6).view(samples, 6).double()
        mean, std = parameters[row, :6].double(), (parameters[row, 6:].double() / 2).exp()
        latents = mean + std * noise
        weights = Bernoulli(logits=networks["decoder"](latents)).log_prob(target).flatten(1).sum(1)
        weights += Normal(0.0, 1.0).log_prob(latents).sum(1) - Normal(mean, std).log_prob(latents).sum(1)
        expected = math.log(samples) - torch.logsumexp(weights, dim=0)
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-6)


class _Affine(nn.Module):
    """A fixed affine map whose output may be images."""

    def __init__(self, weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.shape = nn.Parameter(weight), nn.Parameter(bias), shape

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.flatten(1) @ self.weight.T + self.bias).unflatten(1, self.shape)


@torch.no_grad()
def test_the_exact_posterior_gives_the_exact_likelihood() -> None:
    random = torch.Generator().manual_seed(1)
    scale, shape, latents = 0.2, (1, 4, 4), 3
    loadings = torch.linalg.qr(torch.randn(16, latents, generator=random))[0] * torch.tensor([0.5, 0.3, 0.1])
    offset = torch.rand(16, generator=random)
    config = VaeConfig(likelihood="gaussian", gaussian_scale=scale)
    objective = Vae(config, Roles.all_of(MlpConfig(latent_dim=latents)), shape, 1)
    # With orthogonal loadings the posterior has independent latents: of variances 1 / (1 + W^T W / s^2).
    variances = 1 / (1 + loadings.square().sum(dim=0) / scale**2)
    weight = (variances / scale**2)[:, None] * loadings.T
    encoder_weight = torch.cat([weight, torch.zeros(latents, 16)])
    encoder_bias = torch.cat([-weight @ offset, variances.log()])
    objective.networks["encoder"] = _Affine(encoder_weight, encoder_bias, (2 * latents,))
    objective.networks["decoder"] = _Affine(loadings, offset, shape)
    images = torch.randint(0, 256, (4, *shape), dtype=torch.uint8, generator=random)
    covariance = loadings.double() @ loadings.double().T + scale**2 * torch.eye(16).double()
    exact = -MultivariateNormal(offset.double(), covariance).log_prob(images.double().flatten(1) / 255)
    for samples in (1, 1500):
        found = negative_log_likelihoods(objective.eval(), _batch(images), samples)
        torch.testing.assert_close(found, exact, rtol=2e-6, atol=0)


@torch.no_grad()
def test_latents_of_large_images_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, images = _digits_vae()
    whole = negative_log_likelihoods(objective, _batch(images[:2]), 50)
    counts: list[int] = []
    objective.networks["decoder"].register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    monkeypatch.setattr(marginal_likelihood, "NUMBERS_PER_CHUNK", 20 * 28 * 28)
    torch.testing.assert_close(negative_log_likelihoods(objective, _batch(images[:2]), 50), whole)
    assert counts == 2 * [20, 20, 10]


@torch.no_grad()
def test_likelihoods_are_each_images_own_and_fall_with_samples() -> None:
    objective, images = _digits_vae()
    together = negative_log_likelihoods(objective, _batch(images[:5], first_row=7), 40)
    alone = negative_log_likelihoods(objective, _batch(images[3:4], first_row=10), 40)
    assert float(alone) == pytest.approx(float(together[3]), rel=1e-6)
    bounds = [float(negative_log_likelihoods(objective, _batch(images), samples).mean()) for samples in (1, 30, 900)]
    assert bounds == sorted(bounds, reverse=True)
