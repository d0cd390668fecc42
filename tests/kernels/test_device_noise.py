"""Draws of devices other than CPUs, tested on CPU tensors, since they are torch operations for any device."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from gen_dist.kernels import Key, normal
from gen_dist.kernels.device_noise import (
    device_binarize,
    device_box_muller,
    device_normal,
    device_threshold,
    device_words,
    philox_4x32_10,
)
from gen_dist.kernels.noise import runs_triton
from tests.conftest import REPOSITORY

RNG = torch.tensor([7, 3])
SHAPES = ((1,), (7,), (1, 28, 28), (3, 5, 7))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 20, 21])
def test_device_normal_shards_equal_the_whole(width: int) -> None:
    whole = device_normal(RNG, 2, 4, 10, width)
    assert whole.shape == (10, width)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    assert len(whole.unique()) == whole.numel()
    parts = [
        device_normal(RNG, 2, 4, 3, width),
        device_normal(RNG, 2, 7, 6, width),
        device_normal(RNG, 2, 13, 1, width),
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert device_normal(RNG, 2, 4, 0, width).shape == (0, width)


@pytest.mark.parametrize("width", [1, 2, 7, 21])
def test_device_normal_is_normal_at_odd_and_even_widths(width: int) -> None:
    draws = device_normal(RNG, 2, 0, 60_000 // width, width).double().numpy()
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3
    if width > 1:  # the two of a pair, and neighbours, must be independent
        correlation = np.corrcoef(draws, rowvar=False) - np.eye(width)
        assert np.abs(correlation).max() < 5 / np.sqrt(len(draws))
        assert np.abs(np.corrcoef(draws**2, rowvar=False) - np.eye(width)).max() < 6 / np.sqrt(len(draws))


def test_device_normal_is_drawn_at_the_documented_counter() -> None:
    """Element 6 of sample 2 of row 9 is the third of a block, the cosine of words 2 and 3."""
    seed, step, stream = (5 << 32) + 6, 3, 2
    drawn = device_normal(torch.tensor([seed, step]), stream, 8, 4, 10, samples=3, dtype=torch.float64)
    counter = tuple(torch.tensor([word]) for word in (2 * 3 + 6 // 4, 9, stream, step))
    words = philox_4x32_10(counter, (torch.tensor([6]), torch.tensor([5])))  # type: ignore[arg-type]
    uniform, turn = int(words[2]) * 2.0**-32 + 2.0**-33, int(words[3]) * 2.0**-32
    radius = math.sqrt(-2 * math.log(uniform))
    assert drawn.shape == (12, 10)
    assert drawn[1 * 3 + 2, 6].item() == pytest.approx(radius * math.cos(2 * math.pi * turn), abs=1e-6)
    assert drawn[1 * 3 + 2, 7].item() == pytest.approx(radius * math.sin(2 * math.pi * turn), abs=1e-6)


def test_device_normal_samples_follow_one_another_in_blocks() -> None:
    """Samples are not one wider row: each sample starts a new counter block."""
    drawn = device_normal(RNG, 2, 4, 5, 10, samples=3).view(5, 3, 10)
    assert torch.equal(drawn, device_normal(RNG, 2, 4, 5, 36).view(5, 3, 12)[:, :, :10])
    assert torch.equal(drawn[:, 0], device_normal(RNG, 2, 4, 5, 10))


def test_device_box_muller_turns_by_the_whole_angle() -> None:
    """Angles are in each eighth of a turn, with sines and cosines exchanged and of either sign."""
    angles = (torch.arange(1600) * 2**32) // 1600
    words = torch.stack([torch.full_like(angles, 2**20), angles], dim=1)
    radius = math.sqrt(-2 * math.log(2.0**-12 + 2.0**-33))
    turn = angles.double() * (2 * math.pi / 2**32)
    expected = radius * torch.stack([turn.cos(), turn.sin()], dim=1)
    torch.testing.assert_close(device_box_muller(words, torch.float64), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(device_box_muller(words).double(), expected, rtol=0, atol=1e-6)


def test_device_normal_in_float64_is_the_same_noise() -> None:
    wide = device_normal(RNG, 2, 0, 100, 50, dtype=torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(device_normal(RNG, 2, 0, 100, 50).double(), wide, rtol=0, atol=1e-6)


def test_devices_without_triton_draw_in_torch_operations() -> None:
    assert not runs_triton(torch.device("cpu"))
    assert not runs_triton(torch.device("mps"))
    drawn = normal(Key(RNG.to("meta"), 2, 4), 10, 7)
    assert drawn.device.type == "meta"
    assert drawn.shape == (10, 7)


@pytest.mark.parametrize("change", ["seed", "step", "stream", "row"])
def test_another_key_gives_unrelated_device_draws(change: str) -> None:
    key = {"seed": 1, "step": 1, "stream": 1, "row": 0}
    other = key | {change: 500}
    images = torch.full((400, 9), 128, dtype=torch.uint8)
    normals, binary = [], []
    for k in (key, other):
        rng = torch.tensor([k["seed"], k["step"]])
        normals.append(device_normal(rng, k["stream"], k["row"], 400, 9))
        binary.append(device_binarize(images, rng, k["stream"], k["row"]))
    for first, second in (normals, binary):
        assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.08


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_device_binarize_keeps_shape_and_shards_equal_the_whole(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, (9, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = device_binarize(images, RNG, 3, 4)
    assert whole.shape == images.shape
    assert whole.dtype == torch.float32
    parts = [device_binarize(images[:2], RNG, 3, 4), device_binarize(images[2:], RNG, 3, 6)]
    assert torch.equal(torch.cat(parts), whole)


def test_device_binarize_leaves_black_and_white_as_they_are() -> None:
    black = torch.zeros(2000, 101, dtype=torch.uint8)
    assert not device_binarize(black, RNG, 3, 0).any()
    assert device_binarize(black + 255, RNG, 3, 0).all()
    # The critical number is drawn once in 65,536 times: give it to each pixel.
    assert device_threshold(black + 255, torch.full((2000, 101), 65535)).all()
    assert not device_threshold(black, torch.zeros(2000, 101, dtype=torch.int64)).any()


def test_device_binarize_draws_independent_pixels_by_intensity() -> None:
    images = torch.arange(1, 255, dtype=torch.uint8).repeat(4000, 1)
    drawn = device_binarize(images, RNG, 3, 0)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    expected = torch.arange(1, 255) / 255
    deviation = (drawn.mean(0) - expected) / (expected * (1 - expected) / 4000).sqrt()
    assert deviation.abs().max() < 4.5
    assert stats.kstest(deviation.numpy(), "norm").pvalue > 1e-3
    grey = device_binarize(torch.full((20_000, 11), 128, dtype=torch.uint8), RNG, 3, 0)
    assert np.abs(np.corrcoef(grey.numpy(), rowvar=False) - np.eye(11)).max() < 5 / np.sqrt(20_000)


def test_device_binarize_uses_both_halves_of_a_word() -> None:
    words = device_words(RNG, 3, 4, 5, 4)
    halves = torch.stack((words % 65536, words // 65536), dim=-1).reshape(5, 8)[:, :7]
    images = torch.randint(0, 256, (5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = (halves < images.long() * 257).float()
    assert torch.equal(device_binarize(images, RNG, 3, 4), expected)


def test_kernels_work_without_triton() -> None:
    """macOS and Windows have no Triton."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from gen_dist.kernels import Key, normal, reparameterize_kl\n"
        "from gen_dist.kernels.noise import runs_triton\n"
        "assert not runs_triton(torch.device('cuda'))\n"
        "parameters, rng = torch.zeros(3, 8, device='meta'), torch.zeros(2, dtype=torch.int64, device='meta')\n"
        "assert reparameterize_kl(parameters, Key(rng, 0, 0))[0].shape == (3, 4)\n"
        "assert normal(Key(rng, 0, 0), 3, 4).shape == (3, 4)\n"
        "assert reparameterize_kl(torch.zeros(3, 8), Key(torch.tensor([7, 3]), 0, 0))[0].shape == (3, 4)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)
