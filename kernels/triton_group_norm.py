"""Group normalization with SiLU, and the sum before it, in Triton.

Groups that fit on the chip are read once: a program keeps its tile in registers from the sums to the outputs. Larger
ones take two launches, each of which reads the maps: the first sums parts of each group, the second merges them in a
fixed order and normalizes.
"""

# Device code is typed by Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_group_norm_tiles import (
    activate,
    launch_of,
    normalize,
    shape_and_tiling,
    store_statistics,
    sum_groups,
    tile_channels,
    tile_offsets,
    to_channels,
)
from .triton_noise import Launch, warp_size_of


@triton.jit
def load_sum(maps_ptr, residual_ptr, sums_ptr, offsets, inside):
    """Load a tile, float32, 0.0 outside; with a residual, add it, round the sum to the maps' dtype and store it."""
    values = tl.load(maps_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        values += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + offsets, rounded, mask=inside)
        values = rounded.to(tl.float32)
    return values


@triton.jit
def forward_kernel(
    maps_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    outputs_ptr,
    sums_ptr,
    statistics_ptr,
    EPS: tl.constexpr,
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
    """Outputs, sums of maps and residual, and statistics of whole groups, each number read and written once.

    residual_ptr and sums_ptr are None without a residual.
    """
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    channel, real = tile_channels(block, GROUPS, GROUP_CHANNELS, TILE_GROUPS, TILE_CHANNELS)
    pixel = tl.arange(0, TILE_PIXELS)
    inside = real[:, None] & (pixel < PIXELS)[None, :]
    offsets = image * (GROUPS * GROUP_CHANNELS * PIXELS)
    offsets += tile_offsets(channel, pixel, GROUPS * GROUP_CHANNELS, PIXELS, CHANNELS_LAST)
    maps = load_sum(maps_ptr, residual_ptr, sums_ptr, offsets, inside)

    share: tl.constexpr = 1.0 / (GROUP_CHANNELS * PIXELS)
    mean = sum_groups(tl.sum(maps, axis=1), TILE_GROUPS, TILE_CHANNELS) / (GROUP_CHANNELS * PIXELS)
    # The mean is rounded, and the sum before it: distances from it have a mean of their own, the remainder. It is a
    # quotient because a product would be contracted with the subtraction, and not be the rounded mean that is stored.
    distance = tl.where(inside, maps - to_channels(mean, TILE_GROUPS, TILE_CHANNELS), 0.0)
    remainder = sum_groups(tl.sum(distance, axis=1), TILE_GROUPS, TILE_CHANNELS) * share
    square = sum_groups(tl.sum(distance * distance, axis=1), TILE_GROUPS, TILE_CHANNELS) * share
    reciprocal = tl.rsqrt(square - remainder * remainder + EPS)
    group = block * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    store_statistics(statistics_ptr, image * GROUPS, group, group < GROUPS, mean, remainder, reciprocal)

    normal = distance - to_channels(remainder, TILE_GROUPS, TILE_CHANNELS)
    normal *= to_channels(reciprocal, TILE_GROUPS, TILE_CHANNELS)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
    outputs = activate(normal * weight + bias, SILU)
    tl.store(outputs_ptr + offsets, outputs.to(outputs_ptr.dtype.element_ty), mask=inside)


@triton.jit
def statistics_kernel(
    maps_ptr,
    residual_ptr,
    sums_ptr,
    parts_ptr,
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
    """Parts float32 [images * groups, 3, spans]: mean, its remainder and the sum of squares around both of a span.

    Sums of maps and residual are stored as by `forward_kernel`.
    """
    image = (tl.program_id(0) // (BLOCKS * SPANS)).to(tl.int64)
    span = tl.program_id(0) // BLOCKS % SPANS
    block = tl.program_id(0) % BLOCKS
    channel, real = tile_channels(block, GROUPS, GROUP_CHANNELS, TILE_GROUPS, TILE_CHANNELS)
    first_pixel = span * (STEPS * TILE_PIXELS)
    first = image * (GROUPS * GROUP_CHANNELS * PIXELS)

    pixel = first_pixel + tl.arange(0, TILE_PIXELS)
    inside = real[:, None] & (pixel < PIXELS)[None, :]
    offsets = first + tile_offsets(channel, pixel, GROUPS * GROUP_CHANNELS, PIXELS, CHANNELS_LAST)
    maps = load_sum(maps_ptr, residual_ptr, sums_ptr, offsets, inside)
    # Distances from the first tile's mean, because squares of the values themselves would lose the variance.
    count = (tl.minimum(PIXELS - first_pixel, TILE_PIXELS) * GROUP_CHANNELS).to(tl.float32)
    mean = sum_groups(tl.sum(maps, axis=1), TILE_GROUPS, TILE_CHANNELS) / count
    centre = to_channels(mean, TILE_GROUPS, TILE_CHANNELS)
    distance = tl.where(inside, maps - centre, 0.0)
    square = distance * distance
    for _ in range(1, STEPS):
        pixel += TILE_PIXELS
        inside = real[:, None] & (pixel < PIXELS)[None, :]
        offsets = first + tile_offsets(channel, pixel, GROUPS * GROUP_CHANNELS, PIXELS, CHANNELS_LAST)
        maps = load_sum(maps_ptr, residual_ptr, sums_ptr, offsets, inside)
        further = tl.where(inside, maps - centre, 0.0)
        distance += further
        square += further * further

    count = (tl.minimum(PIXELS - first_pixel, STEPS * TILE_PIXELS) * GROUP_CHANNELS).to(tl.float32)
    total = sum_groups(tl.sum(distance, axis=1), TILE_GROUPS, TILE_CHANNELS)
    remainder = total / count
    squares = sum_groups(tl.sum(square, axis=1), TILE_GROUPS, TILE_CHANNELS) - total * remainder
    group = block * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    place = parts_ptr + (image * GROUPS + group) * (3 * SPANS) + span
    tl.store(place, mean, mask=group < GROUPS)
    tl.store(place + SPANS, remainder, mask=group < GROUPS)
    tl.store(place + 2 * SPANS, squares, mask=group < GROUPS)


@triton.jit
def normalize_kernel(
    maps_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    outputs_ptr,
    statistics_ptr,
    EPS: tl.constexpr,
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
):
    """Outputs and statistics from the maps (with a residual, the sums) and the parts of `statistics_kernel`.

    The parts of a group are merged as in Chan, Golub & LeVeque 1983, eq. 2.1, generalized to many. MERGED is SPANS,
    rounded up to a power of two.
    """
    image = (tl.program_id(0) // (BLOCKS * SPANS)).to(tl.int64)
    span = tl.program_id(0) // BLOCKS % SPANS
    block = tl.program_id(0) % BLOCKS
    group = block * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    part = tl.arange(0, MERGED)
    known = (group < GROUPS)[:, None] & (part < SPANS)[None, :]
    place = parts_ptr + ((image * GROUPS + group) * (3 * SPANS))[:, None] + part[None, :]
    part_mean = tl.load(place, mask=known, other=0.0)
    part_remainder = tl.load(place + SPANS, mask=known, other=0.0)
    part_squares = tl.load(place + 2 * SPANS, mask=known, other=0.0)
    pixels = tl.minimum(PIXELS - part * (STEPS * TILE_PIXELS), STEPS * TILE_PIXELS)
    count = (tl.maximum(pixels, 0) * GROUP_CHANNELS).to(tl.float32)[None, :]
    share: tl.constexpr = 1.0 / (GROUP_CHANNELS * PIXELS)
    # A product would be contracted with one addition of the sum, and threads that hold other parts get another mean.
    weighted = tl.fma(part_mean, count, 0.0)
    mean = tl.sum(weighted, axis=1) / (GROUP_CHANNELS * PIXELS)  # a quotient, as in `forward_kernel`
    distance = (part_mean - mean[:, None]) + part_remainder
    remainder = tl.sum(distance * count, axis=1) * share
    distance -= remainder[:, None]
    variance = tl.sum(part_squares + distance * distance * count, axis=1) * share
    reciprocal = tl.rsqrt(variance + EPS)
    store_statistics(statistics_ptr, image * GROUPS, group, (group < GROUPS) & (span == 0), mean, remainder, reciprocal)

    channel, real = tile_channels(block, GROUPS, GROUP_CHANNELS, TILE_GROUPS, TILE_CHANNELS)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
    centre = to_channels(mean, TILE_GROUPS, TILE_CHANNELS)
    off_centre = to_channels(remainder, TILE_GROUPS, TILE_CHANNELS)
    scale = to_channels(reciprocal, TILE_GROUPS, TILE_CHANNELS) * weight
    pixel = span * (STEPS * TILE_PIXELS) + tl.arange(0, TILE_PIXELS)
    first = image * (GROUPS * GROUP_CHANNELS * PIXELS)
    for _ in range(STEPS):
        inside = real[:, None] & (pixel < PIXELS)[None, :]
        offsets = first + tile_offsets(channel, pixel, GROUPS * GROUP_CHANNELS, PIXELS, CHANNELS_LAST)
        maps = tl.load(maps_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        outputs = activate(normalize(maps, centre, off_centre, scale) + bias, SILU)
        tl.store(outputs_ptr + offsets, outputs.to(outputs_ptr.dtype.element_ty), mask=inside)
        pixel += TILE_PIXELS


def forward_launches(maps: Tensor, groups: int, eps: float, silu: bool, *, warp_size: int = 32) -> list[Launch]:
    """Launches of the forward pass for maps of this shape, dtype and memory format: one, or two if groups do not fit.

    Pointers: those of `forward_kernel`; or of `statistics_kernel`, then `normalize_kernel`. parts: see `forward_parts`.

    Args:
        maps: [B, C, ...], dense, not empty. Its data are not read: it may be on "meta".
        groups: number of groups.
        eps: number added to the variance.
        silu: apply SiLU.
        warp_size: threads of a warp.
    """
    shape, tiling = shape_and_tiling(maps, groups, warp_size)
    last = {"EPS": eps, "SILU": silu}
    if tiling.whole:
        return [launch_of(forward_kernel, shape, tiling, **last)]
    merged = triton.next_power_of_2(tiling.spans)
    return [
        launch_of(statistics_kernel, shape, tiling),
        launch_of(normalize_kernel, shape, tiling, MERGED=merged, **last),
    ]


def forward_parts(maps: Tensor, groups: int, launches: list[Launch]) -> Tensor | None:
    """Allocate the parts that the first of two forward launches writes; None for one launch."""
    if len(launches) == 1:
        return None
    return maps.new_empty((maps.shape[0], groups, 3, int(launches[0].constants["SPANS"])), dtype=torch.float32)


def forward(
    maps: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Outputs, sums and statistics; arguments as in `kernels.group_norm_twin.twin_forward`, all dense."""
    outputs = torch.empty_like(maps)
    sums = None if residual is None else torch.empty_like(maps)
    statistics = maps.new_empty((maps.shape[0], groups, 3), dtype=torch.float32)
    launches = forward_launches(maps, groups, eps, silu, warp_size=warp_size_of(maps.device))
    parts = forward_parts(maps, groups, launches)
    read = {"maps_ptr": maps, "residual_ptr": residual, "sums_ptr": sums}
    written = {"weight_ptr": weight, "bias_ptr": bias, "outputs_ptr": outputs, "statistics_ptr": statistics}
    if parts is None:
        launches[0](**read, **written)
    else:
        launches[0](**read, parts_ptr=parts)
        launches[1](maps_ptr=maps if sums is None else sums, parts_ptr=parts, **written)
    return outputs, sums, statistics
