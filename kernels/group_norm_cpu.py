"""Group normalization and SiLU on CPUs, which keeps the maps alone for its gradient.

torch's own two operations keep the normalized maps as well, for the gradient of SiLU. Here they are computed again, and
within `computed_again` so are the outputs, which the next operation would keep.
Contiguous maps take ATen's operators, so their results have ATen's bits. For channels_last maps, ATen subtracts squared
means from mean squares, which loses the variance of maps with a large mean, and its gradient is slow.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .latent_layout import memory_format_of

CACHED_ELEMENTS = 2**17
"""Elements of the images that a thread goes through at a time: 512 KiB in float32, so that they stay in its caches."""
SAMPLED = 16
"""One pixel in this many gives the mean around which the others are squared."""


class GroupNormSilu(torch.autograd.Function):
    """`kernels.group_norm_silu` of float32 or float64 maps, without a residual."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        """Outputs, in the layout of the maps."""
        maps = maps.contiguous(memory_format=memory_format_of(maps))
        way = _Contiguous if maps.is_contiguous() else _ChannelsLast
        outputs, *statistics = way.forward(maps, weight, bias, groups, eps, silu)
        ctx.save_for_backward(maps, weight, bias, *statistics)
        ctx.way, ctx.groups, ctx.eps, ctx.silu = way, groups, eps, silu
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of maps, weight and bias."""
        maps, *rest = ctx.saved_tensors  # read once: a checkpoint unpacks them once
        gradient = gradient.contiguous(memory_format=memory_format_of(maps))
        gradients = ctx.way.backward(gradient, maps, *rest, ctx.groups, ctx.eps, ctx.silu)
        return *gradients, None, None, None


@contextlib.contextmanager
def computed_again(outputs: Tensor) -> Iterator[None]:
    """Context in which operations on outputs of `GroupNormSilu` do not keep them for their gradients.

    Backward computes them from the maps again, with equal bits. Other tensors, and outputs of anything else, are kept
    as usual. It does not nest in a checkpoint, which would then keep what the context lets through.
    """
    node = outputs.grad_fn
    if type(node) is not GroupNormSilu._backward_cls:
        yield
        return
    address, shape = outputs.data_ptr(), outputs.shape  # the hooks outlive the context and must not hold the outputs

    def pack(tensor: Tensor) -> Any:
        return node if tensor.data_ptr() == address and tensor.shape == shape else tensor

    def unpack(kept: Any) -> Tensor:
        return _outputs_of(kept) if kept is node else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _outputs_of(node: Any) -> Tensor:
    """Outputs of a `GroupNormSilu` from what it keeps."""
    maps, weight, bias, *statistics = node.saved_tensors
    with torch.no_grad():
        found: Tensor = node.way.again(maps, weight, bias, *statistics, node.groups, node.eps, node.silu)
    return found


class _Contiguous:
    @staticmethod
    def forward(
        maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, and mean and reciprocal deviation of the groups."""
        outputs, mean, reciprocal = _normalize(maps, weight, bias, groups, eps)
        return F.silu(outputs, inplace=True) if silu else outputs, mean, reciprocal

    @staticmethod
    def again(
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        reciprocal: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        """Outputs."""
        return _Contiguous.forward(maps, weight, bias, groups, eps, silu)[0]

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
            gradient = _silu_backward(gradient, normalized)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
            gradient, maps, mean, reciprocal, weight, *_sizes(maps), groups, [True, True, True]
        )
        return found


def _normalize(maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm(
        maps, weight, bias, *_sizes(maps), groups, eps
    )
    return found


def _silu_backward(gradient: Tensor, normalized: Tensor) -> Tensor:
    """Gradient of what SiLU is taken of, in its memory: a new tensor of maps costs more than the arithmetic."""
    found: Tensor = torch.ops.aten.silu_backward.grad_input(gradient, normalized, grad_input=normalized)
    return found


def _sizes(maps: Tensor) -> tuple[int, int, int]:
    """Images, channels and pixels."""
    return maps.shape[0], maps.shape[1], math.prod(maps.shape[2:])


class _ChannelsLast:
    """Passes over a few images at a time, [images, pixels, channels], which stay in the cache from pass to pass."""

    @staticmethod
    def forward(
        maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs; and the mean in two parts and the reciprocal deviation of the groups, [images, 1, groups, 1]."""
        values = _pixel_rows(maps)
        outputs = torch.empty_like(values)
        sample = _sum_groups(values[:, ::SAMPLED].sum(1, keepdim=True), groups)
        # Distances from about the mean, of one pixel in 16, because squares of the values would lose the variance.
        centre = sample / (-(-values.shape[1] // SAMPLED) * values.shape[2] // groups)
        shift = _to_channels(centre, values)
        sums, squares = values.new_empty((2, values.shape[0], 1, values.shape[2]))
        for some, (square,) in _images_at_once(values, 1):
            target = torch.sub(values[some], shift[some], out=outputs[some])
            torch.sum(target, 1, keepdim=True, out=sums[some])
            torch.sum(torch.mul(target, target, out=square), 1, keepdim=True, out=squares[some])
        elements = values.shape[1] * values.shape[2] // groups
        remainder = _sum_groups(sums, groups) / elements
        reciprocal = torch.rsqrt(_sum_groups(squares, groups) / elements - remainder * remainder + eps)
        slope, start = _ChannelsLast._line(values, weight, bias, remainder, reciprocal)
        for some, _ in _images_at_once(values, 0):
            target = torch.addcmul(start[some], outputs[some], slope[some], out=outputs[some])
            if silu:
                F.silu(target, inplace=True)
        return _as_maps(outputs, maps), centre, remainder, reciprocal

    @staticmethod
    def _line(
        values: Tensor, weight: Tensor, bias: Tensor, remainder: Tensor, reciprocal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Slope and start, [images, 1, channels], of the normalized maps as a function of distances from the centre."""
        slope = _to_channels(reciprocal, values) * weight
        return slope, bias - _to_channels(remainder, values) * slope

    @staticmethod
    def again(
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        centre: Tensor,
        remainder: Tensor,
        reciprocal: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        """Outputs, by the operations of `forward`."""
        values = _pixel_rows(maps)
        outputs, shift = torch.empty_like(values), _to_channels(centre, values)
        slope, start = _ChannelsLast._line(values, weight, bias, remainder, reciprocal)
        for some, _ in _images_at_once(values, 0):
            target = torch.sub(values[some], shift[some], out=outputs[some])
            torch.addcmul(start[some], target, slope[some], out=target)
            if silu:
                F.silu(target, inplace=True)
        return _as_maps(outputs, maps)

    @staticmethod
    def backward(
        gradient: Tensor,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        centre: Tensor,
        remainder: Tensor,
        reciprocal: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of maps, weight and bias."""
        values, incoming = _pixel_rows(maps), _pixel_rows(gradient)
        found = torch.empty_like(values)
        mean, scale = _to_channels(centre + remainder, values), _to_channels(reciprocal, values)
        slope = scale * weight
        share = scale / -(values.shape[1] * values.shape[2] // groups)
        sums = values.new_empty((2, values.shape[0], 1, values.shape[2]))  # gradients of bias and weight of each image
        for some, (distances, normalized) in _images_at_once(values, 2):
            target, part = found[some], incoming[some]
            torch.sub(values[some], mean[some], out=distances)
            if silu:
                part = _silu_backward(part, torch.addcmul(bias, distances, slope[some], out=normalized))
            torch.sum(part, 1, keepdim=True, out=sums[0, some])
            torch.sum(torch.mul(part, distances, out=target), 1, keepdim=True, out=sums[1, some]).mul_(scale[some])
            level, tilt = _to_channels(_sum_groups(sums[:, some] * weight, groups), values) * share[some]
            torch.addcmul(level, distances, tilt.mul_(scale[some]), out=target)
            target.addcmul_(part, slope[some])
        bias_gradient, weight_gradient = sums.sum((1, 2))
        return _as_maps(found, maps), weight_gradient, bias_gradient


def _images_at_once(values: Tensor, scratches: int) -> Iterator[tuple[slice, Tensor]]:
    """Images of each turn, and as many scratch tensors [scratches, images, pixels, channels], the same ones each turn.

    The first write to new memory costs more than the arithmetic.
    """
    images = max(1, CACHED_ELEMENTS * torch.get_num_threads() // max(1, values[:1].numel()))
    scratch = values.new_empty((scratches, min(images, values.shape[0]), *values.shape[1:]))
    for first in range(0, values.shape[0], images):
        yield slice(first, first + images), scratch[:, : values.shape[0] - first]


def _pixel_rows(maps: Tensor) -> Tensor:
    """View channels_last maps as [images, pixels, channels]."""
    return maps.movedim(1, -1).flatten(1, -2)


def _as_maps(rows: Tensor, maps: Tensor) -> Tensor:
    """View [images, pixels, channels] as channels_last maps."""
    return rows.unflatten(1, maps.shape[2:]).movedim(-1, 1)


def _sum_groups(sums: Tensor, groups: int) -> Tensor:
    """Sum [..., channels] over the channels of each group, [..., groups, 1]."""
    return sums.unflatten(-1, (groups, -1)).sum(-1, keepdim=True)


def _to_channels(values: Tensor, rows: Tensor) -> Tensor:
    """Repeat values of groups [..., groups, 1] for their channels, [..., channels] as in rows."""
    return values.expand(*values.shape[:-1], rows.shape[-1] // values.shape[-2]).flatten(-2)
