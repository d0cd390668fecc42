"""Keyed draws: standard normals and binarized images as functions of (seed, stream, step, global row).

`rng` is int64 [2] = (seed, step) on the device that draws, so that no Python number changes from step to step. On CPUs
each draw is one opaque operator under torch.compile, which is never hoisted, repeated or reordered. Eager code calls
the same function without the dispatcher, which costs more than the draw when its code is not in the cache.

Two definitions share this contract, each the fastest on its device. CPUs draw from NumPy's Philox-4x64-10 (Salmon et
al. 2011), a counter-based bit generator that takes a nanosecond per word and skips to any row. Other devices draw the
device noise: in torch operations (kernels/device_noise.py), or in Triton on devices that run it
(kernels/triton_noise.py).
"""

import importlib.util
import math
import threading
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .device_noise import device_binarize, device_normal
from .key import Key


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
            kept = step, _on_lines(torch.from_numpy(host_normal(seed, stream, steps, first_row, rows, width)))
            self._drawn[key] = kept
            self._drawn.move_to_end(key)
            if len(self._drawn) > self.STREAMS:
                self._drawn.popitem(last=False)
        return kept[1][step - kept[0]]


def _on_lines(drawn: Tensor) -> Tensor:
    """Copy draws [steps, rows, width] so that those of each step begin on a cache line, as the tensors of torch do.

    MKL's products of small matrices round by the place of a matrix in memory. Else a step's bits would depend on its
    place among the steps that are drawn together, and so on the step at which the run was resumed.
    """
    steps, rows, width = drawn.shape
    count = rows * width
    lines = torch.empty(steps, -(-count // _LINE_FLOATS) * _LINE_FLOATS)[:, :count]
    return lines.copy_(drawn.view(steps, count)).unflatten(1, (rows, width))


_LINE_FLOATS = 16
_LOOKAHEAD = _Lookahead()


class _HostPhilox(threading.local):
    """One NumPy bit generator per thread, set to any key and counter; creating one takes three times as long."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(key=0)
        self.state = self.generator.state
        self.counter, self.key = self.state["state"]["counter"], self.state["state"]["key"]

    def words(self, key: tuple[int, int], counter: tuple[int, int, int, int], count: int) -> np.ndarray:
        """First `count` words after a counter, uint64."""
        self.key[:] = key
        self.counter[:] = counter
        self.generator.state = self.state
        return self.generator.random_raw(count)


_HOST = _HostPhilox()


def host_words(seed: int, stream: int, step: int, first_row: int, rows: int, words_per_row: int) -> np.ndarray:
    """Random words of consecutive rows, drawn by NumPy's Philox-4x64-10.

    Row r is a function of (seed, stream, step, r, words_per_row) alone. It has counter blocks r * b + 1 to (r + 1) * b
    with b = ceil(words_per_row / 4), the step in the counter's third word, and (seed, stream) as the key.

    Returns:
        uint64 [rows, words_per_row].
    """
    blocks = -(-words_per_row // 4)
    words = _HOST.words((seed, stream), (first_row * blocks, 0, step, 0), rows * blocks * 4)
    return words.reshape(rows, blocks * 4)[:, :words_per_row]


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
