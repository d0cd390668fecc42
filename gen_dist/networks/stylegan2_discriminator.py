"""Residual discriminator of StyleGAN2 (Karras et al. 2020, section 4.1 and appendix B; configuration F)."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import Stylegan2Config
from gen_dist.networks.base import Encoder, channels_last
from gen_dist.networks.halving import Binomial, halved_to_few_pixels
from gen_dist.networks.stylegan2 import EqualizedLinear, scaled_leaky_relu


class Stylegan2Encoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs].

    Only a single output, the score of a discriminator, depends on other images of the batch: latents of an encoder are
    those of one image.
    """

    def __init__(self, config: Stylegan2Config, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        halvings, sides = halved_to_few_pixels("stylegan2", image_shape)
        channels = [config.channels(min(sides) << level) for level in range(halvings, -1, -1)]
        last = channels[-1]
        self.feature_count = last
        self.from_image = _Convolution(image_shape[0], channels[0], kernel=1)
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in itertools.pairwise(channels)))
        scores = outputs == 1 and config.minibatch_group > 1
        self.deviation = MinibatchDeviation(config.minibatch_group) if scores else None
        self.convolution = _Convolution(last + (self.deviation is not None), last, kernel=3)
        self.dense = EqualizedLinear(last * math.prod(sides), last)
        self.head = EqualizedLinear(last, outputs)

    def features(self, images: Tensor) -> Tensor:
        maps = self.blocks(scaled_leaky_relu(self.from_image(channels_last(images))))
        if self.deviation is not None:
            maps = self.deviation(maps)
        maps = scaled_leaky_relu(self.convolution(maps))
        return scaled_leaky_relu(self.dense(maps.flatten(1)))


class MinibatchDeviation(nn.Module):
    """Feature maps [B, C, H, W] -> [B, C + 1, H, W]: one more map, the standard deviation within a group of images
    (Karras et al. 2018, section 3).

    A group is `rows_together` images in a row of the global batch, so any split of the batch between groups gives the
    same result; `gen_dist.training.rows` refuses others. In evaluation every image is a group by itself, as it is in a
    batch that groups do not divide.
    """

    def __init__(self, rows_together: int) -> None:
        super().__init__()
        self.rows_together = rows_together

    def forward(self, maps: Tensor) -> Tensor:
        rows, _, height, width = maps.shape
        together = self.rows_together if self.training and rows % self.rows_together == 0 else 1
        groups = maps.float().unflatten(0, (-1, together))
        squares = (groups - groups.mean(dim=1, keepdim=True)).square().mean(dim=1)
        deviation = (squares + 1e-8).sqrt().mean(dim=(1, 2, 3))
        one_map = deviation[:, None].expand(-1, together).reshape(-1, 1, 1, 1).expand(-1, -1, height, width)
        return torch.cat([maps, one_map.to(maps.dtype)], dim=1)


class _Convolution(nn.Module):
    """Convolution with weights of unit variance, scaled at each use; with `halves`, the binomial filter comes first."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, halves: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain = 1.0 / math.sqrt(inputs * kernel**2)
        self.stride = 2 if halves else 1
        # The filter adds the pixels that the convolution takes off.
        self.smooth = Binomial("none", padding=1 + kernel // 2) if halves else None
        self.padding = 0 if halves else kernel // 2

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] -> [B, outputs, H, W], or half the sides."""
        if self.smooth is not None:
            maps = self.smooth(maps)
        return F.conv2d(maps, self.weight * self.gain, self.bias, stride=self.stride, padding=self.padding)


class _Block(nn.Module):
    """Feature maps [B, inputs, H, W] -> [B, outputs, H / 2, W / 2]: two 3 x 3 convolutions plus a 1 x 1 shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _Convolution(inputs, inputs, kernel=3)
        self.second = _Convolution(inputs, outputs, kernel=3, halves=True)
        self.shortcut = _Convolution(inputs, outputs, kernel=1, bias=False, halves=True)

    def forward(self, maps: Tensor) -> Tensor:
        residual = scaled_leaky_relu(self.second(scaled_leaky_relu(self.first(maps))))
        return (self.shortcut(maps) + residual) * math.sqrt(0.5)
