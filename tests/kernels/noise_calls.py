"""Calls of the noise kernels for tests, and their checks against the definition of the noise."""

from pathlib import Path

import torch
from torch import Tensor

from gen_dist.kernels import triton_noise
from gen_dist.kernels.device_noise import device_binarize, device_normal
from tests.kernels.accuracy import assert_close
from tests.kernels.calls import Call, warp_size_of
from tests.kernels.kernel_compiler import REPOSITORY

NORMALS_ERROR = 2e-6
"""Largest absolute error of a standard normal."""


def normal_call(rng: Tensor, stream: int, first_row: int, rows: int, width: int, target: str) -> Call:
    """Call of the noise kernel."""
    launch = triton_noise.normal_launch(stream, first_row, rows, width, warp_size=warp_size_of(target))
    return Call(launch, {"rng_ptr": rng}, {"normals_ptr": torch.empty(rows, width)})


def binarize_call(images: Tensor, rng: Tensor, stream: int, first_row: int, target: str) -> Call:
    """Call of the kernel that draws the pixels of images uint8 [rows, width]."""
    launch = triton_noise.binarize_launch(stream, first_row, *images.shape, warp_size=warp_size_of(target))
    binary = torch.empty(images.shape)
    return Call(launch, {"images_ptr": images, "rng_ptr": rng}, {"binary_ptr": binary})


def check_binarize(
    rng: Tensor, first_row: int, rows: int, width: int, target: str, directory: Path = REPOSITORY
) -> None:
    """Check the kernel's pixels against their definition."""
    images = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    images[:, :5] = torch.tensor([0, 255, 128, 0, 0])  # never, always, half of the time
    call = binarize_call(images, rng, 3, first_row, target)
    call.run(target, directory)
    assert torch.equal(call.output("binary_ptr"), device_binarize(images, rng, 3, first_row))


def check_normal(rng: Tensor, first_row: int, rows: int, width: int, target: str, directory: Path = REPOSITORY) -> None:
    """Check the noise kernel against the definition of the noise."""
    stream = 4
    call = normal_call(rng, stream, first_row, rows, width, target)
    call.run(target, directory)
    expected = device_normal(rng, stream, first_row, rows, width, dtype=torch.float64)
    assert_close(call.output("normals_ptr"), expected, torch.ones_like(expected), NORMALS_ERROR)
