"""VAE-GAN: reconstructions are compared in the discriminator's features (Larsen et al. 2016, algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from gen_dist.config import AdversarialConfig, Roles, VaeGanConfig
from gen_dist.kernels import reparameterize_kl
from gen_dist.networks import build_encoder
from gen_dist.networks.players import Discriminator
from gen_dist.objectives.adversarial import (
    GENERATED,
    GENERATOR_STREAMS,
    Adversarial,
    DiscriminatorPhase,
    GeneratorPhase,
    accuracy_logs,
    signed_unit,
)
from gen_dist.objectives.losses import fake_loss, generator_loss, real_loss, squared_error
from gen_dist.objectives.phase import Batch, Phase, TurnResult, unit_interval
from gen_dist.randomness import Stream

POSTERIOR_LATENTS, REAL_FEATURES = "posterior_latents", "real_features"
"""Names of the tensors carried from the encoder's turn, float [B, *latent_shape] and [B, F]."""
RECONSTRUCTIONS = "reconstructions"
"""Name of the carried reconstructions of the generator's turn: float32 [B, C, H, W] in -1..1."""


class VaeGan(Adversarial):
    """A VAE with a generator as decoder, and a discriminator with features that measure reconstructions."""

    config: VaeGanConfig

    def __init__(self, config: VaeGanConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(AdversarialConfig(), roles, image_shape, classes)
        self.config = config
        roles.shared_latent_shape("generator", image_shape)
        self.networks["encoder"] = build_encoder(roles.encoder, image_shape, outputs=2 * self.latent_shape[0])

    def phases(self) -> dict[str, Phase]:
        return {
            "encoder": VaeGanEncoderPhase(self),
            "generator": VaeGanGeneratorPhase(self),
            "discriminator": VaeGanDiscriminatorPhase(self),
        }

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.networks["encoder"](signed_unit(images)).float().chunk(2, dim=1)
        return mean, logvar

    def draw_latents(self, batch: Batch, stream: Stream) -> tuple[Tensor, Tensor]:
        """Draw latents [B, *latent_shape] from the posterior, and compute the KL in nats [B]."""
        parameters = self.networks["encoder"](signed_unit(batch.images))
        return reparameterize_kl(parameters, batch.key(stream))

    def features_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Discriminator features [B, F] and scores [B] of images."""
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        return discriminator.features_and_scores(images, None)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        latents, kl_nats = self.draw_latents(batch, Stream.TEST_LATENTS)
        error = squared_error(self.pixels(self.decode(latents)), unit_interval(batch.images))
        return {"reconstruction_error": error, "kl": kl_nats}


class VaeGanEncoderPhase(Phase):
    """Minimize beta * KL plus the error of the features, -log N(f(x); f(x~), I) up to a constant."""

    objective: VaeGan
    logs_gradient_norm = True

    def __init__(self, objective: VaeGan) -> None:
        super().__init__(objective)
        self.trains = ("encoder",)

    def forward(self, batch: Batch) -> TurnResult:
        objective = self.objective
        latents, kl_nats = objective.draw_latents(batch, Stream.LATENTS)
        real_features, _ = objective.features_and_scores(signed_unit(batch.images))
        features, _ = objective.features_and_scores(objective.decode(latents))
        error, kl = 0.5 * squared_error(features, real_features).mean(), kl_nats.mean()
        loss = objective.config.beta * kl + error
        logs = {"loss": loss.detach(), "feature_error": error.detach(), "kl": kl.detach()}
        return TurnResult(loss, logs, {POSTERIOR_LATENTS: latents.detach(), REAL_FEATURES: real_features.detach()})


class VaeGanGeneratorPhase(GeneratorPhase):
    """Minimize gamma times the error of the features, plus the loss of the scores of reconstructions and samples."""

    objective: VaeGan

    def forward(self, batch: Batch) -> TurnResult:
        objective = self.objective
        reconstructions = objective.decode(batch.carried[POSTERIOR_LATENTS])
        generated = objective.generate(batch, GENERATOR_STREAMS.latents)
        features, scores = objective.features_and_scores(reconstructions)
        fake_scores = objective.scores(generated, batch.labels)
        error = 0.5 * squared_error(features, batch.carried[REAL_FEATURES]).mean()
        deceit = (generator_loss("non_saturating", scores) + generator_loss("non_saturating", fake_scores)).mean()
        loss = objective.config.reconstruction_weight * error + deceit
        made = {RECONSTRUCTIONS: reconstructions.detach(), GENERATED: generated.detach()}
        return TurnResult(loss, {"loss": loss.detach(), "feature_error": error.detach()}, made)


class VaeGanDiscriminatorPhase(DiscriminatorPhase):
    """Minimize the loss of the scores of training images, reconstructions and samples."""

    objective: VaeGan

    def forward(self, batch: Batch) -> TurnResult:
        objective = self.objective
        shown = signed_unit(batch.images), batch.carried[RECONSTRUCTIONS], batch.carried[GENERATED]
        real_scores, scores, fake_scores = (objective.scores(images, batch.labels) for images in shown)
        loss = (
            real_loss("non_saturating", real_scores)
            + fake_loss("non_saturating", scores)
            + fake_loss("non_saturating", fake_scores)
        ).mean()
        return TurnResult(loss, {"loss": loss.detach(), **accuracy_logs(real_scores, fake_scores, threshold=0.0)})
