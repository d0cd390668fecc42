"""The draws that devices other than CPUs make, run here on CPU tensors: they are torch operations for any device."""

import numpy as np
import pytest
import torch
from scipy import stats

from kernels.noise import device_binarize, device_normal, device_threshold
from kernels.philox import device_words

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
    if width > 1:  # the two of a pair, and neighbours, must not know of each other
        correlation = np.corrcoef(draws, rowvar=False) - np.eye(width)
        assert np.abs(correlation).max() < 5 / np.sqrt(len(draws))
        assert np.abs(np.corrcoef(draws**2, rowvar=False) - np.eye(width)).max() < 6 / np.sqrt(len(draws))


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
def test_device_binarize_shards_equal_the_whole_and_keep_the_shape(shape: tuple[int, ...]) -> None:
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
    # The number that would spoil it comes once in 65,536 draws: give it to each pixel.
    assert device_threshold(black + 255, torch.full((2000, 101), 65535)).all()
    assert not device_threshold(black, torch.zeros(2000, 101, dtype=torch.int64)).any()


def test_device_binarize_draws_each_pixel_with_its_intensity_and_on_its_own() -> None:
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
