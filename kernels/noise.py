"""Keyed draws: standard normals and binarized images as functions of (seed, stream, step, global row).

`rng` is int64 [2] = (seed, step) on the device that draws, so that no Python number changes from step to step. On CPUs
each draw is one opaque operator under torch.compile, which is never hoisted, repeated or reordered. Eager code calls
the same function without the dispatcher, which costs more than the draw when its code is not in the cache.

CPUs draw normals with NumPy's generator (`host_normal`). Other devices draw the device noise: `device_normal` in torch
operations, or the same in Triton (kernels/triton_noise.py) on devices that run Triton.
"""

import importlib.util
import math
import threading
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .key import Key
from .philox import device_words, host_words


def normal(key: Key, rows: int, width: int) -> Tensor:
    """Draw standard normals. Each row depends on its key and the width alone.

    Args:
        key: seed, step, stream and the global row of the first row.
        rows: number of rows.
        width: draws per row.

    Returns:
        float32 [rows, width] on the device of the key. Read-only: it may be a view of memory that other draws share.
    """
    rng = key.rng
    if rng.device.type == "cpu":
        draw = normal_operator if torch.compiler.is_compiling() else _host_normal
    elif runs_triton(rng.device):
        draw = normal_operator if _is_transformed() else _triton_normal
    else:
        draw = device_normal
    return draw(rng, key.stream, key.first_row, rows, width)


def binarize(images: Tensor, key: Key) -> Tensor:
    """Draw each pixel from Bernoulli(intensity / 255): the dynamic binarization of Burda et al. 2016.

    Args:
        images: uint8 [B, ...], 0..255.
        key: key of images[0], on the device of the images.

    Returns:
        float32 of the shape of `images`, each 0.0 or 1.0.
    """
    rng = key.rng
    if rng.device.type == "cpu":
        draw = binarize_operator if torch.compiler.is_compiling() else _host_binarize
    elif runs_triton(rng.device):
        draw = binarize_operator if _is_transformed() else _triton_binarize
    else:
        draw = device_binarize
    return draw(images, rng, key.stream, key.first_row)


def _is_transformed() -> bool:
    """True if torch.compile or torch.func transforms this code: its tensors then have no memory for a kernel.

    Other code avoids the operators, since the first call of one imports torch's compiler, which takes seconds.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _host_normal(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    seed, step = rng.tolist()
    return _LOOKAHEAD.normal(seed, stream, step, first_row, rows, width)


_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """True if the Triton kernels run on this device: an NVIDIA or AMD GPU, both named "cuda" in torch."""
    return device.type == "cuda" and _TRITON_IS_INSTALLED


def _triton_binarize(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    from . import triton_noise  # there is no Triton on macOS and Windows

    return triton_noise.binarize(images, rng, stream, first_row)


def _triton_normal(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    from . import triton_noise  # there is no Triton on macOS and Windows

    return triton_noise.normal(rng, stream, first_row, rows, width)


@torch.library.custom_op("gen_dist::normal", mutates_args=())
def normal_operator(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    """Operator of `normal` for transformed code. It returns a copy, since compiled code may reuse the memory."""
    if runs_triton(rng.device):
        return _triton_normal(rng, stream, first_row, rows, width)
    return _host_normal(rng, stream, first_row, rows, width).clone()


@normal_operator.register_fake
def _(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    return rng.new_empty((rows, width), dtype=torch.float32)


class _Lookahead(threading.local):
    """Cache of normal draws on the CPU, which draws several consecutive steps at once.

    Between two matrix products the code of Python and NumPy is not in the cache, so a draw of a few thousand numbers
    costs ten times its arithmetic. Sixteen steps at a time pay that once. The numbers do not change.
    """

    STEPS = 16
    LARGEST = 2**17  # draws per step; beyond that, arithmetic dominates
    STREAMS = 8  # entries; the least recently used is evicted first

    def __init__(self) -> None:
        self._drawn: OrderedDict[tuple[int, ...], tuple[int, Tensor]] = OrderedDict()

    def normal(self, seed: int, stream: int, step: int, first_row: int, rows: int, width: int) -> Tensor:
        """Read-only view of a step's draws, float32 [rows, width]."""
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
    """Definition of `normal` on CPUs, for several steps: float32 [steps, rows, width].

    In a row, the radii of the pairs come from the first half of its words, the angles from the second.
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


def device_normal(
    rng: Tensor,
    stream: int,
    first_row: int,
    rows: int,
    width: int,
    *,
    samples: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Definition of `normal` on other devices (device noise), in torch operations that torch.compile fuses.

    Element d of sample k of global row r comes from the words w0 .. w3 of Philox-4x32-10 with the counter
    (k * ceil(width / 4) + d // 4, r, stream, step), each modulo 2^32, and the key (low, high half of the seed):
    elements 4j and 4j + 1 are the Box-Muller pair of w0 and w1, elements 4j + 2 and 4j + 3 that of w2 and w3. None of
    it depends on a tile, a shard or a batch size.

    Args:
        rng: int64 [2], (seed, step), on the device that draws.
        stream: purpose of the draw.
        first_row: global row of the first one drawn.
        rows: number of rows.
        width: draws in a sample of a row.
        samples: samples of a row.
        dtype: dtype of the arithmetic and the draws.

    Returns:
        [rows * samples, width], with the samples of one row in adjacent rows.
    """
    blocks = -(-width // 4)
    words = device_words(rng, stream, first_row, rows, samples * blocks * 4)
    normals = device_box_muller(words.view(rows * samples, 2 * blocks, 2), dtype)
    return normals.view(rows * samples, 4 * blocks)[:, :width].contiguous()


def device_box_muller(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal pairs from pairs of random words (Box & Muller 1958).

    The uniform under the logarithm is float32 by definition, since near 1 its rounding decides the radius.

    Args:
        words: int64 [..., 2], each 0 .. 2^32 - 1: radius, then angle.
        dtype: dtype of the arithmetic and the normals.

    Returns:
        [..., 2], at most 6.8 in size.
    """
    radius_word, angle_word = words.unbind(-1)
    # The half-step of 2^-33 keeps the uniform in (0, 1] and its logarithm finite.
    uniform = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2.0 * uniform.to(dtype).log()).sqrt()
    # The nearest quarter turn is exact, and the rest is at most an eighth of a turn to either side, which float32 holds
    # with three bits more precision than the whole angle.
    quarter = (angle_word + 2**29) >> 30
    rest = (angle_word - (quarter << 30)).to(dtype) * (2.0 * math.pi * 2.0**-32)
    sine, cosine = rest.sin(), rest.cos()
    exchanged = (quarter & 1) != 0
    x, y = torch.where(exchanged, sine, cosine), torch.where(exchanged, cosine, sine)
    x = torch.where((quarter == 1) | (quarter == 2), -x, x)
    y = torch.where((quarter == 2) | (quarter == 3), -y, y)  # quarter 4 equals quarter 0
    return torch.stack((radius * x, radius * y), dim=-1)


def _host_binarize(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    rows, pixels = images.shape[0], math.prod(images.shape[1:])
    seed, step = rng.tolist()
    words = host_words(seed, stream, step, first_row, rows, -(-(pixels + TIE_BYTES) // 8))
    ones = host_threshold(images.reshape(rows, pixels).numpy(), words.view(np.uint8))
    return torch.from_numpy(ones).float().view(images.shape)


@torch.library.custom_op("gen_dist::binarize", mutates_args=())
def binarize_operator(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    """Operator of `binarize` for transformed code."""
    if runs_triton(rng.device):
        return _triton_binarize(images, rng, stream, first_row)
    return _host_binarize(images, rng, stream, first_row)


@binarize_operator.register_fake
def _(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    return torch.empty(images.shape, dtype=torch.float32, device=images.device)


# Bernoulli(v / 255) is drawn as `16-bit number < v * 257`, since 257 * 255 = 65535. The largest number is replaced by
# the one below it, so that a pixel of 255 is always 1, as a pixel of 0 is always 0.
TIE_BYTES = 64


def host_threshold(images: NDArray[np.uint8], noise: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Draw True with probability intensity / 255, from 8 random bits per pixel and 8 more for one pixel in 256.

    A 16-bit number with high byte h is below 257 v = 256 v + v if h < v, or if h = v and its low byte is below v. The
    case h = 255 can replace h = v: both have probability 1 / 256, and 255 is below no intensity. So the low byte is
    read for h = 255 alone; it comes from the row's last TIE_BYTES, by the pixel's index.

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
    """Definition of `binarize` on other devices, in torch operations that torch.compile fuses."""
    rows, pixels = images.shape[0], math.prod(images.shape[1:])
    pairs = device_words(rng, stream, first_row, rows, -(-pixels // 2))
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1).view(rows, -1)[:, :pixels]
    return device_threshold(images.reshape(rows, pixels), halves).view(images.shape)


def device_threshold(images: Tensor, noise: Tensor) -> Tensor:
    """Draw 1.0 with probability intensity / 255: uint8 images and int64 0 .. 65535, [rows, pixels] each, to float32."""
    return (noise.clamp(max=65534) < images.to(torch.int64) * 257).to(torch.float32)
