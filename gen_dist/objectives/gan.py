"""Generative adversarial networks with a loss of single scores: non-saturating, least-squares or hinge."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from gen_dist.config import GanConfig, GanLoss, Roles
from gen_dist.config.labels import LabelScheme
from gen_dist.errors import ConfigError
from gen_dist.objectives.adversarial import (
    DISCRIMINATOR_STREAMS,
    GENERATED,
    GENERATOR_STREAMS,
    Adversarial,
    DiscriminatorPhase,
    GeneratorPhase,
    accuracy_logs,
    slopes_and_scores,
)
from gen_dist.objectives.losses import fake_loss, generator_loss, real_loss, zero_centred_penalty
from gen_dist.objectives.phase import Batch, Phase, TurnResult


class Gan(Adversarial):
    """GAN, conditional GAN, DCGAN, LSGAN and SNGAN, which differ in loss, conditioning and networks."""

    config: GanConfig
    takes_any_labels = True
    trains_styles: ClassVar[bool] = False
    """True if the class holds to `style_mixing` and `path_length_weight`, which others refuse."""

    def __init__(
        self, config: GanConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int | LabelScheme
    ) -> None:
        super().__init__(config, roles, image_shape, classes)
        if config.penalty_weight:
            self.refuse_unpenalizable()
        if config.options_of_styles and not self.trains_styles:
            raise ConfigError(
                f"{config.options_of_styles[0]}: {type(self).__name__} trains no styles; derive it from "
                "gen_dist.objectives.styled_gan.StyledGan, or leave that out"
            )

    def phases(self) -> dict[str, Phase]:
        return {
            "generator": GanGeneratorPhase(self, self.config.loss, self.config.generator_every),
            "discriminator": GanDiscriminatorPhase(self, self.config.penalty_weight, self.config.penalty_every),
        }


class GanGeneratorPhase(GeneratorPhase):
    """Minimize the loss of the generated images' scores (Goodfellow et al. 2014, section 3)."""

    def __init__(self, objective: Adversarial, loss: GanLoss, every: int = 1) -> None:
        super().__init__(objective, every)
        self.loss = loss

    def forward(self, batch: Batch) -> TurnResult:
        generated = self.objective.generate(batch, GENERATOR_STREAMS.latents)
        seen = self.objective.as_seen(generated, batch, GENERATOR_STREAMS.fake)
        scores = self.objective.scores(seen, batch.labels)
        loss = generator_loss(self.loss, scores).mean()
        return TurnResult(loss, {"loss": loss.detach()}, {GENERATED: generated.detach()})


class GanDiscriminatorPhase(DiscriminatorPhase):
    """Minimize the loss of real and of generated images' scores (Goodfellow et al. 2014, eq. 1), plus gamma / 2 times
    R1, if gamma is not 0 (Mescheder et al. 2018, eq. 9). The slopes are taken at the images before augmentation.
    """

    objective: Gan

    def __init__(self, objective: Adversarial, penalty_weight: float = 0.0, penalty_every: int = 1) -> None:
        super().__init__(objective)
        self.penalty_weight = penalty_weight
        self.penalty_every = penalty_every if penalty_weight else 1

    def forward(self, batch: Batch) -> TurnResult:
        if self.penalty_weight and batch.penalized:
            return self._penalized(batch)
        real, fake = self.as_seen(*self.real_and_fake(batch), batch)
        return self.result(*self.objective.scores_of_both(real, fake, batch.labels))

    def _penalized(self, batch: Batch) -> TurnResult:
        objective = self.objective
        real, fake = self.real_and_fake(batch)

        def scores_of(images: Tensor) -> Tensor:
            return objective.scores(objective.as_seen(images, batch, DISCRIMINATOR_STREAMS.real), batch.labels)

        slopes, real_scores = slopes_and_scores(scores_of, real)
        seen = objective.as_seen(fake, batch, DISCRIMINATOR_STREAMS.fake)
        loss, logs, carried = self.result(real_scores, objective.scores(seen, batch.labels))
        r1 = zero_centred_penalty(slopes).mean()
        loss = loss + 0.5 * batch.value("penalty_weight", self.penalty_weight) * self.penalty_every * r1
        return TurnResult(loss, {**logs, "loss": loss.detach(), "r1": r1.detach()}, carried)

    def result(self, real_scores: Tensor, fake_scores: Tensor) -> TurnResult:
        """Loss and logs for scores of real and generated images, [B] each."""
        name = self.objective.config.loss
        loss = (real_loss(name, real_scores) + fake_loss(name, fake_scores)).mean()
        threshold = 0.5 if name == "least_squares" else 0.0  # half-way between the two targets
        result = TurnResult(loss, {"loss": loss.detach(), **accuracy_logs(real_scores, fake_scores, threshold)})
        return self.adapting(result, real_scores - threshold)
