"""Latent autoencoders against the equations, in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from gen_dist.config import AutoencoderKlConfig, LatentAutoencoderConfig, PatchganConfig, TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.kernels.noise import host_normal
from gen_dist.objectives import Batch, latent_autoencoder
from gen_dist.objectives.latent_autoencoder import LatentAutoencoder
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer
from tests.support.runs import SMALL_MLP, make_trainer, run_steps, small_config

SEED, STEP, FIRST_ROW = 21, 3, 6  # a seed at which no pixel's error changes its sign by rounding
NETWORK = AutoencoderKlConfig(feature_maps=(4, 8), latent_dim=2, blocks=1, groups=2, middle_attention=False)
PATCHES = PatchganConfig(feature_maps=4, layers=2, discriminator_norm="none")
CONFIGS = {
    "kl": LatentAutoencoderConfig(kl_weight=0.3),
    "kl, squared error, fixed scale": LatentAutoencoderConfig(kl_weight=2.0, reconstruction="l2", log_scale=-0.7),
    "none, learned scale": LatentAutoencoderConfig(bottleneck="none", log_scale=None),
    "vq, by gradient": LatentAutoencoderConfig(
        bottleneck="vq", codebook_size=16, codebook_update="gradient", codebook_weight=1.7, commitment=0.4
    ),
    "vq, moving averages": LatentAutoencoderConfig(bottleneck="vq", codebook_size=16, adversarial_weight=0.5),
    "fsq": LatentAutoencoderConfig(bottleneck="fsq", fsq_levels=(5, 4)),
    "perceptual": LatentAutoencoderConfig(perceptual_weight=0.7),
    "fixed adversary": LatentAutoencoderConfig(
        adversarial_weight=30.0, adaptive_weight=False, adversarial_loss="non_saturating"
    ),
    "adaptive adversary": LatentAutoencoderConfig(adversarial_weight=0.5, kl_weight=0.1),
    "adaptive adversary, perceptual, learned scale": LatentAutoencoderConfig(
        adversarial_weight=0.8, perceptual_weight=0.2, log_scale=None, adversarial_loss="non_saturating"
    ),
    "adaptive adversary at its limit": LatentAutoencoderConfig(adversarial_weight=0.5, adaptive_limit=20.0),
}
ADVERSARIAL = [name for name, config in CONFIGS.items() if config.adversarial_weight]


class KnownFeatures:
    """A perceptual distance with a known equation, in the place of a network's."""

    weight = torch.linspace(-1.0, 1.0, 3 * 9).view(3, 1, 3, 3).double()

    def copy_to(self, device: torch.device) -> None:
        """See PerceptualDistance."""

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mean square of the difference's convolution, [B]."""
        maps = torch.conv2d(images - targets, self.weight.to(images.dtype))
        return maps.square().flatten(1).mean(1)


@pytest.fixture(autouse=True)
def known_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_autoencoder, "perceptual_distance", lambda _name, _file: KnownFeatures())


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
        if self.config.bottleneck == "vq":
            return self._vector_quantized(encoded)
        if self.config.bottleneck == "fsq":
            return self._rounded(encoded), torch.zeros(len(encoded)).double()
        mean, logvar = encoded.chunk(2, dim=1)
        seed, step = self._batch.rng.tolist()
        drawn = host_normal(
            seed, self._stream, range(step, step + 1), self._batch.first_row, len(mean), math.prod(self._shape)
        )
        posterior = Independent(Normal(mean, (logvar / 2).exp()), len(self._shape))
        prior = Independent(Normal(torch.zeros_like(mean), 1.0), len(self._shape))
        noise = torch.from_numpy(drawn[0]).double().view_as(mean)
        return mean + (logvar / 2).exp() * noise, kl_divergence(posterior, prior)

    def _vector_quantized(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """van den Oord et al. 2017, eq. 3, or with moving averages its last term alone."""
        codebook: Tensor = self.networks["decoder"].bottleneck.codebook  # type: ignore[union-attr,assignment]
        distances = (encoded[:, None] - codebook[None, :, :, None, None]).square().sum(2)
        quantized = codebook[distances.argmin(1)].permute(0, 3, 1, 2)
        self.quantization_error = (quantized - encoded).square().sum(dim=(1, 2, 3)).mean()
        penalty = self.config.commitment * (quantized.detach() - encoded).square().sum(dim=(1, 2, 3))
        if self.config.codebook_update == "gradient":
            penalty = penalty + (quantized - encoded.detach()).square().sum(dim=(1, 2, 3))
        return encoded + (quantized - encoded).detach(), self.config.codebook_weight * penalty

    def _rounded(self, encoded: Tensor) -> Tensor:
        """Mentzer et al. 2023, appendix A.1, with levels 5 and 4: -2..2 and -2..1, divided by 2."""
        reach = torch.tensor([2.0, 1.5]).double()[:, None, None] * 0.999
        offset = torch.tensor([0.0, 0.5]).double()[:, None, None]
        bounded = torch.tanh(encoded + torch.atanh(offset / reach)) * reach - offset
        return (bounded + (bounded.round() - bounded).detach()) / 2

    def scale(self) -> Tensor:
        if self.config.log_scale is not None:
            return torch.tensor(self.config.log_scale).double()
        scale: Tensor = self.networks["scale"].log_scale  # type: ignore[assignment]
        return scale

    def scores(self, images: Tensor) -> Tensor:
        """Logits of patches, [B, 1, h, w]."""
        logits: Tensor = self.networks["discriminator"].encoder(images)  # type: ignore[operator]
        return logits

    def autoencoder_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs: sums over pixels and latents, means over images."""
        latents, penalty = self.latents_and_penalty()
        self.decoded = self.networks["decoder"](latents)
        errors = (self.decoded - self.images).abs()
        errors = errors if self.config.reconstruction == "l1" else errors**2
        logs = {"reconstruction_error": errors.sum(dim=(1, 2, 3)).mean()}
        if self.config.perceptual_weight:
            distance = KnownFeatures().distance(self.decoded, self.images)
            logs["perceptual_distance"] = distance.mean()
            errors = errors + self.config.perceptual_weight * distance[:, None, None, None]
        nll = (errors / self.scale().exp() + self.scale()).sum(dim=(1, 2, 3)).mean()
        loss = nll + (self.config.kl_weight if self.config.bottleneck == "kl" else 1.0) * penalty.mean()
        if self.config.adversarial_weight:
            scores = self.scores(self.decoded)
            logistic = torch.nn.functional.logsigmoid
            deceit = -(scores if self.config.adversarial_loss == "hinge" else logistic(scores)).mean()
            logs["adversarial"] = deceit
            weight = torch.tensor(self.config.adversarial_weight).double()
            if self.config.adaptive_weight:
                last = self.networks["decoder"].conv_out.weight  # type: ignore[union-attr]
                norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, deceit)]  # type: ignore[arg-type]
                weight = weight * (norms[0] / (norms[1] + 1e-4)).clamp(0, self.config.adaptive_limit)
                logs["adaptive_weight"] = weight
            loss = loss + weight * deceit
        if self.config.bottleneck == "kl":
            logs["kl"] = penalty.mean()
        if self.config.bottleneck == "vq":
            logs["quantization_error"] = self.quantization_error
        return loss, logs | {"loss": loss}

    def discriminator_phase(self, decoded: Tensor) -> Tensor:
        """Half the loss of both kinds of images."""
        real, fake = self.scores(self.images), self.scores(decoded.double())
        if self.config.adversarial_loss == "hinge":
            return ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
        return -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()) / 2


def _config(name: str, **changes: object) -> TrainConfig:
    config = replace(small_config("autoencoder"), seed=SEED, objective=CONFIGS[name], network=NETWORK)
    return replace(config, **({"discriminator": PATCHES} | changes))  # type: ignore[arg-type]


def _trained(name: str) -> Trainer:
    """Trainer after a few large steps, away from initial values with vanishing terms or round scales."""
    trainer = make_trainer(_config(name, learning_rate=3e-3))
    run_steps(trainer, 0, 6)
    return trainer


def _batch(trainer: Trainer, rows: int = 15) -> Batch:
    images = torch.from_numpy(trainer.dataset.train.images[30 : 30 + rows])
    return Batch(images, torch.zeros(rows, dtype=torch.int64), torch.tensor([SEED, STEP]), FIRST_ROW)


def _assert_equal_gradients(
    names: list[str], trainer: Trainer, loss: Tensor, reference: _Reference, expected: Tensor
) -> None:
    """Errors are at most 1e-5 of the whole gradient, and 1e-4 of a parameter's, whose sums may cancel out."""
    found = torch.autograd.grad(loss, [trainer.objective.networks.get_parameter(name) for name in names])
    wanted = torch.autograd.grad(expected, [reference.networks.get_parameter(name) for name in names])
    norms = torch.stack([theirs.norm() for theirs in wanted])
    errors = torch.stack([(ours - theirs).norm() for ours, theirs in zip(found, wanted, strict=True)])
    assert errors.norm() <= 1e-5 * norms.norm()
    for name, error, norm in zip(names, errors.tolist(), norms.tolist(), strict=True):
        assert error <= 1e-4 * norm + 1e-6 * float(norms.norm()), name


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_weight_and_gradients_equal_the_equations(name: str) -> None:
    trainer = _trained(name)
    networks, batch = trainer.objective.networks, _batch(trainer)
    phases = trainer.objective.phases()
    reference = _Reference(trainer, batch)
    names = [n for n, p in networks.named_parameters() if p.requires_grad and not n.startswith("discriminator")]
    networks.requires_grad_(False)
    for parameter in names:
        networks.get_parameter(parameter).requires_grad_()
    loss, logs, carried = phases["autoencoder"](batch)
    expected, expected_logs = reference.autoencoder_phase()
    assert logs.keys() == expected_logs.keys()
    for key, value in {"loss": loss, **logs}.items():
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(value.detach().double(), expected_logs[key].detach(), **close, msg=key)  # type: ignore[arg-type]
    if name == "adaptive adversary at its limit":
        assert logs["adaptive_weight"] == 0.5 * 20.0
    _assert_equal_gradients(names, trainer, loss, reference, expected)
    assert ("reconstructions" in carried) == (name in ADVERSARIAL)

    if name in ADVERSARIAL:
        torch.testing.assert_close(carried["reconstructions"].double(), reference.decoded.detach(), rtol=0, atol=1e-5)
        networks.requires_grad_(False)["discriminator"].requires_grad_()
        loss, logs, _ = phases["discriminator"](batch._replace(carried=carried))
        expected = reference.discriminator_phase(carried["reconstructions"])
        torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
        names = [n for n, _ in networks.named_parameters() if n.startswith("discriminator")]
        _assert_equal_gradients(names, trainer, loss, reference, expected)


@pytest.mark.parametrize("name", ["kl", "kl, squared error, fixed scale", "none, learned scale"])
def test_evaluation_decodes_the_posterior_mean(name: str) -> None:
    trainer = _trained(name)
    objective = trainer.objective
    assert isinstance(objective, LatentAutoencoder)
    batch = _batch(trainer, rows=4)
    with torch.no_grad():
        found = objective.evaluate(batch)
        means, _ = objective.encode(batch.images)
        errors = (objective.decode(means).double() - batch.images.double() / 127.5 + 1).abs()
    errors = errors if CONFIGS[name].reconstruction == "l1" else errors**2
    torch.testing.assert_close(found["reconstruction_error"].double(), errors.sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    if "kl" in found:
        with torch.no_grad():
            kl_nats = _Reference(trainer, batch).latents_and_penalty()[1]
        torch.testing.assert_close(found["kl"].double(), kl_nats, rtol=1e-5, atol=1e-5)


def test_the_adversary_begins_at_its_step() -> None:
    name = "adaptive adversary"
    begun = replace(CONFIGS[name], adversarial_start=2)
    trainer = make_trainer(_config(name, objective=begun))
    before = {n: p.clone() for n, p in trainer.objective.networks["discriminator"].named_parameters()}
    logs = [trainer.run_step(step) for step in range(4)]
    assert ["autoencoder/adversarial" in row for row in logs] == [False, False, True, True]
    assert ["discriminator/loss" in row for row in logs] == [False, False, True, True]
    assert all(not torch.equal(p, before[n]) for n, p in trainer.objective.networks["discriminator"].named_parameters())
    steps = {value for key, value in trainer.tensors()["optimizer-discriminator"].items() if key.endswith(":step")}
    assert {float(step) for step in steps} == {2.0}
    plain = make_trainer(_config(name, objective=replace(begun, adversarial_weight=0.0)))
    assert run_steps(plain, 0, 2) == [float(row["autoencoder/loss"]) for row in logs[:2]]


def test_a_run_that_ends_before_the_discriminator_is_one_line() -> None:
    objective = replace(CONFIGS["adaptive adversary"], adversarial_start=50)
    line = (
        "adversarial_start 50 is after the last step, 49: .* use more steps, an earlier start, or adversarial_weight 0"
    )
    with pytest.raises(ConfigError, match=line):
        _config("adaptive adversary", objective=objective)
    _config("adaptive adversary", objective=objective, steps=51)


def test_an_adaptive_weight_needs_a_last_convolution() -> None:
    config = _config("adaptive adversary", network=SMALL_MLP, discriminator=SMALL_MLP)
    with pytest.raises(ConfigError, match="MlpDecoder does not say that it does; use --no-adaptive-weight"):
        make_trainer(config)


def test_a_codebook_larger_than_the_batch_is_one_line() -> None:
    vq = LatentAutoencoderConfig(bottleneck="vq", codebook_size=4705)
    line = r"codebook_size 4705 is more than the 4704 places of latents in a batch of 24 images; use at most 4704 codes"
    with pytest.raises(ConfigError, match=line):
        make_trainer(_config("kl", objective=vq))


def test_levels_for_other_channels_are_one_line() -> None:
    fsq = LatentAutoencoderConfig(bottleneck="fsq")
    with pytest.raises(ConfigError, match="fsq_levels names 4 channels, and latents have 2; use --latent-dim 4"):
        make_trainer(_config("kl", objective=fsq))
