"""Launches of gen_dist up to the device: Triton's just-in-time compiler compiles them for an absent GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gen_dist.kernels import triton_latent, triton_noise

RNG = torch.tensor([7, 3])


def test_one_binary_serves_every_batch_size_row_and_stream(compiled: list[Any]) -> None:
    """A number that Triton specializes on, such as 1 or a multiple of 16, would compile another binary."""
    for rows, first_row, stream in [(1, 0, 1), (3, 1, 3), (16, 16, 16), (130, 7, 2)]:
        parameters = torch.zeros(rows, 80)
        latents, kl_nats = triton_latent.forward(parameters, None, RNG, stream, first_row, 1, False)
        triton_latent.backward(latents, kl_nats, parameters, None, RNG, stream, first_row, 1, False)
        triton_latent.backward(latents, kl_nats[:1].expand(rows), parameters, None, RNG, stream, first_row, 1, False)
        triton_noise.normal(RNG, stream, first_row, rows, 40)
    assert len(compiled) == 16
    assert len({kernel.hash for kernel in compiled}) == 3


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("with_prior", [False, True])
def test_every_combination_of_outputs_and_inputs_compiles(
    compiled: list[Any], with_prior: bool, deterministic: bool
) -> None:
    parameters = torch.zeros(2, 8, 3, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    prior = parameters.clone() if with_prior else None
    arguments = (parameters, prior, RNG, 2, 0, 3, deterministic)
    latents, kl_nats = triton_latent.forward(*arguments)
    for latents_gradient, kl_gradient in [(latents, kl_nats), (None, kl_nats), (latents, None)]:
        triton_latent.backward(latents_gradient, kl_gradient, *arguments)
    assert len({kernel.hash for kernel in compiled}) == 4


def test_tiles_cover_all_rows_and_do_not_depend_on_their_number() -> None:
    for width in (1, 7, 20, 33, 256, 257, 1000, 1024, 1030, 70_000):
        for dtype in (torch.float32, torch.bfloat16):
            launches = {
                rows: triton_latent.forward_launch(
                    torch.empty(rows, 2 * width, dtype=dtype, device="meta"), 2, 0, 1, False
                )
                for rows in (1, 3, 130)
            }
            assert len({(launch.num_warps, *launch.constants.items()) for launch in launches.values()}) == 1
            for rows, launch in launches.items():
                tile_rows, columns = int(launch.constants["ROWS"]), int(launch.constants["COLUMNS"])
                assert 0 <= launch.grid[0] * tile_rows - rows < tile_rows
                assert 0 <= launch.grid[1] * columns - width < columns
                assert tile_rows * columns == launch.num_warps * 32 * 8
                assert columns % int(launch.constants["VECTOR"]) == 0
