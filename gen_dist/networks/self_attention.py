"""Self-attention of feature maps in GANs (Zhang et al. 2019, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gen_dist.networks.base import channels_last

_FEWER = 8
"""Channels of maps for one of a query, a key or a value, as in the paper."""


class SelfAttention(nn.Module):
    """Feature maps [B, C, H, W] -> the same shape: each place gets a weighted mean of all places, times a learned
    factor that starts at 0, added (eq. 1 to 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // _FEWER)
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, kernel_size=1, bias=False) for _ in range(3))
        self.output = nn.Conv2d(inner, channels, kernel_size=1, bias=False)
        for convolution in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(convolution.weight)
        self.factor = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        query, key, value = (each(maps).flatten(2) for each in (self.query, self.key, self.value))
        # Row j of the weights is of place j in the result: they sum to 1 over the places i that it looks at.
        weights = (query.transpose(1, 2) @ key).softmax(dim=2)
        mean = (value @ weights.transpose(1, 2)).unflatten(2, maps.shape[2:])
        return maps + self.factor * self.output(channels_last(mean))
