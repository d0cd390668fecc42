"""Discriminator on pretrained features (Sauer et al. 2021, section 3).

A frozen network gives maps at 1/4 to 1/32 of the sides. Random convolutions that never train mix their channels, then
their scales, from small to large. A small discriminator of each scale gives logits of patches; the loss is a mean over
the logits of all scales.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gen_dist.config import ProjectedConfig
from gen_dist.errors import ConfigError
from gen_dist.networks.base import Encoder, norm_layer
from gen_dist.networks.efficientnet_lite import EfficientNetLite0
from gen_dist.networks.perceptual import PerceptualDistance, enlarged, perceptual_distance, refuse_channels
from gen_dist.networks.spectral_norm import spectrally_normalize

_CHANNELS = (24, 40, 112, 320)
"""Channels of the frozen maps, the largest first."""
_LAST_SIDE = 8
"""Side to which the discriminator of a scale halves its maps."""


class ProjectedEncoder(Encoder):
    """Images [B, 1 or 3, H, W] -> logits [B, 1, N, 1] of the patches of all scales.

    The frozen network is read from its package at the first use, and is in no checkpoint.
    """

    def __init__(self, config: ProjectedConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        """Draw the random convolutions, and build a discriminator for each scale.

        Raises:
            ConfigError: it is to be more than a discriminator, or the images have another number of channels.
        """
        super().__init__()
        if outputs != 1:
            raise ConfigError("projected is a discriminator alone; name it with --discriminator projected")
        refuse_channels(image_shape[0])
        widths = [config.feature_maps * 2**level for level in range(len(_CHANNELS))]
        self.mixed_channels = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=1) for before, after in zip(_CHANNELS, widths, strict=True)
        )
        narrowed = [max(1, width // 2) for width in widths]
        self.mixed_scales = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=1) for before, after in zip(widths, narrowed, strict=True)
        )
        for layer in (*self.mixed_channels, *self.mixed_scales):
            nn.init.kaiming_normal_(layer.weight)
            layer.requires_grad_(False)
        side = min(image_shape[1:])
        side *= -(-EfficientNetLite0.least_side // side)
        # Maps have 1/4 to 1/32 of the sides, rounded up at each halving, and are doubled.
        sides = [2 * -(-side // 2 ** (level + 2)) for level in range(len(_CHANNELS))]
        self.scales = nn.ModuleList(_Scale(*one, config) for one in zip(narrowed, sides, strict=True))
        self._frozen: PerceptualDistance | None = None
        self.feature_count = 1
        self.head = nn.Identity()
        spectrally_normalize(self.scales)

    def train(self, mode: bool = True) -> Self:
        """Read the frozen network before training, and copy it to the device: compiled code can do neither."""
        if mode:
            self._frozen = perceptual_distance()
            self._frozen.copy_to(next(self.parameters()).device)
        return super().train(mode)

    def features(self, images: Tensor) -> Tensor:
        frozen = (self._frozen or perceptual_distance()).maps(images)[1:]
        mixed = [layer(maps) for layer, maps in zip(self.mixed_channels, frozen, strict=True)]
        below: Tensor | None = None
        logits = []
        for level in reversed(range(len(mixed))):
            maps = mixed[level]
            if below is not None:  # of a side that was rounded up, one more
                maps = maps + below[:, :, : maps.shape[2], : maps.shape[3]]
            below = self.mixed_scales[level](enlarged(maps, 2))
            logits.append(self.scales[level](below).flatten(1))
        return torch.cat(logits, dim=1)[:, None, :, None]


class _Scale(nn.Sequential):
    """Maps [B, C, h, w] of a scale -> logits [B, 1, h', w']: halvings to a side of 8, and a convolution of 4 x 4.

    Maps of that side have a layer that does not halve, in place of the halving that they have at the authors' 224
    pixels. Without one, logits are products with the frozen maps as they are: their gradients in the images are twenty
    times those of other scales, and the generator heeds nothing else.
    """

    def __init__(self, inputs: int, side: int, config: ProjectedConfig) -> None:
        layers: list[nn.Module] = []
        while side > _LAST_SIDE or not layers:
            halves = side > _LAST_SIDE
            kernel, stride = (4, 2) if halves else (3, 1)
            bias = config.discriminator_norm == "none"
            layers += [
                nn.Conv2d(inputs, 2 * inputs, kernel_size=kernel, stride=stride, padding=1, bias=bias),
                norm_layer(config.discriminator_norm, 2 * inputs),
                nn.LeakyReLU(0.2),
            ]
            inputs, side = 2 * inputs, side // stride
        super().__init__(*layers, nn.Conv2d(inputs, 1, kernel_size=4, bias=False))
