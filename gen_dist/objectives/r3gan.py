"""R3GAN: relativistic pairing loss, with zero-centred penalties at real and generated images (Huang et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.config import R3ganConfig, ResnetConfig, Roles
from gen_dist.config.labels import LabelScheme
from gen_dist.objectives.adversarial import (
    GENERATED,
    GENERATOR_STREAMS,
    Adversarial,
    DiscriminatorPhase,
    GeneratorPhase,
    pair_accuracy_logs,
    signed_unit,
    slopes_and_scores,
)
from gen_dist.objectives.losses import relativistic_loss, zero_centred_penalty
from gen_dist.objectives.phase import Batch, Phase, TurnResult


class R3gan(Adversarial):
    """Relativistic pairing GAN: it compares each generated image with a real one, which penalizes mode collapse."""

    config: R3ganConfig
    takes_any_labels = True

    def __init__(
        self, config: R3ganConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int | LabelScheme
    ) -> None:
        # The paper's generator ends with a linear layer; other networks end as in their papers.
        bounded = not (isinstance(roles.generator, ResnetConfig) and roles.generator.block == "r3gan")
        super().__init__(config, roles, image_shape, classes, bounded=bounded)
        self.refuse_unpenalizable()

    def phases(self) -> dict[str, Phase]:
        return {"generator": R3ganGeneratorPhase(self), "discriminator": R3ganDiscriminatorPhase(self)}


class R3ganDiscriminatorPhase(DiscriminatorPhase):
    """Minimize the pairing loss plus gamma / 2 times R1 + R2 (Huang et al. 2024, eq. 2 and section 2.2).

    The slopes are taken at the images before augmentation. Scores have no zero point, so the probability of
    augmentations follows the signs of the pairs' differences.
    """

    objective: R3gan

    def __init__(self, objective: R3gan) -> None:
        super().__init__(objective)
        self.penalty_every = objective.config.penalty_every

    def forward(self, batch: Batch) -> TurnResult:
        objective, config = self.objective, self.objective.config
        real, fake = self.real_and_fake(batch)
        if not batch.penalized:
            real_scores, fake_scores = objective.scores_of_both(*self.as_seen(real, fake, batch), batch.labels)
            loss = relativistic_loss(real_scores, fake_scores).mean()
            result = TurnResult(loss, {"loss": loss.detach(), **pair_accuracy_logs(real_scores, fake_scores)})
            return self.adapting(result, real_scores - fake_scores)
        labels = torch.cat([batch.labels, batch.labels])

        def scores_of(images: Tensor) -> Tensor:
            real, fake = images.chunk(2)
            return objective.scores(torch.cat(self.as_seen(real, fake, batch)), labels)

        slopes, scores = slopes_and_scores(scores_of, torch.cat([real, fake]))
        real_scores, fake_scores = scores.chunk(2)
        r1, r2 = (penalty.mean() for penalty in zero_centred_penalty(slopes).chunk(2))
        weight = 0.5 * batch.value("penalty_weight", config.penalty_weight) * config.penalty_every
        loss = relativistic_loss(real_scores, fake_scores).mean() + weight * (r1 + r2)
        logs = pair_accuracy_logs(real_scores, fake_scores)
        result = TurnResult(loss, {"loss": loss.detach(), **logs, "r1": r1.detach(), "r2": r2.detach()})
        return self.adapting(result, real_scores - fake_scores)


class R3ganGeneratorPhase(GeneratorPhase):
    """Minimize the pairing loss with the roles of real and generated images exchanged."""

    objective: R3gan

    def forward(self, batch: Batch) -> TurnResult:
        objective = self.objective
        real = objective.as_seen(signed_unit(batch.images), batch, GENERATOR_STREAMS.real)
        with torch.no_grad():  # a separate pass, so that no gradient flows through them
            real_scores = objective.scores(real, batch.labels)
        generated = objective.generate(batch, GENERATOR_STREAMS.latents)
        fake_scores = objective.scores(objective.as_seen(generated, batch, GENERATOR_STREAMS.fake), batch.labels)
        loss = relativistic_loss(fake_scores, real_scores).mean()
        return TurnResult(loss, {"loss": loss.detach()}, {GENERATED: generated.detach()})
