"""Generator of StyleGAN2 (Karras et al. 2020, section 2 and appendix B; configuration F).

A mapping network turns latents into a style, which scales the inputs of every convolution (modulation); its outputs are
scaled to unit variance (demodulation). Each resolution adds its image to that of the resolution before (skip
outputs). Weights are stored with unit variance and multiplied by their scale at each use (equalized learning rate:
Karras et al. 2018, section 4.1).
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import Stylegan2Config
from gen_dist.networks.base import Decoder, channels_last, set_bias
from gen_dist.networks.halving import Binomial, halved_to_few_pixels

_EPSILON = 1e-8
"""Added to the squares of norms that divide."""


class Stylegan2Decoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]. Inputs after `latent_dim` are classes, one-hot.

    Noise inputs are an argument, or fixed maps that are saved with the weights.
    """

    constant: Tensor
    fixed_noise: Tensor
    mean_style: Tensor

    def __init__(self, config: Stylegan2Config, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        halvings, (height, width) = halved_to_few_pixels("stylegan2", image_shape)
        self.mapping = _Mapping(config, inputs)
        side = min(height, width)
        channels = [config.channels(side << level) for level in range(halvings + 1)]
        self.constant = nn.Parameter(torch.randn(channels[0], height, width))
        self.levels = nn.ModuleList(
            _Level(channels[max(level - 1, 0)], count, config.style_dim, image_shape[0], doubles=level > 0)
            for level, count in enumerate(channels)
        )
        self.double_image = Binomial("double")
        sides = [(height << level, width << level) for level in range(halvings + 1) for _ in range(2)][1:]
        self._noise_sides = sides
        self.register_buffer("fixed_noise", torch.randn(sum(math.prod(each) for each in sides)))
        self.register_buffer("mean_style", torch.zeros(config.style_dim))
        self.noise_count = len(self.fixed_noise) if config.noise == "keyed" else 0
        self.truncation = 1.0
        """Distance of styles from `mean_style`, as a fraction (Karras et al. 2019, appendix B); see
        `gen_dist.inference.truncation`."""

    def start_at(self, image: Tensor) -> None:
        last = self.levels[-1]
        assert isinstance(last, _Level)
        set_bias(last.to_image, image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images of latents, with noise [B, noise_count], or with the fixed noise."""
        styles = self.mapping(latents)
        if self.truncation != 1.0:
            styles = self.mean_style + self.truncation * (styles - self.mean_style)
        return self.synthesize(styles, noise)

    @property
    def places(self) -> int:
        """Number of places of the synthesis that take a style; at each resolution the last one makes the image."""
        return 2 * len(self.levels)

    def styles(self, latents: Tensor) -> Tensor:
        """Styles of latents at all places, [B, places, style_dim]."""
        return self.mapping(latents)[:, None].expand(-1, self.places, -1)

    def synthesize(self, styles: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images of styles [B, style_dim], or [B, places, style_dim] with one for each place; with noise [B, numbers],
        or [numbers] for all images, or the fixed noise."""
        noise = self.fixed_noise if noise is None else noise
        sizes = [math.prod(each) for each in self._noise_sides]
        noises = [
            each.reshape(-1, 1, *sides)
            for each, sides in zip(noise.split(sizes, dim=-1), self._noise_sides, strict=True)
        ]
        maps = channels_last(self.constant.expand(styles.shape[0], -1, -1, -1))
        image: Tensor | None = None
        for place, level in enumerate(self.levels):
            first = max(2 * place - 1, 0)
            maps, addend = level(maps, _at_places(styles, first, 2 * place + 2), noises[first : 2 * place + 1])
            image = addend if image is None else self.double_image(image) + addend
        assert image is not None
        return image


def _at_places(styles: Tensor, first: int, last: int) -> list[Tensor]:
    """Styles [B, style_dim] of the places first .. last - 1, from one for all or one for each."""
    return [styles] * (last - first) if styles.ndim == 2 else list(styles[:, first:last].unbind(1))


class EqualizedLinear(nn.Linear):
    """A linear layer with weights of unit variance, scaled at each use; `rate` scales its learning rate."""

    def __init__(self, inputs: int, outputs: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight, std=1.0 / rate)
        nn.init.constant_(self.bias, bias / rate)
        self.rate = rate
        self.gain = rate / math.sqrt(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, inputs] -> [B, outputs]."""
        return F.linear(inputs, self.weight * self.gain, self.bias * self.rate)


def scaled_leaky_relu(values: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2, times sqrt(2) to keep the variance."""
    return F.leaky_relu(values, 0.2) * math.sqrt(2)


class _Mapping(nn.Module):
    """Latents [B, latent_dim + classes] -> styles [B, style_dim]: fully connected layers on normalized latents.

    Classes are embedded and normalized like the latents, and follow them (Karras et al. 2020a, appendix D).
    """

    def __init__(self, config: Stylegan2Config, inputs: int) -> None:
        super().__init__()
        self.latent_dim = min(config.latent_dim, inputs)
        classes = inputs - self.latent_dim
        self.embedding = EqualizedLinear(classes, self.latent_dim) if classes else None
        widths = [self.latent_dim * (2 if classes else 1), *[config.style_dim] * config.mapping_layers]
        self.layers = nn.ModuleList(
            EqualizedLinear(before, after, rate=config.mapping_rate) for before, after in itertools.pairwise(widths)
        )

    def forward(self, latents: Tensor) -> Tensor:
        styles = _normalized(latents[:, : self.latent_dim])
        if self.embedding is not None:
            embedded = _normalized(self.embedding(latents[:, self.latent_dim :]))
            styles = torch.cat([styles, embedded], dim=1)
        for layer in self.layers:
            styles = scaled_leaky_relu(layer(styles))
        return styles


def _normalized(values: Tensor) -> Tensor:
    """Values [B, D], each row divided by its root mean square."""
    return values * (values.square().mean(dim=1, keepdim=True) + _EPSILON).rsqrt()


class _ModulatedConvolution(nn.Module):
    """Convolution with weights that a style scales for each image (Karras et al. 2020, eq. 1 to 3).

    The weights of image b are w[o, i] * s[b, i], divided by their norm over i and the kernel. Scaling inputs by s and
    outputs by the reciprocal norm is the same, and needs no weights of an image's own. With `doubles`, zeros between
    the pixels come before the convolution (as a transposed one), and the binomial filter comes after it.
    """

    def __init__(
        self, inputs: int, outputs: int, style_dim: int, kernel: int, *, doubles: bool = False, demodulates: bool = True
    ) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.gain = 1.0 / math.sqrt(inputs * kernel**2)
        self.padding = kernel // 2
        self.demodulates = demodulates
        self.smooth = Binomial("none", padding=1, gain=4.0) if doubles else None

    def forward(self, maps: Tensor, styles: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] and styles [B, style_dim] -> [B, outputs, H, W], or twice the sides."""
        scales = self.style(styles)
        weight = self.weight * self.gain
        maps = maps * scales[:, :, None, None]
        if self.smooth is None:
            maps = F.conv2d(maps, weight, padding=self.padding)
        else:
            maps = self.smooth(F.conv_transpose2d(maps, weight.transpose(0, 1), stride=2))
        if self.demodulates:
            squares = F.linear(scales.square(), weight.square().sum(dim=(2, 3)))
            maps = maps * (squares + _EPSILON).rsqrt()[:, :, None, None]
        return maps


class _Layer(nn.Module):
    """Modulated convolution, noise, bias and leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, *, doubles: bool = False) -> None:
        super().__init__()
        self.convolution = _ModulatedConvolution(inputs, outputs, style_dim, kernel=3, doubles=doubles)
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, maps: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
        """Maps [B, inputs, H, W], styles [B, style_dim] and noise [B or 1, 1, H', W'] -> [B, outputs, H', W']."""
        maps = self.convolution(maps, styles)
        noise = (noise * self.noise_strength).to(maps.dtype)
        return scaled_leaky_relu(maps + noise + self.bias[:, None, None].to(maps.dtype))


class _ToImage(nn.Module):
    """Maps [B, inputs, H, W] to an image of this resolution, without demodulation."""

    def __init__(self, inputs: int, channels: int, style_dim: int) -> None:
        super().__init__()
        self.convolution = _ModulatedConvolution(inputs, channels, style_dim, kernel=1, demodulates=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor, styles: Tensor) -> Tensor:
        return self.convolution(maps, styles) + self.bias[:, None, None]


class _Level(nn.Module):
    """Layers of one resolution: two, of which the first doubles the sides; one at the smallest resolution."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, channels: int, *, doubles: bool) -> None:
        super().__init__()
        layers = [_Layer(inputs, outputs, style_dim, doubles=True)] if doubles else []
        self.layers = nn.ModuleList([*layers, _Layer(outputs, outputs, style_dim)])
        self.to_image = _ToImage(outputs, channels, style_dim)

    def forward(self, maps: Tensor, styles: list[Tensor], noises: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps of this resolution, and what it adds to the image. Styles [B, style_dim] are of the layers, then of the
        image."""
        for layer, style, noise in zip(self.layers, styles[:-1], noises, strict=True):
            maps = layer(maps, style, noise)
        return maps, self.to_image(maps, styles[-1])
