"""Residual networks of generators and discriminators, with one of two kinds of blocks.

`sngan` (Miyato et al. 2018, appendix B.4): normalization and ReLU come before each convolution, images are resampled
inside the blocks, and the discriminator adds up its last map. `r3gan` (Huang et al. 2024): each block is a bottleneck
of grouped convolutions that starts as the identity, images are resampled between the blocks, and both nets meet the
smallest map by one weight for each of its pixels and channels.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import Norm, ResnetConfig
from gen_dist.errors import ConfigError
from gen_dist.kernels import Linear
from gen_dist.networks.base import (
    Decoder,
    Encoder,
    channels_last,
    draw_weight,
    norm_layer,
    set_bias,
    spectrally_normalize,
)

Resampling = Literal["halve", "double", "none"]

_GROUP_WIDTH = 16
"""Channels in a group of the 3 x 3 convolution of an `r3gan` block, as in the code of the paper, or fewer."""
_LEAKY_GAIN = math.sqrt(2 / (1 + 0.2**2))
"""What a leaky ReLU of slope 0.2 takes from the size of activations."""


def _last_sides(config: ResnetConfig, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the smallest map."""
    height, width = image_shape[1:]
    levels = len(config.feature_maps)
    step = 2 ** (levels - 1)
    if height % step or width % step:
        shorter = min(height, width)
        nearest = " or ".join(map(str, sorted({max(step, shorter // step * step), -(-shorter // step) * step})))
        # The largest power of two in both sides tells how often they can be halved.
        halvings = (math.gcd(height, width) & -math.gcd(height, width)).bit_length() - 1
        fewer = f", or name {halvings + 1} feature_maps at most" if halvings else ""
        raise ConfigError(
            f"{levels} feature_maps halve both sides of an image {levels - 1} times, which {height} x {width} do not "
            f"allow; use --image-size {nearest}{fewer}"
        )
    return height // step, width // step


class ResnetEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs]."""

    def __init__(self, config: ResnetConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.feature_count = config.feature_maps[-1]
        if config.block == "sngan":
            _last_sides(config, image_shape)
            self.trunk = _sngan_trunk(config, image_shape[0])
            self.head = nn.Linear(self.feature_count, outputs)
            _draw_sngan_weight(self.head, gain=1.0)
        else:
            self.trunk = _r3gan_trunk(config, image_shape[0], _last_sides(config, image_shape))
            self.head = nn.Linear(self.feature_count, outputs, bias=False)
            draw_weight(self.head, gain=1.0)
        if config.spectral_norm:
            spectrally_normalize(self)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(channels_last(images))


class ResnetDecoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]."""

    def __init__(self, config: ResnetConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        shape = (config.feature_maps[-1], *_last_sides(config, image_shape))
        if config.block == "sngan":
            self.start: nn.Module = _Projection(inputs, shape)
            self.trunk = _sngan_generator(config, image_shape[0])
        else:
            self.start = _ModulatedBasis(inputs, shape)
            self.trunk = _r3gan_generator(config, image_shape[0])

    def start_at(self, image: Tensor) -> None:
        set_bias(self.trunk[-1], image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor) -> Tensor:
        return self.trunk(channels_last(self.start(latents)))


def _sngan_trunk(config: ResnetConfig, channels: int) -> nn.Sequential:
    """Images to the sums of the last map's channels. The last block of each resolution but the smallest halves it."""
    norm = config.discriminator_norm
    layers: list[nn.Module] = []
    inputs = channels
    for level, width in enumerate(config.feature_maps):
        for block in range(config.blocks):
            halves = level + 1 < len(config.feature_maps) and block + 1 == config.blocks
            outputs = config.feature_maps[level + 1] if halves else width
            resampling: Resampling = "halve" if halves else "none"
            layers.append(_SnganBlock(inputs, width, outputs, norm, resampling, first=not layers))
            inputs = outputs
    return nn.Sequential(*layers, norm_layer(norm, inputs), nn.ReLU(), _SumOverPixels())


def _sngan_generator(config: ResnetConfig, channels: int) -> nn.Sequential:
    """The smallest map to images. The first block of each resolution but the smallest doubles the one before."""
    norm = config.generator_norm
    layers: list[nn.Module] = []
    inputs = config.feature_maps[-1]
    for level, width in reversed(list(enumerate(config.feature_maps))):
        smallest = level + 1 == len(config.feature_maps)
        if not smallest:
            layers.append(_SnganBlock(inputs, width, width, norm, "double"))
        layers += [_SnganBlock(width, width, width, norm, "none") for _ in range(config.blocks - 1)]
        inputs = width
    output = nn.Conv2d(inputs, channels, kernel_size=3, padding=1)
    _draw_sngan_weight(output, gain=1.0)
    return nn.Sequential(*layers, norm_layer(norm, inputs), nn.ReLU(), output)


def _draw_sngan_weight(layer: nn.Linear | nn.Conv2d, gain: float) -> None:
    """Initial values as in the code of Miyato et al. 2018: Glorot's, larger by the square root of 2 before a ReLU."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class _SnganBlock(nn.Module):
    """Feature maps [B, inputs, H, W] -> [B, outputs, H', W'] by two 3 x 3 convolutions, added to a 1 x 1 of the input.

    The 1 x 1 convolution stands on the side with fewer pixels: it commutes with resampling.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, norm: Norm, resampling: Resampling, first: bool = False
    ) -> None:
        super().__init__()
        resample: nn.Module = nn.AvgPool2d(2) if resampling == "halve" else nn.Upsample(scale_factor=2)
        convolutions = (
            nn.Conv2d(inputs, hidden, kernel_size=3, padding=1, bias=norm == "none"),
            nn.Conv2d(hidden, outputs, kernel_size=3, padding=1),
        )
        for convolution in convolutions:
            _draw_sngan_weight(convolution, gain=math.sqrt(2))
        residual: list[nn.Module] = [convolutions[0], norm_layer(norm, hidden), nn.ReLU(), convolutions[1]]
        shortcut: list[nn.Module] = []
        if resampling != "none" or inputs != outputs:
            shortcut = [nn.Conv2d(inputs, outputs, kernel_size=1)]
            _draw_sngan_weight(shortcut[0], gain=1.0)  # type: ignore[arg-type]
        if resampling == "halve":
            residual, shortcut = [*residual, resample], [resample, *shortcut]
        elif resampling == "double":
            residual, shortcut = [resample, *residual], [*shortcut, resample]
        if not first:  # images are no activations: they enter as they are
            residual = [norm_layer(norm, inputs), nn.ReLU(), *residual]  # not in place: the shortcut has the same maps
        self.residual = nn.Sequential(*residual)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        return self.shortcut(maps) + self.residual(maps)


class _Projection(nn.Module):
    """Latents [B, inputs] -> [B, *shape] by one linear layer."""

    def __init__(self, inputs: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.linear = Linear(inputs, math.prod(shape))
        _draw_sngan_weight(self.linear, gain=1.0)

    def forward(self, latents: Tensor) -> Tensor:
        return self.linear(latents).unflatten(1, self.shape)


class _SumOverPixels(nn.Module):
    """Feature maps [B, C, H, W] -> [B, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.sum(dim=(2, 3))


def _r3gan_trunk(config: ResnetConfig, channels: int, last_sides: tuple[int, int]) -> nn.Sequential:
    """Images to one weighted sum of each channel of the last map."""
    widths = config.feature_maps
    layers: list[nn.Module] = [_pointwise(channels, widths[0])]
    for level, width in enumerate(widths):
        layers += _r3gan_blocks(config, width, config.discriminator_norm, config.spectral_norm)
        if level + 1 < len(widths):
            layers.append(_Bilinear("halve"))
            if widths[level + 1] != width:
                layers.append(_pointwise(width, widths[level + 1]))
    last = nn.Conv2d(widths[-1], widths[-1], kernel_size=last_sides, groups=widths[-1], bias=False)
    draw_weight(last, gain=1.0)
    return nn.Sequential(*layers, last, nn.Flatten())


def _r3gan_generator(config: ResnetConfig, channels: int) -> nn.Sequential:
    """The smallest map to images."""
    layers: list[nn.Module] = []
    before = config.feature_maps[-1]
    for level, width in reversed(list(enumerate(config.feature_maps))):
        if level + 1 < len(config.feature_maps):
            if before != width:
                layers.append(_pointwise(before, width))
            layers.append(_Bilinear("double"))
        layers += _r3gan_blocks(config, width, config.generator_norm)
        before = width
    return nn.Sequential(*layers, _pointwise(before, channels, bias=True))


def _pointwise(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=1, bias=bias)
    draw_weight(convolution, gain=1.0)
    return convolution


def _r3gan_blocks(config: ResnetConfig, width: int, norm: Norm, spectral_norm: bool = False) -> list[nn.Module]:
    """The blocks of one resolution.

    So that the net starts out alike whatever its depth, weights shrink with the number of branches (Zhang et al. 2019)
    and the last of each starts at zero. Where a spectral norm divides the weights, their scale means nothing, and zero
    has none to divide by: the last of each then starts like the others.
    """
    gain = _LEAKY_GAIN * (config.blocks * len(config.feature_maps)) ** -0.25
    last_gain = gain if spectral_norm else 0.0
    return [_R3ganBlock(width, norm, gain, last_gain) for _ in range(config.blocks)]


class _R3ganBlock(nn.Module):
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
