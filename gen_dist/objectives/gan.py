"""The classic adversarial objective on one image at a time: non-saturating, least-squares or hinge loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gen_dist.config import GanConfig, GanLoss, NetworkConfig
from gen_dist.networks import spectrally_normalized
from gen_dist.networks.players import Discriminator
from gen_dist.objectives.adversarial import (
    GENERATED,
    GENERATOR_STREAMS,
    Adversarial,
    DiscriminatorPhase,
    GeneratorLossPhase,
    accuracy_logs,
)
from gen_dist.objectives.base import Batch, Phase, TurnResult
from gen_dist.objectives.losses import fake_loss, generator_loss, real_loss

FAKE_SCORES = "judged"
"""What the generator's turn may hand on: scores [B] of its images, with a graph to the discriminator's weights."""


class Gan(Adversarial):
    """GAN, conditional GAN, DCGAN, LSGAN, SNGAN: what tells them apart is the loss, the labels and the networks."""

    def __init__(
        self, config: GanConfig, network: NetworkConfig, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__(network, image_shape, classes, config.conditioning, config.augmentation, config.instance_noise)
        self.config = config

    def phases(self) -> dict[str, Phase]:
        config = self.config
        generator = GanGeneratorPhase(self, config.loss, config.generator_every)
        return {"generator": generator, "discriminator": GanDiscriminatorPhase(self)}

    def images_can_be_judged_once(self) -> bool:
        """Whether the discriminator would find the same scores of the generator's images in both turns of a step.

        It would unless something comes between: noise that is drawn anew, or a power iteration that moves its weights.
        Asked only of batch normalization, with which it judges them apart from real images: without, one pass over both
        in its own turn is faster than a pass in each.
        """
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        changes = self.augmentation or self.instance_noise or spectrally_normalized(discriminator)
        return discriminator.mixes_images and not changes


class GanGeneratorPhase(GeneratorLossPhase):
    """The generator's turn, whose scores of its images are the discriminator's, too, where that can be."""

    objective: Gan

    def __init__(self, objective: Gan, loss: GanLoss, every: int) -> None:
        super().__init__(objective, loss, every)
        self._judges_once = objective.images_can_be_judged_once()

    def forward(self, batch: Batch) -> TurnResult:
        return self._judged_once(batch) if self.carries_graphs and self._judges_once else super().forward(batch)

    def _judged_once(self, batch: Batch) -> TurnResult:
        """The same loss and gradient, by two graphs that meet in the images.

        The generator's ends there. The discriminator's begins there, is gone backward through once for the images'
        gradient, here, and once more in its own turn, for its weights'.
        """
        objective = self.objective
        generated = objective.generate(batch, GENERATOR_STREAMS.latents)
        seen = generated.detach().requires_grad_()
        with _recording(list(objective.networks["discriminator"].parameters())):
            scores = objective.scores(seen, batch.labels)
        loss = generator_loss(self.loss, scores).mean()
        with torch.autocast(seen.device.type, enabled=False):  # `backward` is called outside of it as well
            (slopes,) = torch.autograd.grad(loss, seen, retain_graph=True)
        seen.requires_grad_(False)
        value = loss.detach()
        zero = ((generated - seen) * slopes).sum()  # its gradient in the generator is the loss's
        return TurnResult(value + zero, {"loss": value}, {GENERATED: seen, FAKE_SCORES: scores})


@contextlib.contextmanager
def _recording(frozen: Sequence[Tensor]) -> Iterator[None]:
    """Within it, a graph is recorded to parameters that have no part in this turn."""
    assert not any(parameter.requires_grad for parameter in frozen)
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class GanDiscriminatorPhase(DiscriminatorPhase):
    """Minimize the loss on real images and on generated ones."""

    objective: Gan

    def forward(self, batch: Batch) -> TurnResult:
        objective, loss_name = self.objective, self.objective.config.loss
        real, fake = self.as_seen(*self.real_and_fake(batch), batch)
        if FAKE_SCORES in batch.carried:
            real_scores, fake_scores = objective.scores(real, batch.labels), batch.carried[FAKE_SCORES]
        else:
            real_scores, fake_scores = objective.scores_of_both(real, fake, batch.labels)
        loss = (real_loss(loss_name, real_scores) + fake_loss(loss_name, fake_scores)).mean()
        threshold = 0.5 if loss_name == "least_squares" else 0.0  # half-way between its two targets
        return TurnResult(loss, {"loss": loss.detach(), **accuracy_logs(real_scores, fake_scores, threshold)})
