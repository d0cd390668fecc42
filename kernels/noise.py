"""Keyed draws: standard normals and binarized images as functions of (seed, stream, step, global row).

Each is a registered operator: torch.compile keeps it whole and never hoists, repeats or reorders its draw.
`rng` is int64 [2] = (seed, step) on the device that draws, so that no Python number changes from step to step.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kernels.philox import device_words, host_words

# Bernoulli(v / 255) as `word < v * 257` on 16-bit words, since 257 * 255 = 65535. A word is a quarter of the cost of a
# float and 256 times finer than the intensities. The largest word counts as the one below it, so that a pixel of 255
# is always 1, as a pixel of 0 is always 0.
_THRESHOLD_PER_LEVEL = 257
_LARGEST_WORD = 32766  # of words shifted to int16


@torch.library.custom_op("gen_dist::normal", mutates_args=())
def normal(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    """Standard normal draws; row i depends on (seed, stream, step, first_row + i) alone.

    Args:
        rng: int64 [2], (seed, step).
        stream: what the draw is for; draws of two streams are independent.
        first_row: global row of the first one drawn.
        rows: number of rows.
        width: draws in a row.

    Returns:
        float32 [rows, width] on the device of `rng`.
    """
    pairs = -(-width // 2)
    if rng.device.type == "cpu":
        seed, step = rng.tolist()
        words = torch.from_numpy(host_words(seed, stream, step, first_row, rows, pairs).view(np.int32))
    else:
        words = device_words(rng, stream, first_row, rows, 2 * pairs)
    return box_muller(words.view(rows, 2, pairs))[:, :width].contiguous()


def box_muller(words: Tensor) -> Tensor:
    """Standard normal pairs from pairs of random 32-bit words (Box & Muller 1958).

    Args:
        words: integers [rows, 2, pairs] with 32 random bits, signed or not.

    Returns:
        float32 [rows, 2 * pairs], at most 6.7 in size.
    """
    # The top bit of the radius word is dropped: 31 bits are never negative, and with the half-step of 2^-32 the
    # uniform lies in (0, 1], so that the logarithm is finite. Signed words rounded to float32 gave log(0) in the end.
    uniform = (words[:, 0] & 0x7FFFFFFF).to(torch.float32).mul_(2.0**-31).add_(2.0**-32)
    radius = uniform.log_().mul_(-2.0).sqrt_()
    angle = words[:, 1].to(torch.float32).mul_(math.pi * 2.0**-31)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)


@normal.register_fake
def _(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    return rng.new_empty((rows, width), dtype=torch.float32)


@torch.library.custom_op("gen_dist::binarize", mutates_args=())
def binarize(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    """Draw each pixel from Bernoulli(intensity / 255): the dynamic binarization of Burda et al. 2016.

    Args:
        images: uint8 [B, ...], 0..255.
        rng: int64 [2], (seed, step), on the device of the images.
        stream: what the draw is for.
        first_row: global row of images[0].

    Returns:
        float32 of the shape of `images`, each 0.0 or 1.0.
    """
    rows, pixels = images.shape[0], math.prod(images.shape[1:])
    if images.device.type == "cpu":
        seed, step = rng.tolist()
        words = host_words(seed, stream, step, first_row, rows, -(-pixels // 4))
        uniform = torch.from_numpy(words.view(np.int16))[:, :pixels]
    else:
        uniform = _int16_words(device_words(rng, stream, first_row, rows, -(-pixels // 2)))[:, :pixels]
    return threshold(images.reshape(rows, pixels), uniform).view(images.shape)


def threshold(images: Tensor, words: Tensor) -> Tensor:
    """1.0 with probability intensity / 255 where the words are random.

    Args:
        images: uint8 [rows, pixels].
        words: int16 [rows, pixels], all 16 bits random.

    Returns:
        float32 [rows, pixels].
    """
    least_dark = images.to(torch.int16).mul_(_THRESHOLD_PER_LEVEL).sub_(32768)
    return (words.clamp(max=_LARGEST_WORD) < least_dark).to(torch.float32)


def _int16_words(words: Tensor) -> Tensor:
    """Halves of unsigned 32-bit words int64 [rows, N] as int16 [rows, 2N]."""
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.view(words.shape[0], -1).sub(32768).to(torch.int16)


@binarize.register_fake
def _(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    return torch.empty(images.shape, dtype=torch.float32, device=images.device)
