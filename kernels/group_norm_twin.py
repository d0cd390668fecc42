"""Group normalization with SiLU in torch operations: the kernels' twin, and the gradients of gradients."""

import math

import torch
from torch import Tensor

from .latent_layout import arithmetic_dtype


def twin_forward(
    maps: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Forward pass of the kernels in torch operations, on any device.

    Args:
        maps: [B, C, ...], dense; computed in `arithmetic_dtype`.
        residual: as `maps`; None adds nothing.
        weight: [C].
        bias: [C].
        groups: number of groups.
        eps: number added to the variance.
        silu: apply SiLU.

    Returns:
        outputs, as `maps`; maps + residual, as `maps`, or None; and statistics [B, groups, 3] in `arithmetic_dtype`:
        the mean as it is rounded, the mean of the distances from it, and 1 / sqrt(variance + eps).
    """
    dtype = arithmetic_dtype(maps)
    sums = None if residual is None else (maps.to(dtype) + residual.to(dtype)).to(maps.dtype)
    values = _by_group(maps if sums is None else sums, groups).to(dtype)
    mean = values.mean(2)
    distance = values - mean[:, :, None]
    remainder = distance.mean(2)
    distance = distance - remainder[:, :, None]
    reciprocal = torch.rsqrt(distance.square().mean(2) + eps)
    normal = (distance * reciprocal[:, :, None]).view(maps.shape)
    outputs = normal * _to_maps(weight, maps) + _to_maps(bias, maps)
    outputs = outputs * torch.sigmoid(outputs) if silu else outputs
    return torch.empty_like(maps).copy_(outputs), sums, torch.stack([mean, remainder, reciprocal], dim=2)


def twin_backward(
    outputs_gradient: Tensor,
    sums_gradient: Tensor | None,
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of the kernels in torch operations, with the kernels' formulas.

    Args:
        outputs_gradient: [B, C, ...], dense as `maps`.
        sums_gradient: as `outputs_gradient`, or None if there was no residual or its sums are not used otherwise.
        maps: [B, C, ...], dense; with a residual, the sums.
        weight: [C].
        bias: [C].
        statistics: [B, groups, 3], of `twin_forward`.
        groups: number of groups.
        silu: SiLU was applied.

    Returns:
        Gradients of maps, weight and bias, each of the shape, dtype and layout of its tensor.
    """
    dtype = arithmetic_dtype(maps)
    mean, remainder, reciprocal = (each[:, :, None] for each in statistics.to(dtype).unbind(2))
    normal = (((_by_group(maps.to(dtype), groups) - mean) - remainder) * reciprocal).view(maps.shape)
    gradient = outputs_gradient.to(dtype)
    if silu:
        outputs = normal * _to_maps(weight, maps) + _to_maps(bias, maps)
        share = torch.sigmoid(outputs)
        gradient = gradient * (share + outputs * share * (1.0 - share))
    over = [0, *range(2, maps.ndim)]
    weight_gradient, bias_gradient = (gradient * normal).sum(over), gradient.sum(over)
    gradient, normal = _by_group(gradient * _to_maps(weight, maps), groups), _by_group(normal, groups)
    tilt = (gradient * normal).mean(2, keepdim=True)
    gradient = ((gradient - gradient.mean(2, keepdim=True) - normal * tilt) * reciprocal).view(maps.shape)
    if sums_gradient is not None:
        gradient = gradient + sums_gradient
    return torch.empty_like(maps).copy_(gradient), weight_gradient.to(weight.dtype), bias_gradient.to(bias.dtype)


def double_backward(
    maps_cotangent: Tensor | None,
    weight_cotangent: Tensor | None,
    bias_cotangent: Tensor | None,
    outputs_gradient: Tensor,
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what `twin_backward` computes: those of sums over its results times their cotangents.

    The equations are in README.md, under "Gradients of gradients". Statistics are functions of the maps, and part of
    the maps' gradient.

    Args:
        maps_cotangent: as `maps`, or None for zeros; also the gradient of `sums_gradient`.
        weight_cotangent: [C], or None for zeros.
        bias_cotangent: [C], or None for zeros.
        outputs_gradient: as in `twin_backward`, like all that follow.
        maps: [B, C, ...], dense.
        weight: [C].
        bias: [C].
        statistics: [B, groups, 3].
        groups: number of groups.
        silu: SiLU was applied.

    Returns:
        Gradients of outputs_gradient, maps, weight and bias, each of the shape, dtype and layout of its tensor.
    """
    dtype = arithmetic_dtype(maps)
    wide_weight = _to_maps(weight, maps)
    normal, reciprocal = _normalized(maps, statistics, groups)
    incoming = outputs_gradient.to(dtype)
    slope, curvature = _activation_derivatives(normal * wide_weight + _to_maps(bias, maps), silu)
    gradient = incoming * slope

    def mean(values: Tensor) -> Tensor:
        """Mean over each group, for every element of it."""
        return _by_group(values, groups).mean(2).repeat_interleave(maps.shape[1] // groups, 1).view(reciprocal.shape)

    weighted = gradient * wide_weight
    tilt = mean(weighted * normal)
    cotangent = torch.zeros_like(normal) if maps_cotangent is None else maps_cotangent.to(dtype)
    cotangent_tilt = mean(cotangent * normal)
    projected = (cotangent - mean(cotangent) - normal * cotangent_tilt) * reciprocal
    of_gradient = projected * wide_weight
    of_normal = -reciprocal * (weighted * cotangent_tilt + cotangent * tilt)
    if weight_cotangent is not None:
        of_gradient = of_gradient + _to_maps(weight_cotangent, maps) * normal
        of_normal = of_normal + _to_maps(weight_cotangent, maps) * gradient
    if bias_cotangent is not None:
        of_gradient = of_gradient + _to_maps(bias_cotangent, maps)
    of_values = incoming * curvature * of_gradient
    of_normal = of_normal + of_values * wide_weight
    of_maps = of_normal - mean(of_normal) - normal * (mean(of_normal * normal) + mean(weighted * projected))
    over = [0, *range(2, maps.ndim)]
    of_weight, of_bias = (gradient * projected + of_values * normal).sum(over), of_values.sum(over)
    return (
        torch.empty_like(maps).copy_(of_gradient * slope),
        torch.empty_like(maps).copy_(of_maps * reciprocal),
        of_weight.to(weight.dtype),
        of_bias.to(bias.dtype),
    )


def _normalized(maps: Tensor, statistics: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Normalized maps, and the reciprocal deviation of each element's group, [B, C, 1, ...]."""
    dtype = arithmetic_dtype(maps)
    channels = statistics.to(dtype).repeat_interleave(maps.shape[1] // groups, 1)
    mean, remainder, reciprocal = channels.view(*channels.shape, *[1] * (maps.ndim - 2)).unbind(2)
    return ((maps.to(dtype) - mean) - remainder) * reciprocal, reciprocal


def _activation_derivatives(values: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """First and second derivative of the activation."""
    if not silu:
        return values.new_ones(()), values.new_zeros(())
    share = torch.sigmoid(values)
    spread = share * (1.0 - share)
    return share + values * spread, spread * (2.0 + values * (1.0 - 2.0 * share))


def _by_group(maps: Tensor, groups: int) -> Tensor:
    """[B, groups, elements of a group]; a copy, if maps are channels_last."""
    return maps.reshape(maps.shape[0], groups, math.prod(maps.shape[1:]) // groups)


def _to_maps(parameter: Tensor, maps: Tensor) -> Tensor:
    """Weight or bias [C] against maps [B, C, ...], in their arithmetic."""
    return parameter.to(arithmetic_dtype(maps)).view(-1, *[1] * (maps.ndim - 2))
