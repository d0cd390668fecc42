"""Tiles of group normalization cover the maps once and stay within the limits of a program."""

import itertools

import pytest
import torch

from gen_dist.kernels.group_norm_layout import (
    MOST_SPANS,
    MOST_WARPS,
    PART_ELEMENTS,
    WHOLE_ELEMENTS,
    Groups,
    groups_of,
    kernels_take,
    tiling_of,
)

COUNTS, CHANNELS, PIXELS = (1, 3, 8, 32), (1, 3, 4, 16, 200, 2048), (1, 15, 64, 961, 4096, 65_536, 3_000_000)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_cover_every_group_and_pixel_once(channels_last: bool, itemsize: int, warp_size: int) -> None:
    for count, channels, pixels in itertools.product(COUNTS, CHANNELS, PIXELS):
        groups = Groups(2, count, channels, pixels, channels_last)
        tiling = tiling_of(groups, itemsize, warp_size)
        for size in (tiling.groups, tiling.channels, tiling.pixels, tiling.num_warps):
            assert size & (size - 1) == 0, (groups, tiling)
        assert channels <= tiling.channels < 2 * channels
        assert 0 <= tiling.blocks * tiling.groups - count < tiling.groups
        # The last program of a group has pixels, or its share of the statistics would be of none.
        assert 0 <= tiling.spans * tiling.steps * tiling.pixels - pixels < tiling.steps * tiling.pixels
        assert tiling.whole == (tiling.pixels >= pixels)
        assert tiling.spans <= MOST_SPANS
        assert tiling.spans == 1 or tiling.spans**2 * PART_ELEMENTS <= channels * pixels
        assert tiling.groups * tiling.channels * tiling.pixels <= WHOLE_ELEMENTS
        assert tiling.num_warps * warp_size <= 1024
        assert tiling.num_warps <= MOST_WARPS


@pytest.mark.parametrize("itemsize", [2, 4])
def test_pixels_of_channels_last_tiles_are_wide_accesses(itemsize: int) -> None:
    """Networks have groups of four channels: eight bytes in bf16."""
    for pixels in (64, 256, 1024, 4096, 65_536):
        tiling = tiling_of(Groups(2, 32, 4, pixels, True), itemsize, 32)
        assert tiling.groups * tiling.channels * itemsize >= 16
        if not tiling.whole:
            assert tiling.groups * tiling.channels * itemsize >= 64


def test_groups_that_fit_on_the_chip_take_one_launch() -> None:
    for channels_last, pixels, whole in [(False, 4096, True), (False, 4097, False), (True, 1024, True)]:
        assert tiling_of(Groups(1, 32, 4, pixels, channels_last), 2, 32).whole == whole


@pytest.mark.parametrize(
    ("maps", "channels_last"),
    [
        (torch.empty(2, 6, 3, 5, device="meta"), False),
        (torch.empty(2, 6, 3, 5, device="meta").contiguous(memory_format=torch.channels_last), True),
        (torch.empty(2, 6, 1, 1, device="meta").contiguous(memory_format=torch.channels_last), False),
        (torch.empty(2, 6, 3, 5, 2, device="meta").contiguous(memory_format=torch.channels_last_3d), True),
        (torch.empty(2, 6, device="meta"), False),
    ],
)
def test_maps_are_groups_in_their_layout(maps: torch.Tensor, channels_last: bool) -> None:
    groups = groups_of(maps, 3)
    assert (groups.images, groups.count, groups.channels, groups.channels_last) == (2, 3, 2, channels_last)
    assert groups.pixels == maps[0, 0].numel()


def test_the_twin_takes_what_the_kernels_do_not() -> None:
    assert kernels_take(torch.empty(2, 64, 8, 8, device="meta"), 4)
    assert not kernels_take(torch.empty(2, 64, 8, 8, device="meta", dtype=torch.float64), 4)
    assert not kernels_take(torch.empty(0, 64, 8, 8, device="meta"), 4)
    assert not kernels_take(torch.empty(2, 64, 0, 8, device="meta"), 4)
    assert kernels_take(torch.empty(2, 2 * WHOLE_ELEMENTS, device="meta"), 2)
    assert not kernels_take(torch.empty(2, 2 * WHOLE_ELEMENTS + 2, device="meta"), 2)
