"""Parts shared by the kernels of group normalization: places of a tile, sums of its groups, activation, launches."""

# Device code is typed by Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from .group_norm_layout import Groups, Tiling, groups_of, tiling_of
from .triton_noise import Launch


@triton.jit
def tile_channels(
    block,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """Channels of a tile, int32 [TILE_GROUPS * TILE_CHANNELS], and a mask, True where there is such a channel."""
    index = tl.arange(0, TILE_GROUPS * TILE_CHANNELS)
    if TILE_CHANNELS == GROUP_CHANNELS:
        channel = block * (TILE_GROUPS * GROUP_CHANNELS) + index
        inside = channel < GROUPS * GROUP_CHANNELS
    else:
        group = block * TILE_GROUPS + index // TILE_CHANNELS
        within = index % TILE_CHANNELS
        channel = group * GROUP_CHANNELS + within
        inside = (group < GROUPS) & (within < GROUP_CHANNELS)
    return channel, inside


@triton.jit
def tile_offsets(channel, pixel, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of [channels, pixels] in an image, int64: a large one has more than 2^31 elements."""
    if CHANNELS_LAST:
        return channel[:, None] + pixel.to(tl.int64)[None, :] * CHANNELS
    return channel.to(tl.int64)[:, None] * PIXELS + pixel[None, :]


@triton.jit
def sum_groups(values, TILE_GROUPS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """Sum values of channels over each group, [TILE_GROUPS]."""
    return tl.sum(tl.reshape(values, (TILE_GROUPS, TILE_CHANNELS)), axis=1)


@triton.jit
def to_channels(values, TILE_GROUPS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """Repeat values of groups [TILE_GROUPS] for each channel, [TILE_GROUPS * TILE_CHANNELS, 1]."""
    repeated = tl.broadcast_to(values[:, None], (TILE_GROUPS, TILE_CHANNELS))
    return tl.reshape(repeated, (TILE_GROUPS * TILE_CHANNELS,))[:, None]


@triton.jit
def sigmoid(values):
    """1 / (1 + exp(-values)), with the exponential as a power of two, which is one instruction."""
    return 1.0 / (1.0 + tl.exp2(values * -1.4426950408889634))


@triton.jit
def activate(values, SILU: tl.constexpr):
    """Values times their sigmoid (Elfwing et al. 2018), or the values."""
    if SILU:
        values = values * sigmoid(values)
    return values


@triton.jit
def activation_slope(values, SILU: tl.constexpr):
    """Derivative of `activate`."""
    slope = 1.0
    if SILU:
        share = sigmoid(values)
        slope = share + values * share * (1.0 - share)
    return slope


@triton.jit
def load_statistics(statistics_ptr, first, group, inside, TILE_GROUPS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """Mean, its remainder and the reciprocal deviation of each channel's group, of float32 [images * groups, 3]."""
    place = statistics_ptr + (first + group) * 3
    mean = to_channels(tl.load(place, mask=inside, other=0.0), TILE_GROUPS, TILE_CHANNELS)
    remainder = to_channels(tl.load(place + 1, mask=inside, other=0.0), TILE_GROUPS, TILE_CHANNELS)
    reciprocal = to_channels(tl.load(place + 2, mask=inside, other=0.0), TILE_GROUPS, TILE_CHANNELS)
    return mean, remainder, reciprocal


@triton.jit
def normalize(maps, mean, remainder, reciprocal):
    """Normalized maps; `reciprocal` may have the weight in it."""
    return (maps - mean - remainder) * reciprocal


@triton.jit
def store_statistics(statistics_ptr, first, group, inside, mean, remainder, reciprocal):
    """Store what `load_statistics` loads."""
    place = statistics_ptr + (first + group) * 3
    tl.store(place, mean, mask=inside)
    tl.store(place + 1, remainder, mask=inside)
    tl.store(place + 2, reciprocal, mask=inside)


def shape_and_tiling(maps: Tensor, groups: int, warp_size: int) -> tuple[Groups, Tiling]:
    """Shape and tiling of dense maps that the kernels take."""
    shape = groups_of(maps, groups)
    return shape, tiling_of(shape, maps.element_size(), warp_size)


def launch_of(kernel: triton.JITFunction, shape: Groups, tiling: Tiling, **constants: int | float | bool) -> Launch:
    """Launch of a kernel over all tiles of the maps."""
    grid = (shape.images * tiling.spans * tiling.blocks, 1)
    return Launch(kernel, grid, {}, {**constants, **shape.constants(), **tiling.constants()}, tiling.num_warps)
