"""Pixels at places, and its adjoint, which adds values at places: in one order on any device, so bits do not change.

torch's own gradient of `gather` adds by atomics on GPUs, and a compiler makes atomics of any sum over places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .twice_differentiable import define_operator


def pixels_at(maps: Tensor, places: Tensor) -> Tensor:
    """Pixels of maps at places of each image: [B, C, P] from maps [B, C, N].

    Gradients have gradients, under torch.func too.

    Args:
        maps: floating-point [B, C, N].
        places: int64 [B, P] in 0..N - 1.
    """
    found: Tensor = _pixels_at_operator(maps, places)
    return found


def _pixels_at(maps: Tensor, places: Tensor) -> Tensor:
    return maps.gather(2, places[:, None].expand(-1, maps.shape[1], -1))


def _pixels_at_fake(maps: Tensor, places: Tensor) -> Tensor:
    return maps.new_empty((*maps.shape[:2], places.shape[1]))


def _keep_places(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.count = inputs[0].shape[2]


def _gradient_of_maps(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (places,) = ctx.saved_tensors
    return _sum_at_operator(gradient, places, ctx.count), None


def _sum_at(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Sums [B, C, count] of values [B, C, P] at places [B, P]."""
    if values.device.type != "cpu":
        return _sum_by_index(values, places, count)
    sums = values.new_zeros((*values.shape[:2], count))  # one thread adds a whole row
    return sums.scatter_add_(2, places[:, None].expand(-1, values.shape[1], -1), values)


def _sum_by_index(values: Tensor, places: Tensor, count: int) -> Tensor:
    """The same by one index of all sums, by which a GPU sorts the values."""
    batch, channels, _ = values.shape
    sums = values.new_zeros((batch, channels, count))
    rows = torch.arange(batch * channels, device=values.device).view(batch, channels, 1)
    indices = (rows * count + places[:, None]).flatten()
    # `unsafe` leaves out the check of their range, for which the host would wait.
    return torch._index_put_impl_(sums.view(-1), [indices], values.flatten(), True, True).view_as(sums)


def _sum_at_fake(values: Tensor, places: Tensor, count: int) -> Tensor:
    return values.new_empty((*values.shape[:2], count))


def _keep_summed_places(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient_of_values(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (places,) = ctx.saved_tensors
    return _pixels_at_operator(gradient, places), None, None


_pixels_at_operator = define_operator("pixels_at", _pixels_at, _pixels_at_fake, _keep_places, _gradient_of_maps)
_sum_at_operator = define_operator("sum_at", _sum_at, _sum_at_fake, _keep_summed_places, _gradient_of_values)
