"""The classic adversarial game on one image at a time: non-saturating, least-squares or hinge loss."""

from __future__ import annotations

from torch import Tensor

from gen_dist.config import GanConfig, NetworkConfig
from gen_dist.losses import fake_loss, generator_loss, real_loss
from gen_dist.objectives.adversarial import (
    DISCRIMINATOR_STREAMS,
    GENERATOR_STREAMS,
    Adversarial,
    DiscriminatorPhase,
    GeneratorPhase,
    told_right,
)
from gen_dist.objectives.base import Batch, Phase


class Gan(Adversarial):
    """GAN, conditional GAN, DCGAN, LSGAN, SNGAN: what tells them apart is the loss, the labels and the networks."""

    def __init__(
        self, config: GanConfig, network: NetworkConfig, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__(network, image_shape, classes, config.conditioning, config.augmentation)
        self.config = config

    def phases(self) -> dict[str, Phase]:
        return {"discriminator": TellApart(self), "generator": Deceive(self, self.config.generator_every)}


class TellApart(DiscriminatorPhase):
    """Minimize the loss on real images and on generated ones."""

    objective: Gan

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        game, loss_name = self.objective, self.objective.config.loss
        real, fake = (image_of(batch, DISCRIMINATOR_STREAMS) for image_of in (game.real, game.fake))
        real_scores, fake_scores = game.scores_of_both(real, fake.detach(), batch.labels)
        loss = (real_loss(loss_name, real_scores) + fake_loss(loss_name, fake_scores)).mean()
        threshold = 0.5 if loss_name == "least_squares" else 0.0  # half-way between its two targets
        return loss, {"loss": loss.detach(), **told_right(real_scores, fake_scores, threshold)}


class Deceive(GeneratorPhase):
    """Minimize the loss of generated images that are scored as generated."""

    objective: Gan

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        fake = self.objective.fake(batch, GENERATOR_STREAMS)
        loss = generator_loss(self.objective.config.loss, self.objective.scores(fake, batch.labels)).mean()
        return loss, {"loss": loss.detach()}
