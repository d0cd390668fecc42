"""Keyed draws: standard normals and binarized images as functions of (seed, stream, step, global row).

`rng` is int64 [2] = (seed, step) on the device that draws, so that no Python number changes from step to step. On CPUs
each draw is one opaque operator under torch.compile, which is never hoisted, repeated or reordered; eager code calls
the same function without the dispatcher, whose cold code costs more than the draw.
"""

import math
import threading
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.philox import device_words, host_words


def normal(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    """Standard normal draws; row i depends on (seed, stream, step, first_row + i) and the width alone.

    Args:
        rng: int64 [2], (seed, step).
        stream: what the draw is for; draws of two streams are independent.
        first_row: global row of the first one drawn.
        rows: number of rows.
        width: draws in a row.

    Returns:
        float32 [rows, width] on the device of `rng`. Not to be written to: it may be part of what is kept for others.
    """
    if rng.device.type != "cpu":
        return device_normal(rng, stream, first_row, rows, width)
    draw = normal_operator if torch.compiler.is_compiling() else _host_normal
    return draw(rng, stream, first_row, rows, width)


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
    if rng.device.type != "cpu":
        return device_binarize(images, rng, stream, first_row)
    draw = binarize_operator if torch.compiler.is_compiling() else _host_binarize
    return draw(images, rng, stream, first_row)


def _host_normal(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    seed, step = rng.tolist()
    return _LOOKAHEAD.normal(seed, stream, step, first_row, rows, width)


@torch.library.custom_op("gen_dist::normal", mutates_args=())
def normal_operator(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    """`normal` as compiled code calls it. Its result is its own: compiled code may reuse the memory."""
    return _host_normal(rng, stream, first_row, rows, width).clone()


@normal_operator.register_fake
def _(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    return rng.new_empty((rows, width), dtype=torch.float32)


class _Lookahead(threading.local):
    """Normal draws on the CPU, of several steps at once where one step follows another.

    Between two matrix products nothing of Python or NumPy is in the cache, and a draw of a few thousand numbers costs
    ten times what its arithmetic does. Drawn sixteen steps at a time it is paid once. What is drawn does not change.
    """

    STEPS = 16
    LARGEST = 2**17  # draws of a step; larger ones cost what their arithmetic does
    STREAMS = 8  # kept; the least recently used goes first

    def __init__(self) -> None:
        self._drawn: OrderedDict[tuple[int, ...], tuple[int, Tensor]] = OrderedDict()

    def normal(self, seed: int, stream: int, step: int, first_row: int, rows: int, width: int) -> Tensor:
        """A view of what is kept: not to be written to."""
        key = (seed, stream, first_row, rows, width)
        kept = self._drawn.get(key)
        if kept is None or not kept[0] <= step < kept[0] + len(kept[1]):
            follows = kept is not None and step == kept[0] + len(kept[1]) and rows * width <= self.LARGEST
            steps = range(step, step + (self.STEPS if follows else 1))
            kept = step, torch.from_numpy(host_normal(seed, stream, steps, first_row, rows, width))
            self._drawn[key] = kept
            self._drawn.move_to_end(key)
            if len(self._drawn) > self.STREAMS:
                self._drawn.popitem(last=False)
        return kept[1][step - kept[0]]


_LOOKAHEAD = _Lookahead()


def host_normal(seed: int, stream: int, steps: range, first_row: int, rows: int, width: int) -> NDArray[np.float32]:
    """The definition of `normal` on CPUs, for some steps: float32 [steps, rows, width].

    The pairs of a row take their radii from the first half of its words, their angles from the second.
    """
    pairs = -(-width // 2)
    words = np.concatenate([host_words(seed, stream, step, first_row, rows, pairs) for step in steps])
    normals = host_box_muller(words.view(np.uint32).reshape(-1, 2, pairs))[:, :width]
    return np.ascontiguousarray(normals).reshape(len(steps), rows, width)


def host_box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard normal pairs from pairs of random words (Box & Muller 1958).

    Args:
        words: uint32 [rows, 2, pairs], all 32 bits random.

    Returns:
        float32 [rows, 2 * pairs], at most 6.8 in size.
    """
    rows, _, pairs = words.shape
    # The half-step of 2^-33 keeps the uniform in (0, 1] and its logarithm finite.
    radius = np.multiply(words[:, 0], np.float32(2.0**-32), dtype=np.float32)
    radius += np.float32(2.0**-33)
    np.log(radius, out=radius)
    radius *= np.float32(-2.0)
    np.sqrt(radius, out=radius)
    angle = np.multiply(words[:, 1], np.float32(2.0 * math.pi * 2.0**-32), dtype=np.float32)
    normals = np.empty((rows, 2, pairs), dtype=np.float32)
    np.cos(angle, out=normals[:, 0])
    np.sin(angle, out=normals[:, 1])
    normals *= radius[:, None]
    return normals.reshape(rows, 2 * pairs)


def device_normal(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    """The definition of `normal` on other devices, in torch operations that torch.compile fuses."""
    pairs = -(-width // 2)
    words = device_words(rng, stream, first_row, rows, 2 * pairs).view(rows, 2, pairs)
    return device_box_muller(words)[:, :width].contiguous()


def device_box_muller(words: Tensor) -> Tensor:
    """`host_box_muller` in torch operations: int64 [rows, 2, pairs] of 0 .. 2^32 - 1 to float32 [rows, 2 * pairs]."""
    uniform = words[:, 0].to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
    radius = uniform.log_().mul_(-2.0).sqrt_()
    angle = words[:, 1].to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)


def _host_binarize(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    rows, pixels = images.shape[0], math.prod(images.shape[1:])
    seed, step = rng.tolist()
    words = host_words(seed, stream, step, first_row, rows, -(-(pixels + TIE_BYTES) // 8))
    ones = host_threshold(images.reshape(rows, pixels).numpy(), words.view(np.uint8))
    return torch.from_numpy(ones).float().view(images.shape)


binarize_operator = torch.library.custom_op("gen_dist::binarize", _host_binarize, mutates_args=())


@binarize_operator.register_fake
def _(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    return torch.empty(images.shape, dtype=torch.float32, device=images.device)


# Bernoulli(v / 255) as `16-bit number < v * 257`, since 257 * 255 = 65535. The largest number counts as the one below
# it, so that a pixel of 255 is always 1, as a pixel of 0 is always 0.
TIE_BYTES = 64


def host_threshold(images: NDArray[np.uint8], noise: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """True with probability intensity / 255, from 8 random bits a pixel and 8 more for one pixel in 256.

    A 16-bit number with high byte h is below 257 v = 256 v + v where h < v, and where h = v if its low byte is below v.
    The case h = 255 may stand for h = v: both have one chance in 256, and 255 is below no intensity. So the low byte is
    looked at there alone; it comes from the row's last TIE_BYTES, by the pixel's number.

    Args:
        images: uint8 [rows, pixels].
        noise: uint8 [rows, at least pixels + TIE_BYTES], random.

    Returns:
        bool [rows, pixels].
    """
    pixels = images.shape[1]
    high = noise[:, :pixels]
    ones = high < images
    row, pixel = np.divmod(np.flatnonzero(high == 255), pixels)  # five times as fast as nonzero in two dimensions
    low = noise[row, pixels + pixel % TIE_BYTES]
    ones[row, pixel] = np.minimum(low, 254) < images[row, pixel]
    return ones


def device_binarize(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    """The definition of `binarize` on other devices, in torch operations that torch.compile fuses."""
    rows, pixels = images.shape[0], math.prod(images.shape[1:])
    pairs = device_words(rng, stream, first_row, rows, -(-pixels // 2))
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1).view(rows, -1)[:, :pixels]
    return device_threshold(images.reshape(rows, pixels), halves).view(images.shape)


def device_threshold(images: Tensor, noise: Tensor) -> Tensor:
    """1.0 with probability intensity / 255: uint8 [rows, pixels] and int64 0 .. 65535 [rows, pixels] to float32."""
    return (noise.clamp(max=65534) < images.to(torch.int64) * 257).to(torch.float32)
