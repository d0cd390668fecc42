"""Group normalization and SiLU on CPUs, which keeps the maps alone for its gradient.

torch's own two operations keep the normalized maps as well, for the gradient of SiLU. Here they are computed again.
Contiguous maps take ATen's operators, so their results have ATen's bits. For channels_last maps, ATen subtracts squared
means from mean squares, which loses the variance of maps with a large mean, and its gradient is slow.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .latent_layout import memory_format_of

CACHED_ELEMENTS = 2**17
"""Elements of the images that a thread goes through at a time: 512 KiB in float32, so that they stay in its cache."""
SAMPLED = 16
"""One pixel in this many gives the mean around which the others are squared."""


class GroupNormSilu(torch.autograd.Function):
    """`kernels.group_norm_silu` of float32 or float64 maps, without a residual."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        """Outputs, in the layout of the maps."""
        maps = maps.contiguous(memory_format=memory_format_of(maps))
        way = _Contiguous if maps.is_contiguous() else _ChannelsLast
        outputs, mean, reciprocal = way.forward(maps, weight, bias, groups, eps, silu)
        ctx.save_for_backward(maps, weight, bias, mean, reciprocal)
        ctx.way, ctx.groups, ctx.eps, ctx.silu = way, groups, eps, silu
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of maps, weight and bias."""
        saved = ctx.saved_tensors  # read once: a checkpoint computes them again, once
        gradient = gradient.contiguous(memory_format=memory_format_of(saved[0]))
        gradients = ctx.way.backward(gradient, *saved, ctx.groups, ctx.eps, ctx.silu)
        return *gradients, None, None, None


class _Contiguous:
    @staticmethod
    def forward(
        maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, and mean and reciprocal deviation of the groups."""
        outputs, mean, reciprocal = _normalize(maps, weight, bias, groups, eps)
        return F.silu(outputs, inplace=True) if silu else outputs, mean, reciprocal

    @staticmethod
    def backward(
        gradient: Tensor,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        reciprocal: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of maps, weight and bias."""
        if silu:
            normalized = _normalize(maps, weight, bias, groups, eps)[0]
            gradient = torch.ops.aten.silu_backward(gradient, normalized)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
            gradient, maps, mean, reciprocal, weight, *_sizes(maps), groups, [True, True, True]
        )
        return found


def _normalize(maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm(
        maps, weight, bias, *_sizes(maps), groups, eps
    )
    return found


def _sizes(maps: Tensor) -> tuple[int, int, int]:
    """Images, channels and pixels."""
    return maps.shape[0], maps.shape[1], math.prod(maps.shape[2:])


class _ChannelsLast:
    """Passes over a few images at a time, [images, pixels, channels], which stay in the cache from pass to pass."""

    @staticmethod
    def forward(
        maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, and mean and reciprocal deviation of the groups, [images, 1, groups]."""
        outputs = torch.empty_like(maps)
        mean, reciprocal = maps.new_empty((2, maps.shape[0], 1, groups))
        for some in _images_at_once(maps):
            values, target = _pixel_rows(maps[some]), _pixel_rows(outputs[some])
            elements = values.shape[1] * values.shape[2] // groups
            # Distances from about the mean, of one pixel in 16, because squares of the values would lose the variance.
            sample = values[:, ::SAMPLED]
            centre = _sum_groups(sample, groups) / (sample.shape[1] * sample.shape[2] // groups)
            torch.sub(values, _to_channels(centre, maps), out=target)
            remainder = _sum_groups(target, groups) / elements
            variance = _sum_groups(target * target, groups) / elements - remainder * remainder
            scale = torch.rsqrt(variance + eps)
            mean[some], reciprocal[some] = centre + remainder, scale
            slope = _to_channels(scale, maps) * weight
            torch.addcmul(bias - _to_channels(remainder, maps) * slope, target, slope, out=target)
            if silu:
                F.silu(target, inplace=True)
        return outputs, mean, reciprocal

    @staticmethod
    def backward(
        gradient: Tensor,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        reciprocal: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of maps, weight and bias."""
        maps_gradient = torch.empty_like(maps)
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        for some in _images_at_once(maps):
            incoming, target = _pixel_rows(gradient[some]), _pixel_rows(maps_gradient[some])
            centre, scale = _to_channels(mean[some], maps), _to_channels(reciprocal[some], maps)
            normal = (_pixel_rows(maps[some]) - centre).mul_(scale)
            if silu:
                incoming = torch.ops.aten.silu_backward(incoming, torch.addcmul(bias, normal, weight))
            of_bias = incoming.sum(1, keepdim=True)
            of_weight = torch.mul(incoming, normal, out=target).sum(1, keepdim=True)
            bias_gradient += of_bias.sum((0, 1))
            weight_gradient += of_weight.sum((0, 1))
            elements = incoming.shape[1] * incoming.shape[2] // groups
            level = _to_channels(_sum_groups(of_bias * weight, groups), maps) * scale / -elements
            tilt = _to_channels(_sum_groups(of_weight * weight, groups), maps) * scale / -elements
            torch.addcmul(level, normal, tilt, out=target)
            target.addcmul_(incoming, scale * weight)
        return maps_gradient, weight_gradient, bias_gradient


def _images_at_once(maps: Tensor) -> Iterator[slice]:
    images = max(1, CACHED_ELEMENTS * torch.get_num_threads() // max(1, maps[:1].numel()))
    for first in range(0, maps.shape[0], images):
        yield slice(first, first + images)


def _pixel_rows(maps: Tensor) -> Tensor:
    """View channels_last maps as [images, pixels, channels]."""
    return maps.movedim(1, -1).flatten(1, -2)


def _sum_groups(values: Tensor, groups: int) -> Tensor:
    """Sum [images, pixels, channels] over pixels and the channels of each group, [images, 1, groups]."""
    return values.sum(1, keepdim=True).unflatten(2, (groups, -1)).sum(3)


def _to_channels(values: Tensor, maps: Tensor) -> Tensor:
    """Repeat values of groups [images, 1, groups] for their channels, [images, 1, channels]."""
    return values.repeat_interleave(maps.shape[1] // values.shape[2], dim=2)
