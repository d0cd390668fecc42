"""Philox counter-based random words (Salmon et al. 2011): functions of key and counter, so any row can be drawn alone.

Two definitions share one contract, each the fastest on its device: NumPy's Philox-4x64-10 bit generator on CPUs (a
nanosecond per word, with skips to any row), and Philox-4x32-10 in torch integer operations elsewhere.
"""

import threading

import numpy as np
import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


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


def device_words(rng: Tensor, stream: int, first_row: int, rows: int, words_per_row: int) -> Tensor:
    """Random words of consecutive rows by Philox-4x32-10 in torch operations, on any device and inside torch.compile.

    Counter = (word // 4, global row, stream, step), key = seed.

    Args:
        rng: int64 [2], (seed, step), on the device that draws.

    Returns:
        int64 [rows, words_per_row], each 0 .. 2^32 - 1.
    """
    blocks = -(-words_per_row // 4)
    block = torch.arange(blocks, device=rng.device, dtype=torch.int64)[None, :].expand(rows, blocks)
    row = (torch.arange(rows, device=rng.device, dtype=torch.int64)[:, None] + first_row).expand(rows, blocks) & _LOW_32
    words = philox_4x32_10(
        (block, row, torch.full_like(block, stream), (rng[1] & _LOW_32).expand(rows, blocks)),
        (rng[0] & _LOW_32, (rng[0] >> 32) & _LOW_32),
    )
    return torch.stack(words, dim=-1).reshape(rows, blocks * 4)[:, :words_per_row]


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold unsigned 32-bit words (Salmon et al. 2011, section 3.3).

    Equal to Random123's philox4x32 with 10 rounds, bit for bit.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps, but its 64 bits are those of the unsigned product; the masks drop the sign.
        high_product, low_product = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((low_product >> 32) & _LOW_32) ^ c1 ^ k0,
            low_product & _LOW_32,
            ((high_product >> 32) & _LOW_32) ^ c3 ^ k1,
            high_product & _LOW_32,
        )
        k0 = (k0 + 0x9E3779B9) & _LOW_32
        k1 = (k1 + 0xBB67AE85) & _LOW_32
    return c0, c1, c2, c3
