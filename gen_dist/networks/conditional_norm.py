"""Batch normalization with scale and shift by class (Dumoulin et al. 2017; Miyato & Koyama 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConditionalBatchNorm(nn.Module):
    """Feature maps [B, C, H, W] and label vectors [B, labels] -> [B, C, H, W].

    Scale and shift are linear in the vectors: of a one-hot class, a row of a table. Scales start at 1, shifts at 0.
    """

    def __init__(self, channels: int, labels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Parameter(torch.ones(labels, channels))
        self.shift = nn.Parameter(torch.zeros(labels, channels))

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        scale, shift = ((labels @ table)[:, :, None, None] for table in (self.scale, self.shift))
        return self.norm(maps) * scale + shift
