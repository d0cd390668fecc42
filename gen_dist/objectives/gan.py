"""Generative adversarial networks with a loss of single scores: non-saturating, least-squares or hinge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gen_dist.config import GanConfig, GanLoss, Roles
from gen_dist.config.labels import LabelScheme
from gen_dist.networks.players import Generator
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
from gen_dist.objectives.styles import LENGTHS, PathLengths, decoder_with_styles, mixed_styles
from gen_dist.randomness import Stream


class Gan(Adversarial):
    """GAN, conditional GAN, DCGAN, LSGAN and SNGAN, which differ in loss, conditioning and networks."""

    config: GanConfig
    takes_any_labels = True

    def __init__(
        self, config: GanConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int | LabelScheme
    ) -> None:
        super().__init__(config, roles, image_shape, classes)
        if config.penalty_weight:
            self.refuse_unpenalizable()
        for option in ("style_mixing", "path_length_weight"):
            if getattr(config, option):
                decoder_with_styles(self.networks["generator"], option)
        if config.path_length_weight:
            self.networks["path_lengths"] = PathLengths()

    def generate(self, batch: Batch, stream: Stream) -> Tensor:
        if not self.config.style_mixing:
            return super().generate(batch, stream)
        return self.synthesis(batch, stream)(self.styles(batch, stream))

    def styles(self, batch: Batch, stream: Stream) -> Tensor:
        """Styles [B, places, style_dim] of the images that `generate` makes."""
        generator = self.networks["generator"]
        assert isinstance(generator, Generator)
        decoder = decoder_with_styles(generator, "a style")
        latents = generator.labelled(self.latents(batch, stream), batch.labels)
        if not self.config.style_mixing:
            return decoder.styles(latents)
        others = generator.labelled(self.latents(batch, Stream.MIXED_LATENTS), batch.labels)
        return mixed_styles(decoder, latents, others, self.config.style_mixing, batch)

    def synthesis(self, batch: Batch, stream: Stream) -> Callable[[Tensor], Tensor]:
        """Function from styles to the images of a batch, float32 [B, C, H, W]."""
        decoder = decoder_with_styles(self.networks["generator"], "a style")
        noise = self.layer_noise(batch, stream)
        return lambda styles: decoder.synthesize(styles, noise).float()

    def phases(self) -> dict[str, Phase]:
        config = self.config
        kind = PathLengthGeneratorPhase if config.path_length_weight else GanGeneratorPhase
        return {
            "generator": kind(self, config.loss, config.generator_every),
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


class PathLengthGeneratorPhase(GanGeneratorPhase):
    """Minimize that loss, plus the weight of path lengths times their penalty at steps where it is due (Karras et al.
    2020, eq. 4)."""

    objective: Gan

    def __init__(self, objective: Adversarial, loss: GanLoss, every: int = 1) -> None:
        super().__init__(objective, loss, every)
        self.penalty_every = self.objective.config.path_length_every

    def forward(self, batch: Batch) -> TurnResult:
        if not batch.penalized:
            return super().forward(batch)
        objective, stream = self.objective, GENERATOR_STREAMS.latents
        measured = self._measured
        generated, lengths = measured(objective.synthesis(batch, stream), objective.styles(batch, stream), batch)
        scores = objective.scores(objective.as_seen(generated, batch, GENERATOR_STREAMS.fake), batch.labels)
        penalty = measured.penalty(lengths)
        weight = objective.config.path_length_weight * self.turns_per_penalty
        loss = generator_loss(self.loss, scores).mean() + weight * penalty
        lengths = lengths.detach()
        logs = {"loss": loss.detach(), "path_length": lengths.mean(), "path_length_penalty": penalty.detach()}
        sums = torch.stack([lengths.sum(), torch.ones_like(lengths).sum()])
        return TurnResult(loss, logs, {GENERATED: generated.detach(), LENGTHS: sums})

    def finish(self, micro_batches: Sequence[Batch], carried: Sequence[Mapping[str, Tensor]]) -> None:
        if LENGTHS in carried[0]:
            self._measured.follow(carried, self.objective.sum_over_batch)

    @property
    def _measured(self) -> PathLengths:
        lengths = self.objective.networks["path_lengths"]
        assert isinstance(lengths, PathLengths)
        return lengths


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
