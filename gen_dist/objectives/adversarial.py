"""What all adversarial objectives share: two players, how they see images, and the turns they take.

The generator has its turn first and hands its images on. The discriminator judges those very images, so that none is
generated twice; only at steps without a turn of the generator are new ones drawn. Where papers begin with the
discriminator, this is their order but for the very first turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.config import Augmentation, Conditioning, GanLoss, NetworkConfig
from gen_dist.errors import ConfigError
from gen_dist.kernels import normal
from gen_dist.networks.players import Discriminator, Generator
from gen_dist.objectives.augmentation import add_noise, augment
from gen_dist.objectives.base import Batch, Objective, Phase, TurnResult
from gen_dist.objectives.losses import generator_loss
from gen_dist.randomness import Stream


def signed_unit(images: Tensor) -> Tensor:
    """Intensities uint8 0..255 as float32 -1..1."""
    return images * (2.0 / 255.0) - 1.0


class Streams(NamedTuple):
    """The streams of what one phase draws."""

    latents: Stream
    real: tuple[Stream, Stream]
    """Augmentation of training images, and noise on them."""
    fake: tuple[Stream, Stream]
    """The same of generated images."""


DISCRIMINATOR_STREAMS = Streams(
    Stream.DISCRIMINATOR_LATENTS,
    (Stream.REAL_AUGMENTATION, Stream.REAL_NOISE),
    (Stream.FAKE_AUGMENTATION, Stream.FAKE_NOISE),
)
GENERATOR_STREAMS = Streams(
    Stream.GENERATOR_LATENTS,
    (Stream.GENERATOR_REAL_AUGMENTATION, Stream.GENERATOR_REAL_NOISE),
    (Stream.GENERATOR_FAKE_AUGMENTATION, Stream.GENERATOR_FAKE_NOISE),
)
GENERATED = "generated"
"""What the generator's turn hands on: its images, float32 [B, C, H, W]."""


class Adversarial(Objective):
    """A generator and a discriminator. Inside, images are float32 -1..1."""

    generates = True

    def __init__(
        self,
        network: NetworkConfig,
        image_shape: tuple[int, int, int],
        classes: int,
        conditioning: Conditioning = "none",
        augmentation: Sequence[Augmentation] = (),
        instance_noise: float = 0.0,
        bounded: bool = True,
    ) -> None:
        """`bounded` generators end with tanh, others with their last layer.

        Raises:
            ConfigError: there are no classes to be conditional on, or the network does not fit the images.
        """
        super().__init__()
        self.conditional = conditioning != "none"
        if self.conditional and classes < 2:
            raise ConfigError(
                f"conditioning {conditioning} needs labelled images, but these have no classes; use another --data, or "
                "--conditioning none"
            )
        self.latent_dim = network.latent_dim
        self.augmentation = tuple(augmentation)
        self.instance_noise = instance_noise
        self.bounded = bounded
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(network, image_shape, classes if self.conditional else 0),
                "discriminator": Discriminator(network, image_shape, conditioning, classes),
            }
        )

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images float32 [B, C, H, W], of which -1..1 is shown, from latents [B, D]."""
        generated = self.networks["generator"](latents, labels).float()
        return generated.tanh() if self.bounded else generated

    def pixels(self, decoded: Tensor) -> Tensor:
        return (decoded * 0.5 + 0.5).clamp(0.0, 1.0)

    def generate(self, batch: Batch, stream: Stream) -> Tensor:
        """As many new images as the batch has, and of the same classes."""
        latents = normal(batch.key(stream), len(batch.images), self.latent_dim)
        return self.decode(latents, batch.labels)

    def as_seen(self, images: Tensor, batch: Batch, streams: tuple[Stream, Stream]) -> Tensor:
        """Images as the discriminator sees them: augmented, with noise on top."""
        augmentation, noise = streams
        images = augment(images, self.augmentation, batch.key(augmentation))
        return add_noise(images, self.instance_noise, batch.key(noise))

    def scores(self, images: Tensor, labels: Tensor) -> Tensor:
        """float32 [B]."""
        scores: Tensor = self.networks["discriminator"](images, labels)
        return scores

    def scores_of_both(self, real: Tensor, fake: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B] each. At once, unless batch statistics of the two would mix and tell them apart no more."""
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        if discriminator.mixes_images:
            return self.scores(real, labels), self.scores(fake, labels)
        real_scores, fake_scores = self.scores(torch.cat([real, fake]), torch.cat([labels, labels])).chunk(2)
        return real_scores, fake_scores

    def refuse_batch_norm(self) -> None:
        """Raise ConfigError if a score depends on other images: its gradient's penalty would not be one image's."""
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        if discriminator.mixes_images:
            raise ConfigError(
                "a gradient penalty needs scores that depend on one image each, which batch normalization mixes; use "
                "--discriminator-norm group or none"
            )


class GeneratorPhase(Phase):
    """The generator's turn; it hands on what it generated."""

    objective: Adversarial
    logs_gradient_norm = True

    def __init__(self, objective: Adversarial, every: int = 1) -> None:
        super().__init__(objective)
        self.trains = ("generator",)
        self.every = every


class GeneratorLossPhase(GeneratorPhase):
    """The generator's turn where its loss is one of its own images' scores: the mean of `losses.generator_loss`."""

    def __init__(self, objective: Adversarial, loss: GanLoss, every: int = 1) -> None:
        super().__init__(objective, every)
        self.loss = loss

    def forward(self, batch: Batch) -> TurnResult:
        objective = self.objective
        generated = objective.generate(batch, GENERATOR_STREAMS.latents)
        scores = objective.scores(objective.as_seen(generated, batch, GENERATOR_STREAMS.fake), batch.labels)
        loss = generator_loss(self.loss, scores).mean()
        return TurnResult(loss, {"loss": loss.detach()}, {GENERATED: generated.detach()})


class DiscriminatorPhase(Phase):
    """The discriminator's turn: `losses` says what it minimizes."""

    objective: Adversarial
    logs_gradient_norm = True

    def __init__(self, objective: Adversarial) -> None:
        super().__init__(objective)
        self.trains = ("discriminator",)

    def real_and_fake(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Training images and generated ones, float32 [B, C, H, W] each."""
        generated = batch.carried.get(GENERATED)
        if generated is None:
            generated = self.objective.generate(batch, DISCRIMINATOR_STREAMS.latents).detach()
        return signed_unit(batch.images), generated

    def as_seen(self, real: Tensor, fake: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same as the discriminator sees them."""
        objective, streams = self.objective, DISCRIMINATOR_STREAMS
        return objective.as_seen(real, batch, streams.real), objective.as_seen(fake, batch, streams.fake)


def accuracy_logs(real_scores: Tensor, fake_scores: Tensor, threshold: float) -> dict[str, Tensor]:
    """Logs: shares of real and of generated images on their side of a threshold, and all scores for a histogram."""
    return {
        "accuracy_real": (real_scores.detach() > threshold).float().mean(),
        "accuracy_fake": (fake_scores.detach() <= threshold).float().mean(),
        **all_scores(real_scores, fake_scores),
    }


def pair_accuracy_logs(real_scores: Tensor, fake_scores: Tensor) -> dict[str, Tensor]:
    """Logs where scores have no zero: the share of pairs in which the real image scores more, and all scores."""
    return {
        "accuracy": (real_scores.detach() > fake_scores.detach()).float().mean(),
        **all_scores(real_scores, fake_scores),
    }


def all_scores(real_scores: Tensor, fake_scores: Tensor) -> dict[str, Tensor]:
    """Logs of the scores of single images."""
    return {"scores_real": real_scores.detach(), "scores_fake": fake_scores.detach()}


def slopes_and_scores(scores: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each image's score in that image, [B, ...], itself differentiable, and the scores [B].

    In float32 whatever the precision of the step: squared gradients in half precision are noise. As a function
    transform it is part of the forward pass, so that torch.compile, which has no gradients of gradients, and
    DistributedDataParallel, which does not see `autograd.grad`, both work.
    """

    def total(inputs: Tensor) -> tuple[Tensor, Tensor]:
        each = scores(inputs)
        return each.sum(), each

    with torch.autocast(images.device.type, enabled=False):
        slopes, each = torch.func.grad(total, has_aux=True)(images)
    return slopes, each
