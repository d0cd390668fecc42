"""A plug-in to copy: a GAN with feature matching, on a U-shaped discriminator.

    gen-dist train feature-matching-mnist --plugin feature_matching_gan.py --matching-weight 2

Two parts are registered, each by a frozen dataclass that names its classes: a network and an objective. A preset puts
them together. Fields of the configs are options of the command line, and their docstrings are its help.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from tyro.conf import Suppress

from gen_dist.config import (
    AdversarialConfig,
    FigureName,
    NetworkConfig,
    OptimizerConfig,
    RoleName,
    Roles,
    TrainConfig,
    networks,
    objectives,
)
from gen_dist.errors import ConfigError
from gen_dist.networks import Encoder
from gen_dist.networks.players import Discriminator
from gen_dist.objectives import Batch, Phase, TurnResult
from gen_dist.objectives.adversarial import GENERATED, GENERATOR_STREAMS, Adversarial, GeneratorPhase, signed_unit
from gen_dist.objectives.gan import GanDiscriminatorPhase
from gen_dist.objectives.losses import generator_loss
from gen_dist.presets import add_preset
from gen_dist.randomness import Stream

# --- The network -----------------------------------------------------------------------------------------------------


@networks.register
@dataclass(frozen=True)
class UShapedConfig(NetworkConfig):
    """U-shaped discriminator or encoder (Schoenfeld et al. 2020), with the generator of `conv`."""

    encoder: ClassVar[str] = f"{__name__}:UShaped"
    decoder: ClassVar[str] = "gen_dist.networks.conv:ConvDecoder"
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = {
        "latent_dim": ("encoder", "decoder", "generator"),
        "hidden_size": ("decoder", "generator"),
    }
    kind: Suppress[Literal["u-shaped"]] = "u-shaped"
    feature_maps: tuple[int, ...] = (32, 64)
    """Channels at each halving of the sides, on the way down; the way up has them in reverse."""
    hidden_size: int = 128
    """Width of the generator's fully connected layer."""
    activation: Literal["leaky_relu"] = "leaky_relu"
    """Nonlinearity after each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.feature_maps or min(self.feature_maps) < 1:
            raise ConfigError(f"feature_maps {self.feature_maps} must be one or more positive numbers")


class UShaped(Encoder):
    """Images [B, C, H, W] -> [B, outputs]: down to small maps, up again beside the maps of the way down, then the mean.

    Features describe both the whole image and its pixels, so that they tell more than those of the way down alone.
    """

    def __init__(self, config: UShapedConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        widths = (image_shape[0], *config.feature_maps)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for before, after in itertools.pairwise(widths):
            self.down.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
        width = widths[-1]
        for beside in reversed(widths[:-1]):  # a level of the way up also gets the maps of the way down at its side
            self.up.append(nn.Conv2d(width + beside, config.feature_maps[0], 3, padding=1))
            width = config.feature_maps[0]
        self.feature_count = widths[-1] + width
        self.head = nn.Linear(self.feature_count, outputs)

    def features(self, images: Tensor) -> Tensor:
        """Means of the smallest maps and of the full-size ones, [B, feature_count]."""
        maps, beside = images, []
        for layer in self.down:
            beside.append(maps)
            maps = functional.leaky_relu(layer(maps), 0.2)
        smallest = maps
        for layer, same_side in zip(self.up, reversed(beside), strict=True):
            maps = functional.interpolate(maps, size=same_side.shape[2:], mode="nearest")
            maps = functional.leaky_relu(layer(torch.cat([maps, same_side], dim=1)), 0.2)
        return torch.cat([smallest.mean(dim=(2, 3)), maps.mean(dim=(2, 3))], dim=1)


# --- The objective ---------------------------------------------------------------------------------------------------


@objectives.register
@dataclass(frozen=True)
class FeatureMatchingConfig(AdversarialConfig):
    """GAN whose generator also matches the discriminator's mean features of real images (Salimans et al. 2016)."""

    implementation: ClassVar[str] = f"{__name__}:FeatureMatchingGan"
    kind: Suppress[Literal["feature-matching"]] = "feature-matching"
    loss: Literal["non_saturating", "least_squares", "hinge"] = "non_saturating"
    """Loss of single scores."""
    matching_weight: float = 1.0
    """Weight of the squared difference of mean features in the generator's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.matching_weight >= 0.0:
            raise ConfigError(f"matching_weight {self.matching_weight} is not a number of at least 0")

    @property
    def figure_names(self) -> Mapping[str, FigureName]:
        """Names of our own figures of metrics.jsonl, for people."""
        return {"matching": FigureName("feature matching", "squared features", "matching")}


class FeatureMatchingGan(Adversarial):
    """Generator and discriminator of a GAN; only the generator's turn differs."""

    config: FeatureMatchingConfig

    def __init__(
        self, config: FeatureMatchingConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__(config, roles, image_shape, classes)

    def phases(self) -> dict[str, Phase]:
        """The generator's turn comes first and passes its images on."""
        return {"generator": MatchingPhase(self), "discriminator": GanDiscriminatorPhase(self)}

    def image_features(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features float32 [B, F] and scores float32 [B] of images in -1..1."""
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        features, scores = discriminator.features_and_scores(images, labels)
        return features.float(), scores


class MatchingPhase(GeneratorPhase):
    """Minimize the GAN's loss and, in expectation, |E f(generated) - E f(real)|^2.

    The square of a mean over the batch would depend on how many processes and micro-batches share it. For two
    independent generated images g, g' and a real one x, the mean of f(g) f(g') - (f(g) + f(g')) f(x) is that square up
    to a constant, and a sum over single rows.
    """

    objective: FeatureMatchingGan

    def forward(self, batch: Batch) -> TurnResult:
        """Loss of the generator; noise comes from the batch's key, never from torch's generator."""
        objective = self.objective
        generated = objective.generate(batch, GENERATOR_STREAMS.latents)
        second = objective.generate(batch, Stream.DISCRIMINATOR_LATENTS)
        features, scores = objective.image_features(
            objective.as_seen(generated, batch, GENERATOR_STREAMS.fake), batch.labels
        )
        of_second, _ = objective.image_features(second, batch.labels)
        of_real, _ = objective.image_features(signed_unit(batch.images), batch.labels)
        matching = (features * of_second - (features + of_second) * of_real).mean(dim=1).mean()
        adversarial = generator_loss(objective.config.loss, scores).mean()
        loss = adversarial + objective.config.matching_weight * matching
        logs = {"loss": loss.detach(), "matching": matching.detach()}
        return TurnResult(loss, logs, {GENERATED: generated.detach()})


# --- A preset --------------------------------------------------------------------------------------------------------

add_preset(
    "feature-matching-mnist",
    TrainConfig(
        steps=2000,
        learning_rate=2e-4,
        network=UShapedConfig(latent_dim=32),
        objective=FeatureMatchingConfig(),
        optimization=OptimizerConfig(betas=(0.5, 0.999), ema_decay=0.999),
    ),
    "GAN with feature matching on a U-shaped discriminator",
)
