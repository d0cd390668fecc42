"""Launches of group normalization up to the device, compiled just in time for an absent GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gen_dist.kernels import triton_group_norm, triton_group_norm_backward


def launch(images: int, side: int, with_residual: bool) -> None:
    """Run both passes on maps of 8 channels in 2 groups."""
    maps = torch.zeros(images, 8, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    residual = maps.clone() if with_residual else None
    parameter = torch.zeros(8)
    _, _, statistics = triton_group_norm.forward(maps, residual, parameter, parameter, 2, 1e-6, True)
    triton_group_norm_backward.backward(maps, residual, maps, parameter, parameter, statistics, 2, True)


@pytest.mark.parametrize("side", [8, 80], ids=["whole", "streamed"])
def test_one_binary_of_group_norm_serves_every_batch_size(compiled: list[Any], side: int) -> None:
    """A number that Triton specializes on, such as 1 or a multiple of 16, would compile another binary."""
    launches = 3 if side == 8 else 4
    for images in (1, 2, 16):
        launch(images, side, with_residual=False)
    assert len(compiled) == 3 * launches
    assert len({kernel.hash for kernel in compiled}) == launches
    launch(3, side, with_residual=True)
    # A residual changes the first kernel forward, which adds it, and the one that adds its gradient.
    assert len({kernel.hash for kernel in compiled}) == launches + 2
