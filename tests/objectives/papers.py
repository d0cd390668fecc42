"""Adversarial objectives written from the equations of their papers, in float64, for tests of ours.

Only the networks, augmentation, which has its own tests, and raw draws are those of gen_dist.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gen_dist.config import (
    AdversarialConfig,
    AutoencoderConfig,
    GanConfig,
    ObjectiveConfig,
    R3ganConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
)
from gen_dist.kernels import Key
from gen_dist.kernels.noise import host_normal
from gen_dist.networks.players import Discriminator, Generator
from gen_dist.networks.r3gan import R3ganDecoder
from gen_dist.networks.stylegan2 import Stylegan2Decoder
from gen_dist.objectives import Batch
from gen_dist.objectives.adversarial import Adversarial
from gen_dist.objectives.augmentation import add_noise, augment
from gen_dist.objectives.random_augmentation import randomly_augment
from gen_dist.randomness import Stream

NOISE_BESIDE = {
    Stream.REAL_AUGMENTATION: Stream.REAL_NOISE,
    Stream.FAKE_AUGMENTATION: Stream.FAKE_NOISE,
    Stream.GENERATOR_REAL_AUGMENTATION: Stream.GENERATOR_REAL_NOISE,
    Stream.GENERATOR_FAKE_AUGMENTATION: Stream.GENERATOR_FAKE_NOISE,
}
RANDOM_BESIDE = {stream: Stream[stream.name.replace("AUGMENTATION", "RANDOM_AUGMENTATION")] for stream in NOISE_BESIDE}

LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "non_saturating": (lambda s: -s.sigmoid().log(), lambda s: -(1 - s.sigmoid()).log(), lambda s: -s.sigmoid().log()),
    "least_squares": (lambda s: (s - 1) ** 2 / 2, lambda s: s**2 / 2, lambda s: (s - 1) ** 2 / 2),
    "hinge": (lambda s: (1 - s).clamp(min=0), lambda s: (1 + s).clamp(min=0), lambda s: -s),
    "wasserstein": (lambda s: -s, lambda s: s, lambda s: -s),
}
"""Losses by scores: the discriminator's on real and on generated images, and the generator's on generated ones."""


class Reference:
    """Terms of one batch, written from the papers."""

    def __init__(self, objective: Adversarial, config: ObjectiveConfig, batch: Batch) -> None:
        """Copy the weights of the objective, whose spectral norms the trainer iterates once per turn."""
        assert not isinstance(config, AutoencoderConfig | VaeConfig)
        self.networks = copy.deepcopy(objective.networks).double()
        self._config = config
        self.labels = batch.labels
        self._seed, self._step = batch.rng.tolist()
        self._batch = batch
        self._latent_dim = objective.latent_shape[0]
        # The generators of Huang et al. 2024 and Karras et al. 2020 end with a linear layer, all others with tanh.
        decoder = objective.networks["generator"].decoder
        of_r3gan = isinstance(decoder, R3ganDecoder) and config.kind == "r3gan"
        self._bounded = not (of_r3gan or isinstance(decoder, Stylegan2Decoder))
        self._training_images = batch.images.double() / 127.5 - 1
        self._adapts = isinstance(config, AdversarialConfig) and config.ada and config.ada_probability is None
        if self._adapts:
            self._probability: Tensor = self.networks["augmentation"].get_buffer("probability")

    def parameters(self, networks: tuple[str, ...]) -> dict[str, nn.Parameter]:
        return {
            f"{network}.{name}": parameter
            for network in networks
            for name, parameter in self.networks[network].named_parameters()
        }

    def _normals(self, stream: Stream, width: int) -> Tensor:
        steps = range(self._step, self._step + 1)
        drawn = host_normal(self._seed, stream, steps, self._batch.first_row, len(self.labels), width)
        return torch.from_numpy(drawn[0]).double()

    def _augmented(self, images: Tensor, stream: Stream) -> Tensor:
        if not isinstance(self._config, AdversarialConfig):
            return images
        rng, first_row = self._batch.rng, self._batch.first_row
        changed = augment(images, self._config.augmentation, Key(rng, stream, first_row))
        if kinds := self._config.ada:
            probability = self._probability if self._config.ada_probability is None else self._config.ada_probability
            key = Key(rng, RANDOM_BESIDE[stream], first_row)
            changed = randomly_augment(changed, kinds, torch.as_tensor(probability), key, self._config.ada_colour)
        return add_noise(changed, self._config.instance_noise, Key(rng, NOISE_BESIDE[stream], first_row))

    def _decode(self, latents: Tensor, noise: Stream | None = None) -> Tensor:
        generator = self.networks["generator"]
        assert isinstance(generator, Generator)
        if getattr(self._config, "conditioning", "none") != "none":
            latents = torch.cat([latents, nn.functional.one_hot(self.labels, 10)], dim=1)
        noisy = noise is not None and isinstance(generator.decoder, Stylegan2Decoder)
        noises = [self._normals(noise, generator.noise_count)] if noise is not None and noisy else []
        decoded: Tensor = generator.decoder(latents, *noises)
        return decoded.tanh() if self._bounded else decoded

    def generated(self, latents: Stream) -> Tensor:
        """Images from latents of the prior, [B, ...]."""
        noise = Stream[latents.name.replace("LATENTS", "LAYER_NOISE")]
        return self._decode(self._normals(latents, self._latent_dim), noise)

    def reconstructions(self) -> Tensor:
        """Images from latents that an earlier turn carried, [B, ...]."""
        return self._decode(self._batch.carried["posterior_latents"].double())

    def _features_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        conditioning = getattr(self._config, "conditioning", "none")
        if conditioning == "concat":
            assert isinstance(discriminator.class_maps, nn.Embedding)
            maps = discriminator.class_maps.weight[self.labels].view(-1, 1, *images.shape[2:])
            images = torch.cat([images, maps], dim=1)
        features = discriminator.encoder.features(images)
        scores = discriminator.encoder.head(features)[:, 0]
        if conditioning == "projection":
            assert isinstance(discriminator.class_vectors, nn.Embedding)
            vectors = discriminator.class_vectors.weight[self.labels]
            products = torch.einsum(
                "bfn,bf->b", features.flatten(2) if features.ndim > 2 else features[:, :, None], vectors
            )
            places = features[0, 0].numel()
            scores = (scores.reshape(len(scores), -1).T + products / places).T.view(scores.shape)
        return features, scores

    def _scores(self, images: Tensor) -> Tensor:
        return self._features_and_scores(images)[1]

    def _slopes(self, images: Tensor, augmentation: Stream | None = None) -> Tensor:
        """|d score / d image| of each image before augmentation: [B]."""
        images = images.detach().requires_grad_()
        seen = images if augmentation is None else self._augmented(images, augmentation)
        (gradients,) = torch.autograd.grad(of_images(self._scores(seen)).sum(), images, create_graph=True)
        return gradients.flatten(1).norm(dim=1)

    def discriminator_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [] and logs: Goodfellow et al. 2014, eq. 1; Mao et al. 2017; Lim & Ye 2017; Gulrajani et al. 2017."""
        real = self._augmented(self._training_images, Stream.REAL_AUGMENTATION)
        generated = self._batch.carried.get("generated", self.generated(Stream.DISCRIMINATOR_LATENTS).detach())
        generated = generated.double()
        fake = self._augmented(generated, Stream.FAKE_AUGMENTATION)
        real_scores, fake_scores = self._scores(real), self._scores(fake)
        logs = {"scores_real": of_images(real_scores), "scores_fake": of_images(fake_scores)}
        penalized = self._batch.penalized
        if self._adapts:  # Karras et al. 2020a, section 3.1; of pairs for a loss of pairs
            zero = fake_scores if isinstance(self._config, R3ganConfig) else 0.0
            logs |= {"augmentation_probability": self._probability, "real_sign": (real_scores - zero).sign().mean()}
        if isinstance(self._config, GanConfig):
            on_real, on_fake, _ = LOSSES[self._config.loss]
            loss = on_real(real_scores).mean() + on_fake(fake_scores).mean()
            if penalized and self._config.penalty_weight:  # Mescheder et al. 2018, eq. 9
                logs["r1"] = (self._slopes(self._training_images, Stream.REAL_AUGMENTATION) ** 2).mean()
                loss = loss + self._config.penalty_weight / 2 * self._config.penalty_every * logs["r1"]
            return loss, logs | _accuracies(real_scores, fake_scores, 0.5 * (self._config.loss == "least_squares"))
        if isinstance(self._config, VaeGanConfig):
            reconstructions = self._batch.carried["reconstructions"].double()
            on_real, on_fake, _ = LOSSES["non_saturating"]
            terms = on_real(real_scores), on_fake(self._scores(reconstructions)), on_fake(fake_scores)
            return torch.stack(terms).sum(0).mean(), logs | _accuracies(real_scores, fake_scores, 0.0)
        logs["accuracy"] = (real_scores > fake_scores).double().mean()
        if isinstance(self._config, WganGpConfig):  # algorithm 1, line 7
            loss = fake_scores.mean() - real_scores.mean()
            logs["distance"] = -loss
            if penalized:
                share = torch.special.ndtr(self._normals(Stream.PENALTY_MIX, 1))[:, :, None, None]
                penalty = ((self._slopes(share * real + (1 - share) * fake) - 1) ** 2).mean()
                logs["penalty"] = penalty
                loss = loss + self._config.penalty_weight * self._config.penalty_every * penalty
            return loss, logs
        assert isinstance(self._config, R3ganConfig)  # Huang et al. 2024, eq. 2 and section 2.2
        loss = -logsigmoid(real_scores - fake_scores).mean()
        if penalized:
            logs["r1"] = (self._slopes(self._training_images, Stream.REAL_AUGMENTATION) ** 2).mean()
            logs["r2"] = (self._slopes(generated, Stream.FAKE_AUGMENTATION) ** 2).mean()
            weight = self._config.penalty_weight / 2 * self._config.penalty_every
            loss = loss + weight * (logs["r1"] + logs["r2"])
        return loss, logs

    critic_phase = discriminator_phase

    def generator_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        generated = self.generated(Stream.GENERATOR_LATENTS)
        fake_scores = self._scores(self._augmented(generated, Stream.GENERATOR_FAKE_AUGMENTATION))
        if isinstance(self._config, R3ganConfig):
            real = self._augmented(self._training_images, Stream.GENERATOR_REAL_AUGMENTATION)
            return -logsigmoid(fake_scores - self._scores(real)).mean(), {}
        if isinstance(self._config, VaeGanConfig):  # Larsen et al. 2016, algorithm 1
            seen, scores = self._features_and_scores(self.reconstructions())
            error = _feature_error(self._batch.carried["real_features"].double(), seen)
            deceit = -logsigmoid(scores).mean() - logsigmoid(fake_scores).mean()
            return self._config.reconstruction_weight * error + deceit, {"feature_error": error}
        loss = self._config.loss if isinstance(self._config, GanConfig) else "wasserstein"
        return LOSSES[loss][2](fake_scores).mean(), {}

    def encoder_phase(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(self._config, VaeGanConfig)
        latents, kl = self.posterior()
        error = _feature_error(self.real_features(), self._features_and_scores(self._decode(latents))[0])
        return self._config.beta * kl + error, {"feature_error": error, "kl": kl}

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Latents [B, D] drawn from the posterior, and the mean KL []."""
        mean, logvar = self.networks["encoder"](self._training_images).chunk(2, dim=1)
        posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
        latents = mean + posterior.scale * self._normals(Stream.LATENTS, self._latent_dim)
        return latents, torch.distributions.kl_divergence(posterior, prior).sum(1).mean()

    def real_features(self) -> Tensor:
        """Discriminator features of training images, [B, F]."""
        return self._features_and_scores(self._training_images)[0]


def of_images(scores: Tensor) -> Tensor:
    """Scores of images [B]: means over their patches, if those are scored."""
    return scores.reshape(len(scores), -1).mean(1)


def _feature_error(real: Tensor, seen: Tensor) -> Tensor:
    """Mean of -log N(f(x); f(x~), I) over features [B, F, ...], up to a constant."""
    real, seen = real.flatten(1), seen.flatten(1)
    constant = real.shape[1] * math.log(2 * math.pi) / 2
    return -torch.distributions.Normal(seen, 1.0).log_prob(real).sum(1).mean() - constant


def _accuracies(real_scores: Tensor, fake_scores: Tensor, threshold: float) -> dict[str, Tensor]:
    return {
        "accuracy_real": (real_scores > threshold).double().mean(),
        "accuracy_fake": (fake_scores <= threshold).double().mean(),
    }


def reference_of(objective: Adversarial, config: ObjectiveConfig, phase: str, batch: Batch) -> Any:
    """Networks of the reference, and its loss and all logs after the phase."""
    reference = Reference(objective, config, batch)
    loss, logs = getattr(reference, f"{phase}_phase")()
    return reference, loss, {"loss": loss, **logs}
