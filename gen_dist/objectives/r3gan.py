"""R3GAN: relativistic pairing loss, zero-centred penalties at real and at generated images (Huang et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.config import NetworkConfig, R3ganConfig
from gen_dist.losses import relativistic_loss, zero_centred_penalty
from gen_dist.objectives.adversarial import (
    DISCRIMINATOR_STREAMS,
    GENERATOR_STREAMS,
    Adversarial,
    DiscriminatorPhase,
    GeneratorPhase,
    pairs_told_right,
    slopes_and_scores,
)
from gen_dist.objectives.base import Batch, Phase


class R3gan(Adversarial):
    """Each generated image is compared with a real one, so that no mode of the data can be left out cheaply."""

    def __init__(
        self, config: R3ganConfig, network: NetworkConfig, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        # As in the paper, the generator's last layer is linear.
        super().__init__(network, image_shape, classes, config.conditioning, config.augmentation, bounded=False)
        self.config = config
        self.refuse_batch_norm()

    def phases(self) -> dict[str, Phase]:
        return {"discriminator": TellPairsApart(self), "generator": WinPairs(self)}


class TellPairsApart(DiscriminatorPhase):
    """Minimize the pairing loss plus gamma / 2 times R1 + R2 (Huang et al. 2024, eq. 2 and section 2.2)."""

    objective: R3gan

    def __init__(self, objective: R3gan) -> None:
        super().__init__(objective)
        self.penalty_every = objective.config.penalty_every

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        game, config = self.objective, self.objective.config
        real, fake = game.real(batch, DISCRIMINATOR_STREAMS), game.fake(batch, DISCRIMINATOR_STREAMS).detach()
        if not batch.penalized:
            real_scores, fake_scores = game.scores_of_both(real, fake, batch.labels)
            loss = relativistic_loss(real_scores, fake_scores).mean()
            return loss, {"loss": loss.detach(), **pairs_told_right(real_scores, fake_scores)}
        labels = torch.cat([batch.labels, batch.labels])
        slopes, scores = slopes_and_scores(lambda images: game.scores(images, labels), torch.cat([real, fake]))
        real_scores, fake_scores = scores.chunk(2)
        r1, r2 = (penalty.mean() for penalty in zero_centred_penalty(slopes).chunk(2))
        weight = 0.5 * config.penalty_weight * config.penalty_every
        loss = relativistic_loss(real_scores, fake_scores).mean() + weight * (r1 + r2)
        logs = pairs_told_right(real_scores, fake_scores)
        return loss, {"loss": loss.detach(), **logs, "r1": r1.detach(), "r2": r2.detach()}


class WinPairs(GeneratorPhase):
    """Minimize the pairing loss with the roles exchanged."""

    objective: R3gan

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        real = self.objective.real(batch, GENERATOR_STREAMS)
        fake = self.objective.fake(batch, GENERATOR_STREAMS)
        real_scores, fake_scores = self.objective.scores_of_both(real, fake, batch.labels)
        loss = relativistic_loss(fake_scores, real_scores).mean()
        return loss, {"loss": loss.detach()}
