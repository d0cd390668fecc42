"""Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, algorithm 1)."""

from __future__ import annotations

from gen_dist.config import Roles, WganGpConfig
from gen_dist.config.labels import LabelScheme
from gen_dist.objectives.adversarial import (
    Adversarial,
    DiscriminatorPhase,
    pair_accuracy_logs,
    slopes_and_scores,
)
from gen_dist.objectives.augmentation import uniform
from gen_dist.objectives.gan import GanGeneratorPhase
from gen_dist.objectives.losses import fake_loss, one_centred_penalty, real_loss
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.randomness import Stream


class WganGp(Adversarial):
    """Wasserstein GAN with a critic of slope near 1 between real and generated images."""

    config: WganGpConfig
    takes_any_labels = True

    def __init__(
        self, config: WganGpConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int | LabelScheme
    ) -> None:
        super().__init__(config, roles, image_shape, classes)
        self.refuse_unpenalizable()

    def phases(self) -> dict[str, Phase]:
        generator = GanGeneratorPhase(self, "wasserstein", self.config.generator_every)
        return {"generator": generator, "critic": WganCriticPhase(self)}


class WganCriticPhase(DiscriminatorPhase):
    """Minimize fake minus real scores plus the penalty; real minus fake scores estimate the distance."""

    objective: WganGp

    def __init__(self, objective: WganGp) -> None:
        super().__init__(objective)
        self.penalty_every = objective.config.penalty_every

    def forward(self, batch: Batch) -> TurnResult:
        objective, config = self.objective, self.objective.config
        real, fake = self.as_seen(*self.real_and_fake(batch), batch)
        real_scores, fake_scores = objective.scores_of_both(real, fake, batch.labels)
        distance = -(real_loss("wasserstein", real_scores) + fake_loss("wasserstein", fake_scores)).mean()
        logs = {"distance": distance.detach(), **pair_accuracy_logs(real_scores, fake_scores)}
        if not batch.penalized:
            return TurnResult(-distance, {"loss": -distance.detach(), **logs})
        share = uniform(batch.key(Stream.PENALTY_MIX), len(real), 1)[:, :, None, None]
        slopes, _ = slopes_and_scores(
            lambda images: objective.scores(images, batch.labels), fake + share * (real - fake)
        )
        penalty = one_centred_penalty(slopes).mean()
        loss = -distance + batch.value("penalty_weight", config.penalty_weight) * config.penalty_every * penalty
        return TurnResult(loss, {"loss": loss.detach(), **logs, "penalty": penalty.detach()})
