"""Feature networks for comparing images: the package's digit network, EfficientNet-Lite0, and InceptionV3."""

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
from gen_dist.networks.efficientnet_lite import load_efficientnet_lite0
from gen_dist.networks.perceptual import prepared

FeatureName = Literal["digits", "efficientnet-lite0", "inception"]

IMAGES_PER_PASS = 32
"""Images that pass EfficientNet-Lite0 at once: small parts keep its wide maps in the caches."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that maps images to features."""

    name: FeatureName
    digest: str
    """SHA-256 of its weights."""
    of_images: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Images [B, C, H, W] in 0..255 -> features float32 [B, F], and classes int64 [B] if it is a classifier."""
    of_intensities: Callable[[Tensor], Tensor] | None
    """Images float32 [B, C, H, W] in 0..1 -> features. None for a network that takes 8-bit images alone."""


def fits_digits(image_shape: tuple[int, int, int]) -> bool:
    """True if the digit network takes images (C, H, W)."""
    return image_shape == IMAGE_SHAPE


def feature_network(name: FeatureName, device: torch.device, inception_weights: Path | None = None) -> FeatureNetwork:
    """A network, ready on a device.

    Raises:
        UserError: the network's weights or package are not at hand.
    """
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(device)
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


def _efficientnet_lite0(device: torch.device) -> FeatureNetwork:
    network, digest = load_efficientnet_lite0()
    network.to(device)

    def of_intensities(intensities: Tensor) -> Tensor:
        parts = intensities.split(IMAGES_PER_PASS)
        return torch.cat([network(prepared(part * 2.0 - 1.0, network.least_side)) for part in parts])

    def of_images(images: Tensor) -> tuple[Tensor, None]:
        return of_intensities(images * (1.0 / 255.0)), None

    return FeatureNetwork("efficientnet-lite0", digest, of_images, of_intensities)
