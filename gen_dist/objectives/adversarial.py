"""Base of all adversarial objectives: the two networks, the discriminator's input, and the two phases.

The generator takes its turn first and carries its images to the discriminator, so no image is generated twice. New ones
are drawn only at steps without a generator turn. The carried images are of the generator's weights before its update,
so both networks move against the other as it was when the step began: simultaneous updates. Papers alternate: their
second turn sees the update of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.config import AdversarialConfig, Roles
from gen_dist.config.labels import LabelScheme, refuse_unlabelled, scheme_of
from gen_dist.errors import ConfigError
from gen_dist.kernels import normal
from gen_dist.networks.players import Discriminator, Generator
from gen_dist.objectives.adaptive_augmentation import SIGNS, AdaptiveAugmentation
from gen_dist.objectives.augmentation import add_noise, augment
from gen_dist.objectives.base import Objective
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.randomness import Stream


def signed_unit(images: Tensor) -> Tensor:
    """Images in 0..255, as `Batch` has them, as float32 -1..1."""
    return images * (2.0 / 255.0) - 1.0


class Streams(NamedTuple):
    """Random streams of one phase."""

    latents: Stream
    real: tuple[Stream, Stream, Stream]
    """Augmentation of training images, noise on them, and augmentation with a probability."""
    fake: tuple[Stream, Stream, Stream]
    """Those of generated images."""


DISCRIMINATOR_STREAMS = Streams(
    Stream.DISCRIMINATOR_LATENTS,
    (Stream.REAL_AUGMENTATION, Stream.REAL_NOISE, Stream.REAL_RANDOM_AUGMENTATION),
    (Stream.FAKE_AUGMENTATION, Stream.FAKE_NOISE, Stream.FAKE_RANDOM_AUGMENTATION),
)
GENERATOR_STREAMS = Streams(
    Stream.GENERATOR_LATENTS,
    (
        Stream.GENERATOR_REAL_AUGMENTATION,
        Stream.GENERATOR_REAL_NOISE,
        Stream.GENERATOR_REAL_RANDOM_AUGMENTATION,
    ),
    (
        Stream.GENERATOR_FAKE_AUGMENTATION,
        Stream.GENERATOR_FAKE_NOISE,
        Stream.GENERATOR_FAKE_RANDOM_AUGMENTATION,
    ),
)
_LAYER_NOISE = {
    Stream.DISCRIMINATOR_LATENTS: Stream.DISCRIMINATOR_LAYER_NOISE,
    Stream.GENERATOR_LATENTS: Stream.GENERATOR_LAYER_NOISE,
}
"""Streams of the noise inputs of layers, by those of the latents."""
GENERATED = "generated"
"""Name of the carried images of the generator's turn, float32 [B, C, H, W]."""


class Adversarial(Objective):
    """A generator and a discriminator. Their images are float32 -1..1."""

    starts_anew = ("augmentation", "path_lengths")

    def __init__(
        self,
        config: AdversarialConfig,
        roles: Roles,
        image_shape: tuple[int, int, int],
        classes: int | LabelScheme,
        *,
        bounded: bool = True,
    ) -> None:
        """Build both networks. A `bounded` generator ends with tanh, others with their last layer, as do networks with
        `unbounded_images`.

        Raises:
            ConfigError: a conditional objective has images without classes, or the network does not fit the images.
        """
        super().__init__()
        self.config = config
        self.conditional = config.conditioning != "none"
        labels = scheme_of(classes)
        if self.conditional:
            refuse_unlabelled(labels, config.conditioning)
        self.latent_shape = roles.latent_shape("generator", image_shape)
        self.bounded = bounded and not roles.generator.unbounded_images
        self._seen = config
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(roles.generator, image_shape, labels if self.conditional else None),
                "discriminator": Discriminator(roles.discriminator, image_shape, config.conditioning, labels),
            }
        )
        if config.freeze_discriminator:
            self._freeze(config.freeze_discriminator)
        if config.ada:
            self.networks["augmentation"] = AdaptiveAugmentation(config, image_shape)

    def _freeze(self, count: int) -> None:
        """Train the first layers of the discriminator no more.

        Raises:
            ConfigError: it has fewer, or nothing is left to train.
        """
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        layers = discriminator.encoder.layers_from_image
        if count > len(layers):
            raise ConfigError(
                f"freeze_discriminator {count}: this discriminator has {len(layers)} layers or blocks before its head; "
                "use at most so many"
            )
        for layer in layers[:count]:
            layer.requires_grad_(False)
        if not any(weight.requires_grad for weight in discriminator.parameters()):
            raise ConfigError(
                f"freeze_discriminator {count}: this discriminator has {len(layers)} layers or blocks and no head, so "
                f"none is left to train; use at most {count - 1}"
            )

    def decode(self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Decode latents [B, *latent_shape] to images float32 [B, C, H, W]; pictures show the range -1..1.

        `noise`, float32 [B, noise_count], is that of a generator with noise inputs. None is its fixed noise.
        """
        generator = self.networks["generator"]
        generated = (generator(latents, labels) if noise is None else generator(latents, labels, noise)).float()
        return generated.tanh() if self.bounded else generated

    def pixels(self, decoded: Tensor) -> Tensor:
        return (decoded * 0.5 + 0.5).clamp(0.0, 1.0)

    def generate(self, batch: Batch, stream: Stream) -> Tensor:
        """Generate one new image per image of the batch, with its label."""
        return self.decode(self.latents(batch, stream), batch.labels, self.layer_noise(batch, stream))

    def latents(self, batch: Batch, stream: Stream) -> Tensor:
        """Latents of the prior for each image of the batch, float32 [B, *latent_shape]."""
        return normal(batch.key(stream), len(batch.images), math.prod(self.latent_shape)).view(-1, *self.latent_shape)

    def layer_noise(self, batch: Batch, stream: Stream) -> Tensor | None:
        """Noise inputs that go with the latents of a stream, float32 [B, noise_count]; None if there are none."""
        count = getattr(self.networks["generator"], "noise_count", 0)  # a plug-in's generator may be any module
        return normal(batch.key(_LAYER_NOISE[stream]), len(batch.images), count) if count else None

    @property
    def changes_images(self) -> bool:
        """True if the discriminator sees images with freshly drawn noise or augmentation."""
        return bool(self._seen.augmentation or self._seen.ada or self._seen.instance_noise)

    def as_seen(self, images: Tensor, batch: Batch, streams: tuple[Stream, Stream, Stream]) -> Tensor:
        """Augment images for the discriminator, and add noise."""
        augmentation, noise, random_augmentation = streams
        images = augment(images, self._seen.augmentation, batch.key(augmentation))
        if self._seen.ada:
            probability = batch.scheduled.get("ada_probability")
            images = self.networks["augmentation"](images, batch.key(random_augmentation), probability)
        return add_noise(images, batch.value("instance_noise", self._seen.instance_noise), batch.key(noise))

    def scores(self, images: Tensor, labels: Tensor) -> Tensor:
        """Discriminator scores of images, float32 [B], or [B, h, w] of their patches."""
        scores: Tensor = self.networks["discriminator"](images, labels)
        return scores

    def scores_of_both(self, real: Tensor, fake: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of real and generated images, as from `scores`: in one pass, unless batch normalization mixes them."""
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        if discriminator.mixes_images:
            return self.scores(real, labels), self.scores(fake, labels)
        real_scores, fake_scores = self.scores(torch.cat([real, fake]), torch.cat([labels, labels])).chunk(2)
        return real_scores, fake_scores

    def refuse_phases(self, phases: Mapping[str, Phase]) -> None:
        super().refuse_phases(phases)
        if self._seen.adapts_augmentation and not any(isinstance(one, DiscriminatorPhase) for one in phases.values()):
            raise ConfigError(
                f"ada {' '.join(self._seen.ada)}: no phase of {type(self).__name__} is a DiscriminatorPhase, which "
                "adapts its probability; derive one from it, or fix the probability by --ada-probability 0.3"
            )

    def refuse_unpenalizable(self) -> None:
        """Raise ConfigError if scores allow no gradient penalty, which is defined per image."""
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        if discriminator.mixes_images:
            raise ConfigError(
                "a gradient penalty needs scores that depend on one image each, which batch normalization mixes; use "
                "--discriminator-norm group or none"
            )
        if not discriminator.twice_differentiable:
            raise ConfigError(
                "a gradient penalty needs gradients of slopes, which this discriminator lacks; use --discriminator "
                "with another kind, such as resnet"
            )


class GeneratorPhase(Phase):
    """The generator's turn, which carries its images to later turns."""

    objective: Adversarial
    logs_gradient_norm = True

    def __init__(self, objective: Adversarial, every: int = 1) -> None:
        super().__init__(objective)
        self.trains = ("generator",)
        self.every = every


class DiscriminatorPhase(Phase):
    """The discriminator's turn, on training images and generated ones."""

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
        """Augment both for the discriminator, and add noise."""
        objective, streams = self.objective, DISCRIMINATOR_STREAMS
        return objective.as_seen(real, batch, streams.real), objective.as_seen(fake, batch, streams.fake)

    def adapting(self, result: TurnResult, margins: Tensor) -> TurnResult:
        """The result, with what adapts the probability of augmentations, if it adapts.

        Args:
            result: result of the turn.
            margins: [B, ...], by how much training images score more than what divides them from generated ones.
        """
        if not self.objective._seen.adapts_augmentation:
            return result
        augmentation = self.objective.networks["augmentation"]
        assert isinstance(augmentation, AdaptiveAugmentation)
        logs, carried = augmentation.followed(score_of_image(margins.detach()))
        return result._replace(logs={**result.logs, **logs}, carried={**result.carried, **carried})

    def finish(self, micro_batches: Sequence[Batch], carried: Sequence[Mapping[str, Tensor]]) -> None:
        if SIGNS in carried[0]:
            augmentation = self.objective.networks["augmentation"]
            assert isinstance(augmentation, AdaptiveAugmentation)
            augmentation.adapt(micro_batches[0].rng[1], carried, self.objective.sum_over_batch)
        elif self.objective._seen.adapts_augmentation:
            raise ConfigError(
                f"ada {' '.join(self.objective._seen.ada)}: {type(self).__name__}.forward returns no result of "
                "`self.adapting(result, margins)`, so its probability would stay 0; return one, or fix the probability "
                "by --ada-probability 0.3"
            )


def accuracy_logs(real_scores: Tensor, fake_scores: Tensor, threshold: float) -> dict[str, Tensor]:
    """Logs of the shares of real and generated images on the right side of a threshold, and of all scores."""
    return {
        "accuracy_real": (real_scores.detach() > threshold).float().mean(),
        "accuracy_fake": (fake_scores.detach() <= threshold).float().mean(),
        **all_scores(real_scores, fake_scores),
    }


def pair_accuracy_logs(real_scores: Tensor, fake_scores: Tensor) -> dict[str, Tensor]:
    """Logs for scores without a zero point: the share of pairs with the real image scored higher, and all scores."""
    return {
        "accuracy": (real_scores.detach() > fake_scores.detach()).float().mean(),
        **all_scores(real_scores, fake_scores),
    }


def all_scores(real_scores: Tensor, fake_scores: Tensor) -> dict[str, Tensor]:
    """Logs of the scores of single images, for histograms."""
    return {"scores_real": score_of_image(real_scores.detach()), "scores_fake": score_of_image(fake_scores.detach())}


def score_of_image(scores: Tensor) -> Tensor:
    """Scores of images [B]: the means of those of their patches [B, h, w]; scores [B] as they are."""
    return scores if scores.ndim == 1 else scores.flatten(1).mean(1)


def slopes_and_scores(scores: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiable gradients of the images' scores with respect to the images, [B, ...], and the scores.

    Always computed in float32: squared gradients in half precision are noise. The gradient is a function transform, and
    so part of the forward pass: torch.compile has no double backward.
    """

    def total(inputs: Tensor) -> tuple[Tensor, Tensor]:
        each = scores(inputs)
        return score_of_image(each).sum(), each

    with torch.autocast(images.device.type, enabled=False):
        slopes, each = torch.func.grad(total, has_aux=True)(images)
    return slopes, each
