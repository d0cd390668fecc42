"""Gradients of group normalization with SiLU, and of the sum before it, in Triton.

Groups that fit on the chip are read once, larger ones twice, as in the forward pass. The gradients of weight and bias
are sums of each image, or of spans of its pixels, which the second launch adds up in a fixed order, without atomics.
Its other programs merge sums of groups alone, because each of them reads those of all spans.
"""

# Device code is typed by Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_group_norm_tiles import (
    activation_slope,
    launch_of,
    load_statistics,
    normalize,
    shape_and_tiling,
    sum_groups,
    tile_channels,
    tile_offsets,
    to_channels,
)
from .triton_noise import Launch, warp_size_of

PARAMETER_CHANNELS, PARAMETER_ROWS, PARAMETER_WARPS = 8, 128, 4
"""Tile in which `sum_parameters` adds up the gradients of weight and bias: a sector of float32 channels by rows."""


@triton.jit
def backward_kernel(
    outputs_gradient_ptr,
    sums_gradient_ptr,
    maps_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    maps_gradient_ptr,
    parts_ptr,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Gradient of the maps of whole groups; parts float32 [images, 2, C], the gradients of bias and weight by image.

    maps are the sums if there was a residual, whose gradient is that of the maps. sums_gradient_ptr is None without a
    residual, and if its sums are not used otherwise.
    """
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    channel, real = tile_channels(block, GROUPS, GROUP_CHANNELS, TILE_GROUPS, TILE_CHANNELS)
    pixel = tl.arange(0, TILE_PIXELS)
    inside = real[:, None] & (pixel < PIXELS)[None, :]
    offsets = image * (GROUPS * GROUP_CHANNELS * PIXELS)
    offsets += tile_offsets(channel, pixel, GROUPS * GROUP_CHANNELS, PIXELS, CHANNELS_LAST)
    maps = tl.load(maps_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(outputs_gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)

    group = block * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    mean, remainder, reciprocal = load_statistics(
        statistics_ptr, image * GROUPS, group, group < GROUPS, TILE_GROUPS, TILE_CHANNELS
    )
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    normal = normalize(maps, mean, remainder, reciprocal)
    gradient *= activation_slope(normal * weight[:, None] + bias[:, None], SILU)
    bias_gradient = tl.sum(gradient, axis=1)
    weight_gradient = tl.sum(gradient * normal, axis=1)
    place = parts_ptr + image * (2 * GROUPS * GROUP_CHANNELS) + channel
    tl.store(place, bias_gradient, mask=real)
    tl.store(place + GROUPS * GROUP_CHANNELS, weight_gradient, mask=real)

    share: tl.constexpr = 1.0 / (GROUP_CHANNELS * PIXELS)
    level = sum_groups(bias_gradient * weight, TILE_GROUPS, TILE_CHANNELS) * share
    tilt = sum_groups(weight_gradient * weight, TILE_GROUPS, TILE_CHANNELS) * share
    gradient = gradient * weight[:, None] - to_channels(level, TILE_GROUPS, TILE_CHANNELS)
    gradient = (gradient - normal * to_channels(tilt, TILE_GROUPS, TILE_CHANNELS)) * reciprocal
    if sums_gradient_ptr is not None:
        gradient += tl.load(sums_gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(maps_gradient_ptr + offsets, gradient.to(maps_gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    outputs_gradient_ptr,
    maps_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    parts_ptr,
    group_parts_ptr,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Parts float32 [images, spans, 2, C]: gradients of bias and weight, of each span of pixels.

    Group parts float32 [images * groups, 2, spans]: their sums over the channels of a group, times the weight.
    """
    image = (tl.program_id(0) // (BLOCKS * SPANS)).to(tl.int64)
    span = tl.program_id(0) // BLOCKS % SPANS
    block = tl.program_id(0) % BLOCKS
    channel, real = tile_channels(block, GROUPS, GROUP_CHANNELS, TILE_GROUPS, TILE_CHANNELS)
    group = block * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    mean, remainder, reciprocal = load_statistics(
        statistics_ptr, image * GROUPS, group, group < GROUPS, TILE_GROUPS, TILE_CHANNELS
    )
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]

    bias_gradient = tl.zeros((TILE_GROUPS * TILE_CHANNELS, TILE_PIXELS), tl.float32)
    weight_gradient = tl.zeros((TILE_GROUPS * TILE_CHANNELS, TILE_PIXELS), tl.float32)
    pixel = span * (STEPS * TILE_PIXELS) + tl.arange(0, TILE_PIXELS)
    first = image * (GROUPS * GROUP_CHANNELS * PIXELS)
    for _ in range(STEPS):
        inside = real[:, None] & (pixel < PIXELS)[None, :]
        offsets = first + tile_offsets(channel, pixel, GROUPS * GROUP_CHANNELS, PIXELS, CHANNELS_LAST)
        maps = tl.load(maps_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(outputs_gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        normal = normalize(maps, mean, remainder, reciprocal)
        gradient *= activation_slope(normal * weight + bias, SILU)
        bias_gradient += gradient
        weight_gradient += gradient * normal
        pixel += TILE_PIXELS
    place = parts_ptr + (image * SPANS + span) * (2 * GROUPS * GROUP_CHANNELS) + channel
    level = tl.sum(bias_gradient, axis=1)
    tilt = tl.sum(weight_gradient, axis=1)
    tl.store(place, level, mask=real)
    tl.store(place + GROUPS * GROUP_CHANNELS, tilt, mask=real)
    weight = tl.reshape(weight, (TILE_GROUPS * TILE_CHANNELS,))
    place = group_parts_ptr + (image * GROUPS + group) * (2 * SPANS) + span
    tl.store(place, sum_groups(level * weight, TILE_GROUPS, TILE_CHANNELS), mask=group < GROUPS)
    tl.store(place + SPANS, sum_groups(tilt * weight, TILE_GROUPS, TILE_CHANNELS), mask=group < GROUPS)


@triton.jit
def sum_parameters(
    parts_ptr,
    weight_gradient_ptr,
    bias_gradient_ptr,
    block,
    rows,
    CHANNELS: tl.constexpr,
    PARAMETER_CHANNELS: tl.constexpr,
    PARAMETER_ROWS: tl.constexpr,
):
    """Sum parts float32 [rows, 2, CHANNELS] over the rows, for one block of channels, in a fixed order."""
    channel = block * PARAMETER_CHANNELS + tl.arange(0, PARAMETER_CHANNELS)
    bias_gradient = tl.zeros((PARAMETER_ROWS, PARAMETER_CHANNELS), tl.float32)
    weight_gradient = tl.zeros((PARAMETER_ROWS, PARAMETER_CHANNELS), tl.float32)
    for first in range(0, rows, PARAMETER_ROWS):
        row = first + tl.arange(0, PARAMETER_ROWS)
        inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
        place = parts_ptr + row.to(tl.int64)[:, None] * (2 * CHANNELS) + channel[None, :]
        bias_gradient += tl.load(place, mask=inside, other=0.0)
        weight_gradient += tl.load(place + CHANNELS, mask=inside, other=0.0)
    element = weight_gradient_ptr.dtype.element_ty
    tl.store(bias_gradient_ptr + channel, tl.sum(bias_gradient, axis=0).to(element), mask=channel < CHANNELS)
    tl.store(weight_gradient_ptr + channel, tl.sum(weight_gradient, axis=0).to(element), mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["rows"])
def parameters_kernel(
    parts_ptr,
    weight_gradient_ptr,
    bias_gradient_ptr,
    rows,
    CHANNELS: tl.constexpr,
    PARAMETER_CHANNELS: tl.constexpr,
    PARAMETER_ROWS: tl.constexpr,
):
    """Gradients of weight and bias from the parts of `backward_kernel`."""
    sum_parameters(
        parts_ptr,
        weight_gradient_ptr,
        bias_gradient_ptr,
        tl.program_id(0),
        rows,
        CHANNELS,
        PARAMETER_CHANNELS,
        PARAMETER_ROWS,
    )


@triton.jit(do_not_specialize=["rows"])
def gradients_kernel(
    outputs_gradient_ptr,
    sums_gradient_ptr,
    maps_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    parts_ptr,
    group_parts_ptr,
    maps_gradient_ptr,
    weight_gradient_ptr,
    bias_gradient_ptr,
    rows,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    SPANS: tl.constexpr,
    MERGED: tl.constexpr,
    PARAMETER_BLOCKS: tl.constexpr,
    PARAMETER_CHANNELS: tl.constexpr,
    PARAMETER_ROWS: tl.constexpr,
):
    """All gradients from the parts of `gradient_sums_kernel`: the first programs sum those of the parameters.

    `rows` is images * spans. MERGED is SPANS, rounded up to a power of two.
    """
    if tl.program_id(0) < PARAMETER_BLOCKS:
        sum_parameters(
            parts_ptr,
            weight_gradient_ptr,
            bias_gradient_ptr,
            tl.program_id(0),
            rows,
            GROUPS * GROUP_CHANNELS,
            PARAMETER_CHANNELS,
            PARAMETER_ROWS,
        )
    else:
        program = tl.program_id(0) - PARAMETER_BLOCKS
        image = (program // (BLOCKS * SPANS)).to(tl.int64)
        span = program // BLOCKS % SPANS
        block = program % BLOCKS
        group = block * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
        part = tl.arange(0, MERGED)
        # Parts along the first axis: along the second they would get the maps' layout, and a thread load eight of them.
        known = (part < SPANS)[:, None] & (group < GROUPS)[None, :]
        place = group_parts_ptr + part[:, None] + ((image * GROUPS + group) * (2 * SPANS))[None, :]
        share: tl.constexpr = 1.0 / (GROUP_CHANNELS * PIXELS)
        level = tl.sum(tl.load(place, mask=known, other=0.0), axis=0) * share
        tilt = tl.sum(tl.load(place + SPANS, mask=known, other=0.0), axis=0) * share
        level = to_channels(level, TILE_GROUPS, TILE_CHANNELS)
        tilt = to_channels(tilt, TILE_GROUPS, TILE_CHANNELS)

        channel, real = tile_channels(block, GROUPS, GROUP_CHANNELS, TILE_GROUPS, TILE_CHANNELS)
        weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
        bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
        mean, remainder, reciprocal = load_statistics(
            statistics_ptr, image * GROUPS, group, group < GROUPS, TILE_GROUPS, TILE_CHANNELS
        )
        pixel = span * (STEPS * TILE_PIXELS) + tl.arange(0, TILE_PIXELS)
        first = image * (GROUPS * GROUP_CHANNELS * PIXELS)
        for _ in range(STEPS):
            inside = real[:, None] & (pixel < PIXELS)[None, :]
            offsets = first + tile_offsets(channel, pixel, GROUPS * GROUP_CHANNELS, PIXELS, CHANNELS_LAST)
            maps = tl.load(maps_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.load(outputs_gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            normal = normalize(maps, mean, remainder, reciprocal)
            gradient *= activation_slope(normal * weight + bias, SILU)
            gradient = (gradient * weight - level - normal * tilt) * reciprocal
            if sums_gradient_ptr is not None:
                gradient += tl.load(sums_gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(maps_gradient_ptr + offsets, gradient.to(maps_gradient_ptr.dtype.element_ty), mask=inside)
            pixel += TILE_PIXELS


def backward_launches(maps: Tensor, groups: int, silu: bool, *, warp_size: int = 32) -> list[Launch]:
    """Launches of the backward pass, two, as `forward_launches`.

    Pointers: those of `backward_kernel`, then `parameters_kernel`; or, if groups do not fit, of `gradient_sums_kernel`,
    then `gradients_kernel`. parts are as `backward_parts`.
    """
    shape, tiling = shape_and_tiling(maps, groups, warp_size)
    channels = shape.count * shape.channels
    blocks = -(-channels // PARAMETER_CHANNELS)
    rows = {"rows": shape.images * tiling.spans}
    tile: dict[str, int | float | bool] = {"PARAMETER_CHANNELS": PARAMETER_CHANNELS, "PARAMETER_ROWS": PARAMETER_ROWS}
    if tiling.whole:
        constants = {"CHANNELS": channels, **tile}
        return [
            launch_of(backward_kernel, shape, tiling, SILU=silu),
            Launch(parameters_kernel, (blocks, 1), rows, constants, PARAMETER_WARPS),
        ]
    first = launch_of(gradient_sums_kernel, shape, tiling, SILU=silu)
    merged = triton.next_power_of_2(tiling.spans)
    constants = {**first.constants, "MERGED": merged, "PARAMETER_BLOCKS": blocks, **tile}
    return [first, Launch(gradients_kernel, (first.grid[0] + blocks, 1), rows, constants, tiling.num_warps)]


def backward_parts(maps: Tensor, groups: int, launches: list[Launch]) -> dict[str, Tensor]:
    """Allocate the parts that the first backward launch writes, by argument name."""
    spans = int(launches[0].constants.get("SPANS", 0))
    parts = {"parts_ptr": maps.new_empty((maps.shape[0], max(spans, 1), 2, maps.shape[1]), dtype=torch.float32)}
    if spans:
        parts["group_parts_ptr"] = maps.new_empty((maps.shape[0], groups, 2, spans), dtype=torch.float32)
    return parts


def backward(
    outputs_gradient: Tensor,
    sums_gradient: Tensor | None,
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of maps, weight and bias; arguments as in `kernels.group_norm_twin.twin_backward`, all dense."""
    maps_gradient = torch.empty_like(maps)
    parameter_gradients = {"weight_gradient_ptr": torch.empty_like(weight), "bias_gradient_ptr": torch.empty_like(bias)}
    first, second = launches = backward_launches(maps, groups, silu, warp_size=warp_size_of(maps.device))
    parts = backward_parts(maps, groups, launches)
    read = {
        "outputs_gradient_ptr": outputs_gradient,
        "maps_ptr": maps,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "statistics_ptr": statistics,
        **parts,
    }
    last: dict[str, Tensor | None] = {"sums_gradient_ptr": sums_gradient, "maps_gradient_ptr": maps_gradient}
    if "SPANS" in first.constants:
        first(**read)
        second(**read, **last, **parameter_gradients)
    else:
        first(**read, **last)
        second(**parts, **parameter_gradients)
    return maps_gradient, parameter_gradients["weight_gradient_ptr"], parameter_gradients["bias_gradient_ptr"]
