"""GAN of a generator with styles: mixed styles, and regularization of path lengths (Karras et al. 2019, 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gen_dist.config import GanConfig, GanLoss, Roles
from gen_dist.config.labels import LabelScheme
from gen_dist.errors import ConfigError
from gen_dist.networks.players import Generator
from gen_dist.objectives.adversarial import GENERATED, GENERATOR_STREAMS, Adversarial
from gen_dist.objectives.gan import Gan, GanGeneratorPhase
from gen_dist.objectives.losses import generator_loss
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.objectives.styles import LENGTHS, PathLengths, decoder_with_styles, mixed_styles
from gen_dist.randomness import Stream


class StyledGan(Gan):
    """A GAN that trains styles as `style_mixing` and `path_length_weight` ask for; without them it is `Gan`."""

    takes_any_labels = True
    trains_styles = True

    def __init__(
        self, config: GanConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int | LabelScheme
    ) -> None:
        super().__init__(config, roles, image_shape, classes)
        for option in config.options_of_styles:
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
        phases = super().phases()
        if self.config.path_length_weight:
            phases["generator"] = PathLengthGeneratorPhase(self, self.config.loss, self.config.generator_every)
        return phases

    def refuse_phases(self, phases: Mapping[str, Phase]) -> None:
        super().refuse_phases(phases)
        if self.config.path_length_weight and not any(
            isinstance(phase, PathLengthGeneratorPhase) for phase in phases.values()
        ):
            raise ConfigError(
                f"path_length_weight {self.config.path_length_weight:g}: no phase of {type(self).__name__} measures "
                "path lengths; derive the generator's from PathLengthGeneratorPhase, or leave it out"
            )


class PathLengthGeneratorPhase(GanGeneratorPhase):
    """Minimize the loss of the scores, plus the weight of path lengths times their penalty at steps where it is due
    (Karras et al. 2020, eq. 4)."""

    objective: StyledGan

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
