"""Generator of FastGAN (Liu et al. 2021, section 3.1 and the authors' code).

Each doubling is a convolution with gated linear units; every second one has two convolutions with noise between them.
Skip-layer excitation: a map scales the channels of the one with sixteen times its sides.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import FastganConfig
from gen_dist.networks.base import Decoder, channels_last, norm_layer, set_bias
from gen_dist.networks.halving import halved_to_few_pixels

_WIDTHS = {4: 16.0, 8: 8.0, 16: 4.0, 32: 2.0, 64: 2.0, 128: 1.0, 256: 0.5, 512: 0.25, 1024: 0.125}
"""Channels of a map relative to `feature_maps`, by the power of two up to its shorter side."""
_LEAPS = 4
"""Doublings between a map and the one that it excites."""


class FastganDecoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]. Noise inputs are an argument, or fixed maps that are saved."""

    fixed_noise: Tensor

    def __init__(self, config: FastganConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        halvings, self.smallest_sides = halved_to_few_pixels("fastgan", image_shape)
        side = min(self.smallest_sides)
        powers = [1 << (side << level).bit_length() - 1 for level in range(halvings + 1)]
        widths = [max(1, int(config.feature_maps * _WIDTHS.get(power, 0.125))) for power in powers]
        norm = config.generator_norm
        self.widest = widths[0]
        self.start = nn.Linear(inputs, 2 * widths[0] * math.prod(self.smallest_sides), bias=norm == "none")
        self.start_norm = norm_layer(norm, 2 * widths[0])
        self.levels = nn.ModuleList()
        self.noise_sides: list[tuple[int, int]] = []
        self.excitations = nn.ModuleDict()
        for level in range(1, halvings + 1):
            twice = level % 2 == 1
            self.levels.append(_Doubling(widths[level - 1], widths[level], config, twice=twice))
            sides = (self.smallest_sides[0] << level, self.smallest_sides[1] << level)
            self.noise_sides += [sides] * (2 if twice else 0)
            if level >= _LEAPS:
                self.excitations[str(level)] = _Excitation(widths[level - _LEAPS], widths[level])
        self.to_image = nn.Conv2d(widths[-1], image_shape[0], kernel_size=3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=1.0 / math.sqrt(layer.weight[0].numel()))
        self.noise_count = sum(map(math.prod, self.noise_sides))
        self.register_buffer("fixed_noise", torch.randn(self.noise_count))

    def start_at(self, image: Tensor) -> None:
        set_bias(self.to_image, image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images of latents, with noise [B, noise_count], or with the fixed noise."""
        noise = self.fixed_noise if noise is None else noise
        sizes = [math.prod(sides) for sides in self.noise_sides]
        noises = [
            one.reshape(-1, 1, *sides) for one, sides in zip(noise.split(sizes, dim=-1), self.noise_sides, strict=True)
        ]
        maps = self.start(latents).unflatten(1, (2 * self.widest, *self.smallest_sides))
        maps = F.glu(self.start_norm(channels_last(maps)), dim=1)
        of_level = [maps]
        for level, doubling in enumerate(self.levels, start=1):
            first = 2 * (level // 2)
            maps = doubling(maps, noises[first : first + 2] if level % 2 else [])
            if level >= _LEAPS:
                maps = maps * self.excitations[str(level)](of_level[level - _LEAPS])
            of_level.append(maps)
        return self.to_image(maps)


class _Doubling(nn.Module):
    """Maps [B, inputs, H, W] -> [B, outputs, 2H, 2W]: pixels are repeated, then one convolution or two with noise."""

    def __init__(self, inputs: int, outputs: int, config: FastganConfig, *, twice: bool) -> None:
        super().__init__()
        norm = config.generator_norm
        widths = [inputs, *[outputs] * (2 if twice else 1)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, 2 * after, kernel_size=3, padding=1, bias=norm == "none")
            for before, after in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(norm_layer(norm, 2 * outputs) for _ in self.convolutions)
        self.noise_strengths = nn.Parameter(torch.zeros(2)) if twice else None

    def forward(self, maps: Tensor, noises: list[Tensor]) -> Tensor:
        maps = maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        for place, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            maps = convolution(maps)
            if self.noise_strengths is not None:
                maps = maps + (noises[place] * self.noise_strengths[place]).to(maps.dtype)
            maps = F.glu(norm(maps), dim=1)
        return maps


class _Excitation(nn.Module):
    """Factors in 0..1 for channels [B, outputs, 1, 1] of a large map, from a small one [B, inputs, h, w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(inputs, outputs, kernel_size=4, bias=False)
        self.channels = nn.Conv2d(outputs, outputs, kernel_size=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.channels(F.silu(self.spatial(_pooled(maps)))).sigmoid()


def _pooled(maps: Tensor) -> Tensor:
    """Means of maps [B, C, h, w] over a grid of 4 x 4 places, by two matrix products."""
    rows, columns = (_means(side, maps) for side in maps.shape[2:])
    return rows @ maps @ columns.T


def _means(side: int, like: Tensor) -> Tensor:
    """Weights [4, side] of the places in each of four means, as those of adaptive average pooling."""
    places = torch.arange(side, device=like.device)
    bounds = [(place * side // 4, -(-(place + 1) * side // 4)) for place in range(4)]
    return torch.stack([((places >= a) & (places < b)).to(like.dtype) / (b - a) for a, b in bounds])
