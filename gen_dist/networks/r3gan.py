"""Residual networks of R3GAN (Huang et al. 2024).

Each block is a bottleneck of grouped convolutions that starts as the identity, images are resampled between the blocks,
and the smallest map is read and made by one weight for each of its pixels and channels.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import Norm, ResnetConfig
from gen_dist.kernels import Linear
from gen_dist.networks.base import Decoder, Encoder, channels_last, draw_weight, last_sides, norm_layer, set_bias
from gen_dist.networks.spectral_norm import spectrally_normalize

_GROUP_WIDTH = 16
"""Channels in a group of a block's 3 x 3 convolution, as in the code of the paper, or fewer."""
_LEAKY_GAIN = math.sqrt(2 / (1 + 0.2**2))
"""Factor by which a leaky ReLU of slope 0.2 shrinks activations."""


class R3ganEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs]."""

    def __init__(self, config: ResnetConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.feature_count = config.feature_maps[-1]
        self.trunk = _trunk(config, image_shape[0], last_sides(config, image_shape))
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
        self.start = _ModulatedBasis(inputs, (config.feature_maps[-1], *last_sides(config, image_shape)))
        self.trunk = _generator(config, image_shape[0])

    def start_at(self, image: Tensor) -> None:
        set_bias(self.trunk[-1], image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor) -> Tensor:
        return self.trunk(channels_last(self.start(latents)))


def _trunk(config: ResnetConfig, channels: int, sides: tuple[int, int]) -> nn.Sequential:
    """Images to one weighted sum of each channel of the last map."""
    widths = config.feature_maps
    layers: list[nn.Module] = [_pointwise(channels, widths[0])]
    for level, width in enumerate(widths):
        layers += _blocks(config, width, config.discriminator_norm, config.spectral_norm)
        if level + 1 < len(widths):
            layers.append(_Bilinear("halve"))
            if widths[level + 1] != width:
                layers.append(_pointwise(width, widths[level + 1]))
    last = nn.Conv2d(widths[-1], widths[-1], kernel_size=sides, groups=widths[-1], bias=False)
    draw_weight(last, gain=1.0)
    return nn.Sequential(*layers, last, nn.Flatten())


def _generator(config: ResnetConfig, channels: int) -> nn.Sequential:
    """The smallest map to images."""
    layers: list[nn.Module] = []
    before = config.feature_maps[-1]
    for level, width in reversed(list(enumerate(config.feature_maps))):
        if level + 1 < len(config.feature_maps):
            if before != width:
                layers.append(_pointwise(before, width))
            layers.append(_Bilinear("double"))
        layers += _blocks(config, width, config.generator_norm)
        before = width
    return nn.Sequential(*layers, _pointwise(before, channels, bias=True))


def _pointwise(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=1, bias=bias)
    draw_weight(convolution, gain=1.0)
    return convolution


def _blocks(config: ResnetConfig, width: int, norm: Norm, spectral_norm: bool = False) -> list[nn.Module]:
    """The blocks of one resolution.

    So that the net starts out alike whatever its depth, weights shrink with the number of branches (Zhang et al. 2019)
    and the last of each starts at zero. Where a spectral norm divides the weights, their scale means nothing, and zero
    has none to divide by: the last of each then starts like the others.
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


class _Bilinear(nn.Module):
    """Feature maps at half or twice the side by the bilinear filter, weights 1 3 3 1 along each side; zeros outside.

    A convolution of each channel by itself: torch's own interpolation adds gradients up in any order on GPUs.
    """

    kernel: Tensor

    def __init__(self, resampling: Literal["halve", "double"]) -> None:
        super().__init__()
        self.convolve = F.conv2d if resampling == "halve" else F.conv_transpose2d
        weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (8.0 if resampling == "halve" else 4.0)
        self.register_buffer("kernel", torch.outer(weights, weights)[None, None], persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        channels = maps.shape[1]
        kernel = self.kernel.to(maps.dtype).expand(channels, -1, -1, -1)
        return self.convolve(maps, kernel, stride=2, padding=1, groups=channels)
