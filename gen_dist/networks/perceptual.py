"""Perceptual distance of images: differences of a frozen network's features, as in LPIPS (Zhang et al. 2018, eq. 1)."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gen_dist.config import PerceptualFeatures
from gen_dist.errors import ConfigError
from gen_dist.networks.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from gen_dist.networks.vgg import Vgg16, load_vgg16

PERCEPTUAL_CHANNELS = (1, 3)
"""Numbers of channels of images that have features: grey ones are shown with three equal channels."""
Network = EfficientNetLite0 | Vgg16
"""Has `least_side`, and `maps`: images float32 [B, 3, H, W] in -1..1 -> feature maps [B, C_l, h_l, w_l]."""


class PerceptualDistance:
    """Distance of pairs of images in a frozen network's features.

    It is no `nn.Module`: as an attribute of an objective it is in no checkpoint, optimizer or copy of the weights, is
    not wrapped for distributed training, and stays in eval mode.
    """

    def __init__(
        self,
        name: PerceptualFeatures,
        digest: str,
        network: Network,
        channel_weights: list[Tensor] | None = None,
    ) -> None:
        """See `perceptual_distance`. The network is frozen and in eval mode.

        Args:
            name: the network's name.
            digest: SHA-256 of its weights.
            network: gives the feature maps.
            channel_weights: a weight [C_l, 1, 1] for each channel of each map; the distance is then the sum over
                layers. None weights channels and layers evenly; the distance is then the mean over layers.
        """
        self.name = name
        self.digest = digest
        self._networks: dict[torch.device, tuple[Network, list[Tensor] | None]] = {
            torch.device("cpu"): (network, channel_weights)
        }

    def __deepcopy__(self, _copied: dict[int, Any]) -> PerceptualDistance:
        return self  # frozen, so a copy of an objective shares it

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distance of each image from its target, float32 [B], differentiable in `images`.

        Features are divided by their length over channels; squared differences are averaged over places.

        Args:
            images: float [B, C, H, W] in -1..1, of 1 or 3 channels. Small ones are enlarged to the network's
                `least_side` by a whole factor.
            targets: images of the same shape; they are taken as constants.

        Raises:
            ConfigError: another number of channels.
        """
        network, channel_weights = self._on(images.device)
        found = network.maps(prepared(images, network.least_side))
        with torch.no_grad():
            expected = network.maps(prepared(targets, network.least_side))
        layers = [_squared_difference(one, other) for one, other in zip(found, expected, strict=True)]
        if channel_weights is None:
            return torch.stack([squares.sum(dim=1).mean(dim=(1, 2)) for squares in layers]).mean(dim=0)
        weighted = zip(layers, channel_weights, strict=True)
        return torch.stack([(squares * weights).sum(dim=1).mean(dim=(1, 2)) for squares, weights in weighted]).sum(
            dim=0
        )

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images float [B, C, H, W] in -1..1, the largest first, differentiable in the images."""
        network, _ = self._on(images.device)
        return network.maps(prepared(images, network.least_side))

    def copy_to(self, device: torch.device) -> None:
        """Copy the network to a device now: its first use may be in code that is compiled, where copies fail."""
        self._on(device)

    def _on(self, device: torch.device) -> tuple[Network, list[Tensor] | None]:
        """The network on a device: a copy is made at the first use there."""
        if device not in self._networks:
            network, channel_weights = self._networks[torch.device("cpu")]
            moved = None if channel_weights is None else [weights.to(device) for weights in channel_weights]
            self._networks[device] = copy.deepcopy(network).to(device), moved
        return self._networks[device]


def perceptual_distance(
    name: PerceptualFeatures = "efficientnet-lite0", vgg_weights: str | Path | None = None
) -> PerceptualDistance:
    """The distance in features of a network. Its weights are read once a process.

    Args:
        name: `efficientnet-lite0`, whose weights the extra `perceptual` installs; channels and layers weigh evenly.
            `vgg16` is LPIPS itself, with the weights that were fitted to what people see.
        vgg_weights: torchvision's file of VGG16's weights; `vgg16` needs it and the package `lpips`.

    Raises:
        UserError: weights are missing, unreadable or other ones.
    """
    return _loaded(name, None if vgg_weights is None else Path(vgg_weights).absolute())


@functools.cache
def _loaded(name: PerceptualFeatures, vgg_weights: Path | None) -> PerceptualDistance:
    if name == "vgg16":
        vgg, channel_weights, digest = load_vgg16(vgg_weights)
        return PerceptualDistance(name, digest, vgg, channel_weights)
    network, digest = load_efficientnet_lite0()
    return PerceptualDistance(name, digest, network)


def refuse_channels(channels: int) -> None:
    """Raise ConfigError if images of so many channels have no perceptual features."""
    if channels not in PERCEPTUAL_CHANNELS:
        raise ConfigError(
            f"perceptual features are of images of 1 or 3 channels, not of {channels}; use perceptual weight 0, or "
            "images of 1 or 3 channels"
        )


def prepared(images: Tensor, least_side: int) -> Tensor:
    """Images [B, 1 or 3, H, W] as [B, 3, H', W'], enlarged by a whole factor until the shorter side has `least_side`.

    Raises:
        ConfigError: another number of channels.
    """
    refuse_channels(images.shape[1])
    factor = -(-least_side // min(images.shape[2:]))
    if factor > 1:
        images = enlarged(images, factor)
    return images.expand(-1, 3, -1, -1)


def enlarged(images: Tensor, factor: int) -> Tensor:
    """Bilinear interpolation of images [B, C, H, W] to `factor` times the sides.

    It is two matrix products: on GPUs, the backward pass of torch's own interpolation adds in no fixed order.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        rows, columns = (_interpolation(side, factor, images) for side in images.shape[2:])
        return rows @ images @ columns.T


def _interpolation(side: int, factor: int, like: Tensor) -> Tensor:
    """Weights [side * factor, side] of the old places in each new one."""
    places = torch.arange(side * factor, device=like.device, dtype=like.dtype)
    centres = ((places + 0.5) / factor - 0.5).clamp(0, side - 1)
    old_places = torch.arange(side, device=like.device, dtype=like.dtype)
    return (1.0 - (centres[:, None] - old_places).abs()).clamp(min=0.0)


def _squared_difference(maps: Tensor, targets: Tensor) -> Tensor:
    """Squared differences of features of unit length over channels, float32 [B, C, h, w]."""
    return (functional.normalize(maps.float(), eps=1e-10) - functional.normalize(targets.float(), eps=1e-10)).square()
