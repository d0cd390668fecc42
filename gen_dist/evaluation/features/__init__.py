"""Feature networks for comparing images: the package's digit network, and the InceptionV3 of the literature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gen_dist.evaluation.features.digits import IMAGE_SHAPE, WEIGHTS_FILE, load_digit_network
from gen_dist.evaluation.features.inception import load_inception

FeatureName = Literal["digits", "inception"]


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that maps images to features."""

    name: FeatureName
    digest: str
    """SHA-256 of its weights."""
    of_images: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Images uint8 [B, C, H, W] -> features float32 [B, F], and classes int64 [B] if it is a classifier."""
    of_intensities: Callable[[Tensor], Tensor] | None
    """Images float32 [B, C, H, W] in 0..1 -> features. None for a network that takes 8-bit images alone."""


def fits_digits(image_shape: tuple[int, int, int]) -> bool:
    """True if the digit network takes images (C, H, W)."""
    return image_shape == IMAGE_SHAPE


def feature_network(name: FeatureName, device: torch.device, inception_weights: Path | None = None) -> FeatureNetwork:
    """A network, ready on a device.

    Raises:
        UserError: InceptionV3 or its weights are not at hand.
    """
    if name == "inception":
        inception, digest = load_inception(inception_weights)
        inception.to(device)
        return FeatureNetwork(name, digest, lambda images: (inception(images), None), None)
    digits = load_digit_network().to(device)

    def of_images(images: Tensor) -> tuple[Tensor, Tensor]:
        found = digits(images * (1.0 / 255.0))
        return found.features, found.logits.argmax(dim=1)

    digest = hashlib.sha256(WEIGHTS_FILE.read_bytes()).hexdigest()
    return FeatureNetwork(name, digest, of_images, lambda intensities: digits(intensities).features)
