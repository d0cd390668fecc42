"""Device noise: keyed draws of all devices but CPUs, in torch operations that torch.compile fuses.

The words are Philox-4x32-10 (Salmon et al. 2011), functions of key and counter, so any row can be drawn alone. This is
the specification; kernels/triton_noise.py computes the same in Triton.
"""

import math

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


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


def device_binarize(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    """Definition of `binarize` on other devices, in torch operations that torch.compile fuses."""
    rows, pixels = images.shape[0], math.prod(images.shape[1:])
    pairs = device_words(rng, stream, first_row, rows, -(-pixels // 2))
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1).view(rows, -1)[:, :pixels]
    return device_threshold(images.reshape(rows, pixels), halves).view(images.shape)


def device_threshold(images: Tensor, noise: Tensor) -> Tensor:
    """Draw 1.0 with probability intensity / 255: uint8 images and int64 0 .. 65535, [rows, pixels] each, to float32."""
    return (noise.clamp(max=65534) < images.to(torch.int64) * 257).to(torch.float32)


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
