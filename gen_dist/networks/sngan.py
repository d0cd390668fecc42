"""Residual networks of SNGAN (Miyato et al. 2018, appendix B.4).

Normalization and ReLU come before each convolution, maps are resampled inside the blocks, and the discriminator sums
its last map over pixels.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from gen_dist.config import Norm, ResnetConfig
from gen_dist.config.networks import smallest_sides
from gen_dist.kernels import Linear
from gen_dist.networks.base import Decoder, Encoder, channels_last, norm_layer, set_bias
from gen_dist.networks.conditional_norm import ConditionalBatchNorm
from gen_dist.networks.self_attention import SelfAttention
from gen_dist.networks.spectral_norm import spectrally_normalize

Resampling = Literal["halve", "double", "none"]


class SnganEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs]."""

    def __init__(self, config: ResnetConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        smallest_sides(config.feature_maps, image_shape)
        self.feature_count = config.feature_maps[-1]
        self.trunk = _trunk(config, image_shape[0])
        self.head = nn.Linear(self.feature_count, outputs)
        _draw_weight(self.head, gain=1.0)
        if config.spectral_norm:
            spectrally_normalize(self)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(channels_last(images))


class SnganDecoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]."""

    def __init__(self, config: ResnetConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        smallest = smallest_sides(config.feature_maps, image_shape)
        labels = max(inputs - config.latent_dim, 0) if config.conditional_norm else 0
        self.latent_dim = inputs - labels
        self.start = _Projection(self.latent_dim, (config.feature_maps[-1], *smallest))
        self.trunk = _generator(config, image_shape[0], labels)

    def start_at(self, image: Tensor) -> None:
        set_bias(self.trunk[-1], image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor) -> Tensor:
        """Images of latents, which label vectors follow."""
        start = channels_last(self.start(latents[:, : self.latent_dim]))
        return self.trunk(start, latents[:, self.latent_dim :])


def _trunk(config: ResnetConfig, channels: int) -> nn.Sequential:
    """Build the layers from images to sums over pixels.

    The last block of each resolution except the smallest halves it.
    """
    norm = config.discriminator_norm
    layers: list[nn.Module] = []
    inputs = channels
    for level, width in enumerate(config.feature_maps):
        for block in range(config.blocks):
            halves = level + 1 < len(config.feature_maps) and block + 1 == config.blocks
            outputs = config.feature_maps[level + 1] if halves else width
            resampling: Resampling = "halve" if halves else "none"
            layers.append(_Block(inputs, width, outputs, norm, resampling, first=not layers))
            inputs = outputs
        if config.attention_factor == 2 ** (level + 1):
            layers.append(SelfAttention(inputs))
    return nn.Sequential(*layers, norm_layer(norm, inputs), nn.ReLU(), _SumOverPixels())


def _generator(config: ResnetConfig, channels: int, labels: int) -> _Layers:
    """Build the layers from the smallest map to images.

    The first block of each resolution except the smallest doubles the sides.
    """
    norm = config.generator_norm
    layers: list[nn.Module] = []
    inputs = config.feature_maps[-1]
    for level, width in reversed(list(enumerate(config.feature_maps))):
        smallest = level + 1 == len(config.feature_maps)
        if not smallest:
            layers.append(_Block(inputs, width, width, norm, "double", labels=labels))
        layers += [_Block(width, width, width, norm, "none", labels=labels) for _ in range(config.blocks - 1)]
        if config.attention_factor == 2**level:
            layers.append(SelfAttention(width))
        inputs = width
    output = nn.Conv2d(inputs, channels, kernel_size=3, padding=1)
    _draw_weight(output, gain=1.0)
    return _Layers(*layers, _norm(norm, inputs, labels), nn.ReLU(), output)


def _norm(norm: Norm, channels: int, labels: int) -> nn.Module:
    """Normalization of feature maps; conditional with label vectors of `labels` numbers, 0 if it is not."""
    return ConditionalBatchNorm(channels, labels) if labels else norm_layer(norm, channels)


class _Layers(nn.Sequential):
    """Layers of which some take label vectors [B, labels] beside feature maps."""

    def forward(self, maps: Tensor, labels: Tensor | None = None) -> Tensor:
        for layer in self:
            maps = layer(maps, labels) if isinstance(layer, (_Block, ConditionalBatchNorm)) else layer(maps)
        return maps


def _draw_weight(layer: nn.Linear | nn.Conv2d, gain: float) -> None:
    """Draw Glorot's initial weights times a gain, sqrt(2) before a ReLU, as in the code of Miyato et al. 2018."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class _Block(nn.Module):
    """Feature maps [B, inputs, H, W] -> [B, outputs, H', W']: two 3 x 3 convolutions plus a 1 x 1 shortcut.

    The 1 x 1 convolution commutes with resampling, and is done at the resolution with fewer pixels.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        norm: Norm,
        resampling: Resampling,
        *,
        first: bool = False,
        labels: int = 0,
    ) -> None:
        super().__init__()
        resample: nn.Module = nn.AvgPool2d(2) if resampling == "halve" else nn.Upsample(scale_factor=2)
        convolutions = (
            nn.Conv2d(inputs, hidden, kernel_size=3, padding=1, bias=norm == "none"),
            nn.Conv2d(hidden, outputs, kernel_size=3, padding=1),
        )
        for convolution in convolutions:
            _draw_weight(convolution, gain=math.sqrt(2))
        residual: list[nn.Module] = [convolutions[0], _norm(norm, hidden, labels), nn.ReLU(), convolutions[1]]
        shortcut: list[nn.Module] = []
        if resampling != "none" or inputs != outputs:
            shortcut = [nn.Conv2d(inputs, outputs, kernel_size=1)]
            _draw_weight(shortcut[0], gain=1.0)  # type: ignore[arg-type]
        if resampling == "halve":
            residual, shortcut = [*residual, resample], [resample, *shortcut]
        elif resampling == "double":
            residual, shortcut = [resample, *residual], [*shortcut, resample]
        if not first:  # the first block gets images, not activations
            residual = [_norm(norm, inputs, labels), nn.ReLU(), *residual]  # not in place: the shortcut reads its input
        self.residual = _Layers(*residual)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, maps: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.shortcut(maps) + self.residual(maps, labels)


class _Projection(nn.Module):
    """Latents [B, inputs] -> [B, *shape] by one linear layer."""

    def __init__(self, inputs: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.linear = Linear(inputs, math.prod(shape))
        _draw_weight(self.linear, gain=1.0)

    def forward(self, latents: Tensor) -> Tensor:
        return self.linear(latents).unflatten(1, self.shape)


class _SumOverPixels(nn.Module):
    """Feature maps [B, C, H, W] -> [B, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.sum(dim=(2, 3))
