"""Objectives with a likelihood against the papers: float64, torch.distributions, outputs of their networks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from gen_dist.config import AutoencoderConfig, GradientEstimator, ObjectiveConfig, VaeConfig
from gen_dist.data import image_indices
from gen_dist.kernels import Key, binarize
from gen_dist.kernels.noise import host_normal
from gen_dist.objectives import Batch
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer
from tests.support.runs import OBJECTIVES, make_trainer, run_steps, small_config

SEED = 11
FIRST_ROW = 6  # not 0, so that a draw without it differs
EXPLICIT = {
    name: configs for name, configs in OBJECTIVES.items() if isinstance(configs[0], AutoencoderConfig | VaeConfig)
}
"""Objectives whose equations `_Reference` has."""
every_objective = pytest.mark.parametrize("objective", EXPLICIT)


class _Reference:
    """Terms of one batch, written from the papers. Only the networks and the raw draws are those of gen_dist."""

    def __init__(
        self, trainer: Trainer, images: Tensor, labels: Tensor, step: int, first_row: int, *, test: bool
    ) -> None:
        assert isinstance(trainer.config.objective, AutoencoderConfig | VaeConfig)
        self._objective = trainer.config.objective
        self._networks = (trainer.best_objective if test else trainer.objective).networks
        self._latent_dim = trainer.config.network.latent_dim
        self._labels = F.one_hot(labels, len(trainer.dataset.class_names))
        self._images, self._step, self._first_row, self._test = images, step, first_row, test
        self.targets = images.double() / 255
        if isinstance(self._objective, VaeConfig) and self._objective.dynamic_binarization:
            stream = Stream.TEST_BINARIZATION if test else Stream.BINARIZATION
            drawn = binarize(images, Key(torch.tensor([SEED, step]), stream, first_row))
            assert set(drawn.unique().tolist()) == {0.0, 1.0}
            self.targets = drawn.double()

    def _posterior(self) -> Independent[Normal]:
        mean, logvar = self._networks["encoder"](self.targets.float()).double().chunk(2, dim=1)
        return Independent(Normal(mean, (logvar / 2).exp()), 1)

    def _noise(self, stream: Stream, samples: int) -> Tensor:
        """Standard normals, [samples, B, D]; the samples of an image are adjacent in its row."""
        rows = len(self._images)
        width = samples * self._latent_dim
        drawn = host_normal(SEED, stream, range(self._step, self._step + 1), self._first_row, rows, width)
        return torch.from_numpy(drawn[0]).double().view(rows, samples, self._latent_dim).transpose(0, 1)

    def _log_likelihood(self, latents: Tensor) -> Tensor:
        """log p(x given z), summed over pixels: [B]."""
        assert isinstance(self._objective, VaeConfig)
        if self._objective.conditioning == "concat":  # p(x given z, y), Sohn et al. 2015, eq. 4
            latents = torch.cat([latents, self._labels], dim=1)
        decoded = self._networks["decoder"](latents.float()).double()
        if self._objective.likelihood == "bernoulli":  # the cross-entropy of real-valued pixels
            return Independent(Bernoulli(logits=decoded, validate_args=False), 3).log_prob(self.targets)
        fixed = self._objective.gaussian_scale
        learned = self._networks["scale"].log_scale
        assert isinstance(learned, Tensor)
        assert learned.requires_grad == (fixed is None) or self._test
        scale = learned.double().exp() if fixed is None else torch.tensor(fixed, dtype=torch.float64)
        if self._objective.likelihood == "discretized-logistic":
            return self._log_probability(decoded, scale).sum(dim=(1, 2, 3))
        return Independent(Normal(decoded, scale), 3).log_prob(self.targets)

    def _log_probability(self, means: Tensor, scale: Tensor) -> Tensor:
        """log of the logistic's mass in the bin of each 8-bit pixel, Salimans et al. 2017, eq. 2. Ends are infinite."""
        upper = torch.where(self.targets == 1, 1e6, self.targets + 0.5 / 255)
        lower = torch.where(self.targets == 0, -1e6, self.targets - 0.5 / 255)
        return (((upper - means) / scale).sigmoid() - ((lower - means) / scale).sigmoid()).log()

    def elbo_terms(self) -> dict[str, Tensor]:
        """-log p(x given z) and KL(q || p), Kingma & Welling 2014, eq. 10 with one sample: [B] each."""
        posterior = self._posterior()
        stream = Stream.TEST_LATENTS if self._test else Stream.LATENTS
        latents = posterior.base_dist.loc + posterior.base_dist.scale * self._noise(stream, 1)[0]
        prior = Independent(Normal(torch.zeros_like(latents), 1.0), 1)
        return {"nll": -self._log_likelihood(latents), "kl": kl_divergence(posterior, prior)}

    def bound(self, samples: int) -> Tensor:
        """log 1/K sum_k p(x, z_k) / q(z_k given x), Burda et al. 2016, eq. 8: [B]."""
        posterior = self._posterior()
        prior = Independent(Normal(torch.zeros(self._latent_dim).double(), 1.0), 1)
        stream = Stream.TEST_IMPORTANCE if self._test else Stream.LATENTS
        log_weights = []
        for noise in self._noise(stream, samples):
            latents = posterior.base_dist.loc + posterior.base_dist.scale * noise
            log_weights.append(self._log_likelihood(latents) + prior.log_prob(latents) - posterior.log_prob(latents))
        return torch.stack(log_weights).logsumexp(0) - math.log(samples)

    def reconstruction_error(self) -> Tensor:
        """Cross-entropy or squared error, summed over pixels: [B]."""
        assert isinstance(self._objective, AutoencoderConfig)
        decoded = self._networks["decoder"](self._networks["encoder"](self.targets.float())).double()
        if self._objective.likelihood == "bernoulli":
            return -Independent(Bernoulli(logits=decoded, validate_args=False), 3).log_prob(self.targets)
        return (decoded - self.targets).square().sum(dim=(1, 2, 3))

    def training(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Expected result of the phase: loss [] and logs [] each."""
        if isinstance(self._objective, AutoencoderConfig):
            loss = self.reconstruction_error().mean()
            return loss, {"loss": loss, "reconstruction_error": loss}
        terms = {name: term.mean() for name, term in self.elbo_terms().items()}
        if self._objective.importance_samples > 1:
            loss = -self.bound(self._objective.importance_samples).mean()
            if self._objective.gradient == "path":
                loss = loss.detach() + self._doubly_reparameterized(self._objective.importance_samples)
            return loss, {"loss": loss, "kl": terms["kl"]}
        warmup_steps = self._objective.kl_warmup_steps
        weight = self._objective.beta * (min(1.0, self._step / warmup_steps) if warmup_steps else 1.0)
        kl = terms["kl"] if self._objective.gradient == "total" else self._path_kl().mean()
        loss = terms["nll"] + weight * kl
        return loss, {"loss": loss, **terms}

    def _path_kl(self) -> Tensor:
        """log q(z given x) - log p(z) of the sample, q's parameters held fixed, Roeder et al. 2017, alg. 1: [B]."""
        posterior = self._posterior()
        latents = posterior.base_dist.loc + posterior.base_dist.scale * self._noise(Stream.LATENTS, 1)[0]
        fixed = Independent(Normal(posterior.base_dist.loc.detach(), posterior.base_dist.scale.detach()), 1)
        return fixed.log_prob(latents) - Independent(Normal(torch.zeros_like(latents), 1.0), 1).log_prob(latents)

    def _doubly_reparameterized(self, samples: int) -> Tensor:
        """Zero, with the gradient of Tucker et al. 2019: eq. 8 for the encoder, w_k grad log w_k for the decoder."""
        posterior, encoder, decoder = self._posterior(), [], []
        fixed = Independent(Normal(posterior.base_dist.loc.detach(), posterior.base_dist.scale.detach()), 1)
        network = self._networks["decoder"]
        frozen = {name: parameter.detach() for name, parameter in network.named_parameters()}
        prior = Independent(Normal(torch.zeros(self._latent_dim).double(), 1.0), 1)
        for noise in self._noise(Stream.LATENTS, samples):
            latents = posterior.base_dist.loc + posterior.base_dist.scale * noise
            decoder.append(self._log_likelihood(latents.detach()))
            logits = torch.func.functional_call(network, frozen, (latents.float(),)).double()
            nll = F.binary_cross_entropy_with_logits(logits, self.targets, reduction="none").sum(dim=(1, 2, 3))
            encoder.append(prior.log_prob(latents) - fixed.log_prob(latents) - nll)
        weights = torch.stack(encoder).detach().softmax(0)
        surrogate = weights.square() * torch.stack(encoder) + weights * torch.stack(decoder)
        surrogate = -surrogate.sum(0).mean()
        return surrogate - surrogate.detach()

    def evaluation(self) -> dict[str, Tensor]:
        """Expected result of `evaluate`: [B] each. The ELBO has no beta and no warm-up."""
        if isinstance(self._objective, AutoencoderConfig):
            return {"reconstruction_error": self.reconstruction_error()}
        terms = self.elbo_terms()
        metrics = {"negative_elbo": terms["nll"] + terms["kl"], **terms}
        samples = self._objective.importance_samples
        if samples > 1:
            metrics[f"negative_bound_k{samples}"] = -self.bound(samples)
        return metrics


def _trainer(name: str, **changes: Any) -> Trainer:
    """Trainer after a few large steps, away from initial values with vanishing terms or round scales."""
    trainer = make_trainer(replace(small_config(name, seed=SEED, learning_rate=2e-2), **changes))
    run_steps(trainer, 0, 8)
    return trainer


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach().double(), value.detach(), rtol=3e-6, atol=3e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "step", "config"),
    [
        *((name, 3, config) for name, (config, _) in EXPLICIT.items()),
        *(("beta-vae with warm-up", step, OBJECTIVES["beta-vae with warm-up"][0]) for step in (0, 7, 20)),
        ("vae", 3, VaeConfig(beta=4.0)),
        ("conditional vae", 3, VaeConfig(conditioning="concat", importance_samples=3)),
    ],
    ids=lambda value: f"beta {value.beta}" if isinstance(value, VaeConfig) else None,
)
def test_loss_logs_and_gradients_of_a_phase_equal_the_paper(name: str, step: int, config: ObjectiveConfig) -> None:
    trainer = _trainer(name, objective=config)
    images = torch.from_numpy(trainer.dataset.train.images[30:45])
    labels = torch.arange(15) % 10
    batch = Batch(images, labels, torch.tensor([SEED, step]), FIRST_ROW)
    (phase,) = trainer.objective.phases().values()
    loss, logs, carried = phase(batch)
    assert carried == {}
    expected_loss, expected_logs = _Reference(trainer, images, labels, step, FIRST_ROW, test=False).training()
    _assert_equal({"the loss": loss} | logs, {"the loss": expected_loss} | expected_logs)
    assert not any(value.requires_grad for value in logs.values())

    parameters = {n: p for n, p in trainer.objective.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()))
    expected = torch.autograd.grad(expected_loss, list(parameters.values()))
    for parameter, ours, theirs in zip(parameters, found, expected, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), parameter


@pytest.mark.parametrize("samples", [1, 3])
def test_the_path_gradient_is_the_total_one_on_average(samples: int) -> None:
    trainer = _trainer("vae", objective=VaeConfig(importance_samples=samples))
    images = torch.from_numpy(trainer.dataset.train.images[30:38])
    (phase,) = trainer.objective.phases().values()
    bias = dict(trainer.objective.named_parameters())["networks.encoder.head.bias"]
    draws: dict[str, Tensor] = {}
    gradients: tuple[GradientEstimator, ...] = ("total", "path")
    for gradient in gradients:
        object.__setattr__(trainer.objective, "config", VaeConfig(importance_samples=samples, gradient=gradient))
        found = []
        for step in range(1500):
            loss, *_ = phase(Batch(images, torch.zeros(8, dtype=torch.int64), torch.tensor([SEED, step]), FIRST_ROW))
            found.append(torch.autograd.grad(loss, bias)[0].double())
        draws[gradient] = torch.stack(found)
    total, path = draws["total"], draws["path"]
    errors = (total - path).std(0) / math.sqrt(len(total))
    assert ((total - path).mean(0).abs() <= 4.5 * errors + 1e-6).all()
    assert not torch.equal(total, path)
    assert total.mean(0).norm() > 5 * errors.norm()  # the comparison is not of noise alone


@every_objective
def test_the_loss_of_a_step_follows_from_its_images_and_noise(objective: str) -> None:
    """Images, step and rows that the trainer gives a phase."""
    trainer = _trainer(objective, accumulation=2)
    chosen = image_indices(len(trainer.dataset.train.images), SEED, 9, 24, 0, 24)
    images, labels = (
        torch.from_numpy(of[chosen]) for of in (trainer.dataset.train.images, trainer.dataset.train.labels)
    )
    _, expected = _Reference(trainer, images, labels, 9, 0, test=False).training()
    _assert_equal(trainer.run_step(9), expected)


@every_objective
def test_evaluation_gives_the_terms_of_the_paper_image_by_image(objective: str) -> None:
    trainer = _trainer(objective)
    split = trainer.dataset.test
    images = torch.from_numpy(split.images[:15].copy())
    labels = torch.from_numpy(split.labels.copy())
    batch = Batch(images, labels[:15], torch.tensor([SEED, 0]), FIRST_ROW)
    with torch.no_grad():
        expected = _Reference(trainer, images, labels[:15], 0, FIRST_ROW, test=True).evaluation()
        _assert_equal(trainer.best_objective.evaluate(batch), expected)
        whole = _Reference(trainer, torch.from_numpy(split.images.copy()), labels, 0, 0, test=True).evaluation()
    means = {name: float(values.mean()) for name, values in whole.items()}
    assert trainer.evaluate(split, decoded_per_batch=16) == pytest.approx(means, rel=3e-6)
