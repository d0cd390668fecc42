"""Residual networks of R3GAN (Huang et al. 2024).

Each block is a bottleneck of grouped convolutions, initially the identity, and maps are resampled between the blocks.
Encoder and decoder have one weight for each pixel and channel of the smallest map.
"""

import math

import torch
from torch import Tensor, nn

from gen_dist.config import Norm, ResnetConfig
from gen_dist.config.networks import smallest_sides
from gen_dist.kernels import Linear
from gen_dist.networks.base import Decoder, Encoder, channels_last, draw_weight, norm_layer, set_bias
from gen_dist.networks.halving import Binomial
from gen_dist.networks.spectral_norm import spectrally_normalize

_GROUP_WIDTH = 16
"""Largest number of channels in a group of a block's 3 x 3 convolution, as in the code of the paper."""
_LEAKY_GAIN = math.sqrt(2 / (1 + 0.2**2))
"""Gain that compensates for a leaky ReLU of slope 0.2."""


class R3ganEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs]."""

    def __init__(self, config: ResnetConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.feature_count = config.feature_maps[-1]
        self.trunk = _trunk(config, image_shape[0], smallest_sides(config.feature_maps, image_shape))
        self.head = nn.Linear(self.feature_count, outputs, bias=False)
        draw_weight(self.head, gain=1.0)
        if config.spectral_norm:
            spectrally_normalize(self)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(channels_last(images))


class R3ganDecoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]."""

    def __init__(self, config: ResnetConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        self.start = _ModulatedBasis(
            inputs, (config.feature_maps[-1], *smallest_sides(config.feature_maps, image_shape))
        )
        self.trunk = _generator(config, image_shape[0])

    def start_at(self, image: Tensor) -> None:
        set_bias(self.trunk[-1], image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor) -> Tensor:
        return self.trunk(channels_last(self.start(latents)))


def _trunk(config: ResnetConfig, channels: int, sides: tuple[int, int]) -> nn.Sequential:
    """Build the layers from images to a weighted sum of each channel of the last map."""
    widths = config.feature_maps
    layers: list[nn.Module] = [_pointwise(channels, widths[0])]
    for level, width in enumerate(widths):
        layers += _blocks(config, width, config.discriminator_norm, config.spectral_norm)
        if level + 1 < len(widths):
            layers.append(Binomial("halve"))
            if widths[level + 1] != width:
                layers.append(_pointwise(width, widths[level + 1]))
    last = nn.Conv2d(widths[-1], widths[-1], kernel_size=sides, groups=widths[-1], bias=False)
    draw_weight(last, gain=1.0)
    return nn.Sequential(*layers, last, nn.Flatten())


def _generator(config: ResnetConfig, channels: int) -> nn.Sequential:
    """Build the layers from the smallest map to images."""
    layers: list[nn.Module] = []
    before = config.feature_maps[-1]
    for level, width in reversed(list(enumerate(config.feature_maps))):
        if level + 1 < len(config.feature_maps):
            if before != width:
                layers.append(_pointwise(before, width))
            layers.append(Binomial("double"))
        layers += _blocks(config, width, config.generator_norm)
        before = width
    return nn.Sequential(*layers, _pointwise(before, channels, bias=True))


def _pointwise(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=1, bias=bias)
    draw_weight(convolution, gain=1.0)
    return convolution


def _blocks(config: ResnetConfig, width: int, norm: Norm, spectral_norm: bool = False) -> list[nn.Module]:
    """Build the blocks of one resolution.

    Weights shrink with the number of blocks, and the last convolution of each block starts at zero, so the initial
    network does not depend on its depth (Zhang et al. 2019). Spectral normalization removes the scale of weights and
    cannot divide zero by its norm: with it, the last convolution starts like the others.
    """
    gain = _LEAKY_GAIN * (config.blocks * len(config.feature_maps)) ** -0.25
    last_gain = gain if spectral_norm else 0.0
    return [_Block(width, norm, gain, last_gain) for _ in range(config.blocks)]


class _Block(nn.Module):
    """Feature maps [B, C, H, W] -> the same shape: 1 x 1 to twice the channels, grouped 3 x 3, 1 x 1 back, added."""

    def __init__(self, width: int, norm: Norm, gain: float, last_gain: float) -> None:
        super().__init__()
        inner = 2 * width
        most = max(1, inner // _GROUP_WIDTH)
        groups = max(count for count in range(1, most + 1) if inner % count == 0)
        bias = norm == "none"
        widening = nn.Conv2d(width, inner, kernel_size=1, bias=bias)
        grouped = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=groups, bias=bias)
        narrowing = nn.Conv2d(inner, width, kernel_size=1, bias=False)
        for convolution, its_gain in ((widening, gain), (grouped, gain), (narrowing, last_gain)):
            draw_weight(convolution, its_gain)
        self.residual = nn.Sequential(
            widening,
            norm_layer(norm, inner),
            nn.LeakyReLU(0.2),
            grouped,
            norm_layer(norm, inner),
            nn.LeakyReLU(0.2),
            narrowing,
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.residual(maps)


class _ModulatedBasis(nn.Module):
    """Latents [B, inputs] -> [B, *shape]: one learned map, each channel scaled by a linear function of the latents."""

    def __init__(self, inputs: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(shape))
        self.linear = Linear(inputs, shape[0], bias=False)
        draw_weight(self.linear, gain=1.0)

    def forward(self, latents: Tensor) -> Tensor:
        return self.basis * self.linear(latents)[:, :, None, None]
