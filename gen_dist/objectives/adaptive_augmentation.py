"""Probability of a discriminator's augmentations, which follows its overfitting (Karras et al. 2020a, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gen_dist.config import AdversarialConfig
from gen_dist.config.objectives import COLOUR_TRANSFORMATIONS, transformations
from gen_dist.errors import ConfigError
from gen_dist.kernels import Key
from gen_dist.objectives.phase import SumOverBatch
from gen_dist.objectives.random_augmentation import randomly_augment

SIGNS = "signs"
"""Name of the carried signs of the training images' margins: their sum and their number, float32 [2]."""


class AdaptiveAugmentation(nn.Module):
    """Augmentations of images [B, C, H, W] with a probability that is a buffer, so it is saved and the same everywhere.

    Every `ada_every` steps it moves by the images since, over `ada_images`: up if the mean sign of the margins of
    training images is above the target, else down. A margin is the score above the loss's zero point, or above that of
    a generated image for losses of pairs.
    """

    probability: Tensor
    signs: Tensor

    def __init__(self, config: AdversarialConfig, image_shape: tuple[int, int, int]) -> None:
        """Begin at the fixed probability, or at 0.

        Raises:
            ConfigError: the images have colours of another kind, or none that a transformation could change.
        """
        super().__init__()
        coloured = [kind for kind in config.ada if transformations([kind]) & COLOUR_TRANSFORMATIONS]
        if coloured and image_shape[0] not in (1, 3):
            names = " ".join(coloured)
            raise ConfigError(
                f"ada {names} needs grey images or three colours, and these have {image_shape[0]} channels; leave "
                f"{names} out of --ada"
            )
        if image_shape[0] == 1 and (idle := [kind for kind in config.ada if kind in ("hue", "saturation")]):
            names = " ".join(idle)
            raise ConfigError(f"ada {names} changes nothing in grey images; leave {names} out of --ada")
        self.config = config
        self.register_buffer("probability", torch.tensor(config.ada_probability or 0.0))
        self.register_buffer("signs", torch.zeros(2))

    def forward(self, images: Tensor, key: Key, probability: Tensor | None = None) -> Tensor:
        """Augment images float32 [B, C, H, W] by the draws of a key, with this probability or its own."""
        probability = self.probability if probability is None else probability
        return randomly_augment(images, self.config.ada, probability, key, self.config.ada_colour)

    def followed(self, margins: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logs of a turn, and what it carries to `adapt`, from the margins [B] of training images."""
        signs = margins.sign()
        logs = {"augmentation_probability": self.probability.clone(), "real_sign": signs.mean()}
        return logs, {SIGNS: torch.stack([signs.sum(), torch.ones_like(signs).sum()])}

    def adapt(self, step: Tensor, carried: Sequence[Mapping[str, Tensor]], sum_over_batch: SumOverBatch) -> None:
        """Take the signs of a step, int64 [], and move the probability if that is due."""
        self.signs += sum_over_batch(lambda some: torch.stack([one[SIGNS] for one in some]).sum(dim=0), carried)
        total, images = self.signs.unbind()
        direction = (total / images - self.config.ada_target).sign()
        moved = (self.probability + direction * images / self.config.ada_images).clamp(0.0, 1.0)
        due = (step + 1) % self.config.ada_every == 0
        self.probability.copy_(torch.where(due, moved, self.probability))
        self.signs.mul_(~due)
