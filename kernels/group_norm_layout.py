"""Shapes of group normalization: groups of channels and pixels, and the tiles into which the kernels cut them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .latent_layout import memory_format_of

WHOLE_ELEMENTS = 16_384
"""Elements, padded to powers of two, of the largest tile that stays in registers between its sums and its outputs."""
STREAMED_ELEMENTS = 4096
"""Elements of a tile of larger groups, which are read twice."""
LEAST_ELEMENTS = 256
"""Elements of the smallest tile: groups share one until they fill a warp with 16-byte accesses of half precision."""
MOST_SPANS = 64
"""Upper limit of the parts into which the pixels of a group are cut. Every program of the second launch merges them."""
PART_ELEMENTS = 64
"""Elements of a group that a program normalizes for each part that it merges, at least.

Forward a part is 12 bytes. Tiles of channels_last maps hold several groups and so few pixels of each: without this
limit, the parts that are read again would be up to a fifth of all bytes.
"""
THREAD_ELEMENTS = 16
MOST_WARPS = 16
WHOLE_RUN_BYTES, STREAMED_RUN_BYTES = 32, 64
"""Bytes of the channels of one pixel in a tile of channels_last maps, at least: a sector of the caches, or two."""


@dataclass(frozen=True)
class Groups:
    """Maps [B, C, ...] as [images, count, channels, pixels], in memory contiguous or channels_last."""

    images: int
    count: int
    channels: int
    pixels: int
    channels_last: bool

    def constants(self) -> dict[str, int | float | bool]:
        """The shape of one image as the kernels' constexpr arguments."""
        return {
            "GROUPS": self.count,
            "GROUP_CHANNELS": self.channels,
            "PIXELS": self.pixels,
            "CHANNELS_LAST": self.channels_last,
        }


def groups_of(maps: Tensor, groups: int) -> Groups:
    """View dense maps [B, C, ...] as groups of channels."""
    images, channels, *spatial = maps.shape
    memory_format = memory_format_of(maps)
    contiguous = maps.is_contiguous(memory_format=memory_format) and maps.is_contiguous()
    return Groups(images, groups, channels // groups, math.prod(spatial), not contiguous)


@dataclass(frozen=True)
class Tiling:
    """Tiles of the kernels. It does not depend on the number of images: a shard of rows has the bits of the whole.

    Attributes:
        groups: groups of a tile, a power of two.
        channels: channels of a group in the tile, padded to a power of two.
        pixels: pixels of the tile, a power of two.
        steps: tiles that one program goes through, along the pixels.
        spans: programs along the pixels of a group; 1 if a tile holds whole groups.
        blocks: programs along the groups of an image.
        num_warps: warps of a program.
    """

    groups: int
    channels: int
    pixels: int
    steps: int
    spans: int
    blocks: int
    num_warps: int

    @property
    def whole(self) -> bool:
        """True if a tile holds whole groups, so that one launch reads them once."""
        return self.spans == self.steps == 1

    def constants(self) -> dict[str, int | float | bool]:
        """The tile as the kernels' constexpr arguments."""
        streamed = {} if self.whole else {"STEPS": self.steps, "SPANS": self.spans}
        return {
            "TILE_GROUPS": self.groups,
            "TILE_CHANNELS": self.channels,
            "TILE_PIXELS": self.pixels,
            "BLOCKS": self.blocks,
            **streamed,
        }


def tiling_of(groups: Groups, itemsize: int, warp_size: int) -> Tiling:
    """Choose the tiles for maps that the kernels take.

    Args:
        groups: shape of the maps.
        itemsize: bytes of an element in memory.
        warp_size: threads of a warp.
    """
    channels, pixels, most_groups = (_power_of_two(n) for n in (groups.channels, groups.pixels, groups.count))
    # Groups that share a tile only to lengthen their runs in memory: half a sector, if a sector would not fit.
    for run_bytes in (WHOLE_RUN_BYTES, WHOLE_RUN_BYTES // 2):
        together = _groups_of_a_run(groups, run_bytes, itemsize)
        if together * channels * pixels <= WHOLE_ELEMENTS:
            together = max(together, min(most_groups, LEAST_ELEMENTS // (channels * pixels)))
            return _tiling(groups, together, channels, pixels, 1, warp_size)
    together = _groups_of_a_run(groups, STREAMED_RUN_BYTES, itemsize)
    tile_pixels = min(pixels, max(1, STREAMED_ELEMENTS // (together * channels)))
    tiles = -(-groups.pixels // tile_pixels)
    most_spans = max(1, min(MOST_SPANS, math.isqrt(groups.channels * groups.pixels // PART_ELEMENTS)))
    return _tiling(groups, together, channels, tile_pixels, -(-tiles // most_spans), warp_size)


def _tiling(groups: Groups, together: int, channels: int, pixels: int, steps: int, warp_size: int) -> Tiling:
    warps = together * channels * pixels // (warp_size * THREAD_ELEMENTS)
    return Tiling(
        groups=together,
        channels=channels,
        pixels=pixels,
        steps=steps,
        spans=-(-groups.pixels // (pixels * steps)),
        blocks=-(-groups.count // together),
        num_warps=max(1, min(warps, MOST_WARPS)),
    )


def _groups_of_a_run(groups: Groups, run_bytes: int, itemsize: int) -> int:
    """Number of adjacent groups whose channels at one pixel make up run_bytes; 1 if channels are not adjacent."""
    if not groups.channels_last:
        return 1
    wanted = -(-run_bytes // (groups.channels * itemsize))
    return _power_of_two(min(wanted, groups.count))


def _power_of_two(number: int) -> int:
    """Round up to a power of two."""
    return 1 << (number - 1).bit_length()


def kernels_take(maps: Tensor, groups: int) -> bool:
    """True if the kernels take dense maps of this shape and dtype; the twin takes the others."""
    channels = maps.shape[1] // groups
    return maps.dtype != torch.float64 and maps.numel() > 0 and _power_of_two(channels) <= WHOLE_ELEMENTS
