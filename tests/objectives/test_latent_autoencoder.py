"""Latent autoencoders against the equations, in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from gen_dist.config import ConvConfig, LatentAutoencoderConfig, TrainConfig
from gen_dist.kernels.noise import host_normal
from gen_dist.objectives import Batch
from gen_dist.objectives.latent_autoencoder import LatentAutoencoder
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer
from tests.support.runs import make_trainer, run_steps, small_config

SEED, STEP, FIRST_ROW = 11, 3, 6
SMALL_CONV = ConvConfig(feature_maps=(4, 8), hidden_size=16, latent_dim=5)
CONFIGS = {
    "kl": LatentAutoencoderConfig(kl_weight=0.3),
    "kl, squared error, fixed scale": LatentAutoencoderConfig(kl_weight=2.0, reconstruction="l2", log_scale=-0.7),
    "none, learned scale": LatentAutoencoderConfig(bottleneck="none", log_scale=None),
}


class _Reference:
    """Losses of a batch, from the equations. Only the networks and the raw draws are those of gen_dist."""

    def __init__(self, trainer: Trainer, batch: Batch, stream: Stream = Stream.LATENTS) -> None:
        assert isinstance(trainer.config.objective, LatentAutoencoderConfig)
        self.config = trainer.config.objective
        self.networks = copy.deepcopy(trainer.objective.networks).double().requires_grad_()
        self._shape = trainer.objective.latent_shape
        self._batch, self._stream = batch, stream
        self.images = batch.images.double() / 127.5 - 1

    def latents_and_penalty(self) -> tuple[Tensor, Tensor]:
        """Latents, and the penalty summed over an image's latents, [B]."""
        encoded = self.networks["encoder"](self.images)
        if self.config.bottleneck == "none":
            return encoded, torch.zeros(len(encoded)).double()
        mean, logvar = encoded.chunk(2, dim=1)
        seed, step = self._batch.rng.tolist()
        drawn = host_normal(
            seed, self._stream, range(step, step + 1), self._batch.first_row, len(mean), math.prod(self._shape)
        )
        posterior = Independent(Normal(mean, (logvar / 2).exp()), len(self._shape))
        prior = Independent(Normal(torch.zeros_like(mean), 1.0), len(self._shape))
        noise = torch.from_numpy(drawn[0]).double().view_as(mean)
        return mean + (logvar / 2).exp() * noise, kl_divergence(posterior, prior)

    def scale(self) -> Tensor:
        if self.config.log_scale is not None:
            return torch.tensor(self.config.log_scale).double()
        scale: Tensor = self.networks["scale"].log_scale  # type: ignore[assignment]
        return scale

    def autoencoder_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs: sums over pixels and latents, means over images."""
        latents, penalty = self.latents_and_penalty()
        errors = (self.networks["decoder"](latents) - self.images).abs()
        errors = errors if self.config.reconstruction == "l1" else errors**2
        nll = (errors / self.scale().exp() + self.scale()).sum(dim=(1, 2, 3)).mean()
        logs = {"reconstruction_error": errors.sum(dim=(1, 2, 3)).mean()}
        if self.config.bottleneck == "kl":
            logs["kl"] = penalty.mean()
        return nll + self.config.kl_weight * penalty.mean(), logs


def _config(name: str) -> TrainConfig:
    return replace(small_config("autoencoder"), seed=SEED, objective=CONFIGS[name], network=SMALL_CONV)


def _trained(name: str) -> Trainer:
    """Trainer after a few large steps, away from initial values with vanishing terms or round scales."""
    trainer = make_trainer(replace(_config(name), learning_rate=1e-2))
    run_steps(trainer, 0, 8)
    return trainer


def _batch(trainer: Trainer, rows: int = 15) -> Batch:
    images = torch.from_numpy(trainer.dataset.train.images[30 : 30 + rows])
    return Batch(images, torch.zeros(rows, dtype=torch.int64), torch.tensor([SEED, STEP]), FIRST_ROW)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_logs_and_gradients_equal_the_equations(name: str) -> None:
    trainer = _trained(name)
    batch = _batch(trainer)
    phase = trainer.objective.phases()["autoencoder"]
    loss, logs, _ = phase(batch)
    reference = _Reference(trainer, batch)
    expected_loss, expected_logs = reference.autoencoder_phase()
    expected_logs["loss"] = expected_loss
    assert logs.keys() == expected_logs.keys()
    for key, value in {"the loss": loss, **logs}.items():
        expected = expected_logs[key.removeprefix("the ")].detach()
        torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=1e-5, msg=key)
    names = [n for n, p in trainer.objective.networks.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [trainer.objective.networks.get_parameter(n) for n in names])
    wanted = torch.autograd.grad(expected_loss, [reference.networks.get_parameter(n) for n in names])
    for parameter, ours, theirs in zip(names, found, wanted, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_decodes_the_posterior_mean(name: str) -> None:
    trainer = _trained(name)
    objective = trainer.objective
    assert isinstance(objective, LatentAutoencoder)
    batch = _batch(trainer, rows=4)
    with torch.no_grad():
        found = objective.evaluate(batch)
        means, _ = objective.encode(batch.images)
        errors = (objective.decode(means).double() - batch.images.double() / 127.5 + 1).abs()
    errors = errors if trainer.config.objective.reconstruction == "l1" else errors**2  # type: ignore[attr-defined]
    torch.testing.assert_close(found["reconstruction_error"].double(), errors.sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    if "kl" in found:
        with torch.no_grad():
            kl_nats = _Reference(trainer, batch).latents_and_penalty()[1]
        torch.testing.assert_close(found["kl"].double(), kl_nats, rtol=1e-5, atol=1e-5)
