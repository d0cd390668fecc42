"""The classic adversarial game on one image at a time: non-saturating, least-squares or hinge loss."""

from __future__ import annotations

from gen_dist.config import GanConfig, NetworkConfig
from gen_dist.losses import fake_loss, real_loss
from gen_dist.objectives.adversarial import JUDGED, Adversarial, DiscriminatorPhase, GeneratorLossPhase, told_right
from gen_dist.objectives.base import Batch, Phase, TurnResult


class Gan(Adversarial):
    """GAN, conditional GAN, DCGAN, LSGAN, SNGAN: what tells them apart is the loss, the labels and the networks."""

    def __init__(
        self, config: GanConfig, network: NetworkConfig, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__(network, image_shape, classes, config.conditioning, config.augmentation, config.instance_noise)
        self.config = config

    def phases(self) -> dict[str, Phase]:
        config = self.config
        generator = GeneratorLossPhase(self, config.loss, config.generator_every)
        return {"generator": generator, "discriminator": GanDiscriminatorPhase(self)}


class GanDiscriminatorPhase(DiscriminatorPhase):
    """Minimize the loss on real images and on generated ones."""

    objective: Gan

    def forward(self, batch: Batch) -> TurnResult:
        game, loss_name = self.objective, self.objective.config.loss
        real, fake = self.as_seen(*self.real_and_fake(batch), batch)
        if JUDGED in batch.handed_on:
            real_scores, fake_scores = game.scores(real, batch.labels), batch.handed_on[JUDGED]
        else:
            real_scores, fake_scores = game.scores_of_both(real, fake, batch.labels)
        loss = (real_loss(loss_name, real_scores) + fake_loss(loss_name, fake_scores)).mean()
        threshold = 0.5 if loss_name == "least_squares" else 0.0  # half-way between its two targets
        return TurnResult(loss, {"loss": loss.detach(), **told_right(real_scores, fake_scores, threshold)})
