"""Finite scalar quantization: each channel is rounded to a few levels (Mentzer et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gen_dist.config import LatentAutoencoderConfig
from gen_dist.errors import ConfigError
from gen_dist.kernels import Key
from gen_dist.objectives.bottlenecks.base import Bottleneck, Coded, StraightThrough

_SHRINK = 1e-3
"""Part of the range left out, so that the outermost values do not round to a level more."""


class FiniteScalarQuantizer(Bottleneck):
    """Latents -1..1 on a grid; there is no codebook to learn or to collapse, and no penalty.

    A channel z of L levels becomes round(tanh(z + shift) h - offset), with h about (L - 1) / 2, divided by L // 2. For
    even L the offset is a half, and the shift lets 0 stay 0.
    """

    reach: Tensor
    offset: Tensor
    shift: Tensor
    divisor: Tensor
    basis: Tensor

    def __init__(self, config: LatentAutoencoderConfig, latent_shape: tuple[int, ...]) -> None:
        super().__init__(config, latent_shape)
        levels = config.fsq_levels
        if len(levels) != latent_shape[0]:
            raise ConfigError(
                f"fsq_levels names {len(levels)} channels, and latents have {latent_shape[0]}; use --latent-dim "
                f"{len(levels)}, or name as many levels as channels"
            )
        self.codebook_size = math.prod(levels)
        count = torch.tensor(levels, dtype=torch.float64)
        half = (count - 1.0) * (1.0 - _SHRINK) / 2.0
        offset = torch.where(count % 2 == 1, 0.0, 0.5)
        numbers = {"reach": half, "offset": offset, "shift": torch.atanh(offset / half), "divisor": count // 2}
        shape = (-1, *[1] * len(self.places))
        for name, values in numbers.items():
            self.register_buffer(name, values.float().view(shape), persistent=False)
        basis = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis).view(shape), persistent=False)

    def forward(self, encoded: Tensor, key: Key, deterministic: bool = False) -> Coded:
        bounded = self._bounded(encoded)
        latents = StraightThrough.apply(bounded, bounded.round()) / self.divisor
        return Coded(latents, encoded.new_zeros(len(encoded)).float(), {})

    def decodable(self, latents: Tensor) -> Tensor:
        return self._bounded(latents).round() / self.divisor

    def codes(self, latents: Tensor) -> Tensor:
        return ((self._bounded(latents).round() + self.divisor).long() * self.basis).sum(1)

    def latents_of(self, codes: Tensor) -> Tensor:
        levels = torch.tensor(self.config.fsq_levels, device=codes.device).view(self.basis.shape)
        return (codes.unsqueeze(1) // self.basis % levels).float() / self.divisor - 1.0

    def _bounded(self, latents: Tensor) -> Tensor:
        """Values that round to the levels, float32."""
        return torch.tanh(latents.float() + self.shift) * self.reach - self.offset
