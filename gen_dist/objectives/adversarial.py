"""Parts that all adversarial objectives share: the two networks, what the discriminator sees, and the two phases.

The generator takes its turn first and carries its images to the discriminator, so no image is generated twice. New ones
are drawn only at steps without a generator turn. Papers begin with the discriminator; the order here differs from
theirs in the very first turn alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.config import AdversarialConfig, NetworkConfig
from gen_dist.errors import ConfigError
from gen_dist.kernels import normal
from gen_dist.networks.players import Discriminator, Generator
from gen_dist.objectives.augmentation import add_noise, augment
from gen_dist.objectives.base import Objective
from gen_dist.objectives.phase import Batch, Phase
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

    def __init__(
        self,
        config: AdversarialConfig,
        network: NetworkConfig,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        bounded: bool = True,
    ) -> None:
        """Build both networks. A `bounded` generator ends with tanh, others with their last layer.

        Raises:
            ConfigError: conditioning is asked for on images without classes, or the network does not fit the images.
        """
        super().__init__()
        self.config = config
        self.conditional = config.conditioning != "none"
        if self.conditional and classes < 2:
            raise ConfigError(
                f"conditioning {config.conditioning} needs labelled images, but these have no classes; use another "
                "--data, or --conditioning none"
            )
        self.latent_dim = network.latent_dim
        self.bounded = bounded
        self._seen = config
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(network, image_shape, classes if self.conditional else 0),
                "discriminator": Discriminator(network, image_shape, config.conditioning, classes),
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

    @property
    def changes_images(self) -> bool:
        """True if the discriminator sees images with freshly drawn noise or augmentation."""
        return bool(self._seen.augmentation or self._seen.instance_noise)

    def as_seen(self, images: Tensor, batch: Batch, streams: tuple[Stream, Stream]) -> Tensor:
        """Images as the discriminator sees them: augmented, with noise on top."""
        augmentation, noise = streams
        images = augment(images, self._seen.augmentation, batch.key(augmentation))
        return add_noise(images, self._seen.instance_noise, batch.key(noise))

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
