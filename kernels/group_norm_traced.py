"""Group normalization and SiLU of float32 and float64 maps on CPUs in compiled code: torch operations to be fused.

torch's own two operations would be compiled too, but where a group has several channels, the loops over maps would read
its statistics at a divided index, which is slow. Here statistics are in memory for each channel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .group_norm_cpu import SAMPLED


def traced_group_norm_silu(maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Compute `kernels.group_norm_silu` without a residual, in operations whose gradients have gradients.

    Statistics are [B, C], equal in all channels of a group.
    """
    pixels = tuple(range(2, maps.ndim))
    elements = math.prod(maps.shape[1:]) // groups
    # Distances from about the mean, of one pixel in 16, because squares of the values would lose the variance. Outputs
    # do not depend on it, so neither do gradients.
    sample = maps.detach().flatten(2)[:, :, ::SAMPLED] if pixels else maps.detach()[:, :, None]
    centre = _totals(sample.sum(2), groups) / (sample.shape[1] * sample.shape[2] // groups)
    distances = maps - _of_pixels(centre, maps)
    sums, squares = (part.sum(pixels) if pixels else part for part in (distances, distances * distances))
    remainder, square = _totals(torch.stack([sums, squares]), groups) / elements
    slope = torch.rsqrt(square - remainder * remainder + eps) * weight
    start = bias - remainder * slope
    outputs = distances * _of_pixels(slope, maps) + _of_pixels(start, maps)
    return F.silu(outputs) if silu else outputs


def _of_pixels(values: Tensor, maps: Tensor) -> Tensor:
    """View [B, C] as [B, C, 1, ...], with as many dimensions as maps."""
    return values.view(*values.shape, *(1 for _ in maps.shape[2:]))


def _totals(values: Tensor, groups: int) -> Tensor:
    """Sum [..., C] over the channels of each group, and give each channel the sum of its group: [..., C]."""
    totals = _in_memory(values).unflatten(-1, (groups, -1)).sum(-1, keepdim=True)
    return _in_memory(totals.expand(*totals.shape[:-1], values.shape[-1] // groups).flatten(-2))


def _in_memory(values: Tensor) -> Tensor:
    """Values, and in backward their gradient, that compiled code writes to memory before others read them."""
    values = values.contiguous()
    return values.as_strided(values.shape, values.stride())
