"""Device noise in Triton: Philox words, standard normals of a tile, and the kernels behind `normal` and `binarize`.

The specification is in kernels/device_noise.py. Every draw is a function of its counter, so tiles of any shape and
position give the same bits, and a backward pass can redraw the noise of the forward pass.
"""

# Device code is typed by Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel and all arguments of its launch except pointers: a pure function of shapes, dtype and memory format.

    Training and ahead-of-time compilation in tests use the same launches, so the tested kernels are those that run.

    Attributes:
        kernel: the @triton.jit function.
        grid: programs in x and y.
        integers: the kernel's run-time integers by name; Triton does not specialize on them.
        constants: its constexpr arguments by name.
        num_warps: warps per program.
    """

    kernel: triton.JITFunction
    grid: tuple[int, int]
    integers: dict[str, int]
    constants: dict[str, int | float | bool]
    num_warps: int

    def __call__(self, **pointers: Tensor | None) -> None:
        """Run the kernel on these tensors of one device by argument name; None for those not used."""
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(next(tensor for tensor in pointers.values() if tensor is not None)):
            self.kernel[self.grid](**pointers, **self.integers, **self.constants, num_warps=self.num_warps)


@dataclass(frozen=True)
class Tile:
    """Elements of one program: ROWS x COLUMNS, with VECTOR adjacent elements (16 bytes) in a thread."""

    rows: int
    columns: int
    vector: int
    num_warps: int

    def grid(self, rows: int, width: int) -> tuple[int, int]:
        """Number of programs in x and y that cover [rows, width]."""
        return -(-rows // self.rows), -(-width // self.columns)

    def constants(self) -> dict[str, int | float | bool]:
        """The tile as the kernels' constexpr arguments."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "VECTOR": self.vector}


WIDEST_TILE = 1024


def tile_of(width: int, dtype: torch.dtype, warp_size: int, thread_elements: int = 8) -> Tile:
    """Tile for rows of `width` elements.

    It does not depend on the number of rows, so the sums of a row have the same bits in a shard as in the whole batch.
    Rows of up to 256 elements lie within one warp, whose sums need no shared memory.

    Args:
        width: elements of a row.
        dtype: dtype of the elements in memory.
        warp_size: threads of a warp.
        thread_elements: elements per thread. Eight are one access of 16 bytes in half precision and two in
            float32; fewer need fewer registers.
    """
    vector = 16 // dtype.itemsize
    columns = max(vector, min(1 << (width - 1).bit_length(), WIDEST_TILE))
    warp_elements = warp_size * thread_elements
    num_warps = max(1, columns // warp_elements)
    return Tile(warp_elements * num_warps // columns, columns, vector, num_warps)


def warp_size_of(device: torch.device) -> int:
    """Threads of a warp: 32 on NVIDIA's GPUs, 32 or 64 on AMD's."""
    size: int = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return size


@triton.jit
def philox_4x32_10(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox-4x32 (Salmon et al. 2011, section 3.3) on uint32 counters c0 .. c3 with the key k0, k1.

    Products of 64 bits compile to one wide multiplication; separate high and low halves would take two.
    """
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        third = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (third >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = third.to(tl.uint32)
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = first.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_word, angle_word):
    """Transform two uint32 words to two standard normals, at most 6.8 in size (Box & Muller 1958).

    tl.sin and tl.cos reduce their argument on a slow path through local memory. Here the angle is already a fraction of
    a turn: its nearest quarter turn is an exchange and two signs, and the rest, at most an eighth of a turn to either
    side, is a polynomial. Coefficients: minimax fits of sin and cos of (pi / 2) f on |f| <= 1/2.
    """
    # 2^-32 w is exact, so a fused multiply-add and two separate operations give the same bits.
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(uniform))

    fraction = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    square = fraction * fraction
    sine = -0.00460165785625577 * square + 0.07968003302812576
    sine = sine * square - 0.6459634900093079
    sine = (sine * square + 1.5707963705062866) * fraction
    cosine = 0.0009036316769197583 * square - 0.02086007222533226
    cosine = cosine * square + 0.25366920232772827
    cosine = cosine * square - 1.2337005138397217
    cosine = cosine * square + 1.0

    # After adding an eighth of a turn, the two top bits are the number of the nearest quarter turn.
    quarter = tl.add(angle_word, 0x20000000, sanitize_overflow=False)
    exchanged = (quarter & 0x40000000) != 0
    x = tl.where(exchanged, sine, cosine).to(tl.uint32, bitcast=True)
    y = tl.where(exchanged, cosine, sine).to(tl.uint32, bitcast=True)
    x ^= (quarter ^ (quarter << 1)) & 0x80000000  # negative in quarters 1 and 2
    y ^= quarter & 0x80000000  # and in quarters 2 and 3
    return radius * x.to(tl.float32, bitcast=True), radius * y.to(tl.float32, bitcast=True)


@triton.jit
def four_normals(block, row, stream, step, k0, k1):
    """Draw the four standard normals of each counter (block, row, stream, step)."""
    w0, w1, w2, w3 = philox_4x32_10(block, row, stream, step, k0, k1)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def key_and_step(rng_ptr):
    """Load the low and high half of the seed and the step, uint32 each, from int64 [2] = (seed, step)."""
    seed = tl.load(rng_ptr).to(tl.uint64, bitcast=True)
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), step


@triton.jit
def noise_tile(
    rng_ptr,
    row,
    first_block,
    stream,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Draw standard normals of a tile, float32 [ROWS, COLUMNS].

    The thread that holds VECTOR adjacent elements in a 16-byte access draws them, so no data move between threads.

    Args:
        rng_ptr: int64 [2], (seed, step).
        row: global rows [ROWS], any integers, taken modulo 2^32.
        first_block: counter block of column 0.
        stream: stream of the noise.
        ROWS: rows of the tile.
        COLUMNS: columns of the tile, a multiple of VECTOR.
        VECTOR: 4 or 8.
    """
    k0, k1, step = key_and_step(rng_ptr)
    shape: tl.constexpr = (ROWS, COLUMNS // VECTOR)
    group = tl.arange(0, COLUMNS // VECTOR) * (VECTOR // 4) + first_block
    block = tl.broadcast_to(group.to(tl.uint32)[None, :], shape)
    row = tl.broadcast_to(row.to(tl.uint32)[:, None], shape)
    stream = tl.full(shape, 0, tl.uint32) + stream.to(tl.uint32)
    step = tl.full(shape, 0, tl.uint32) + step
    n0, n1, n2, n3 = four_normals(block, row, stream, step, k0, k1)
    if VECTOR == 4:
        noise = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    else:
        n4, n5, n6, n7 = four_normals(block + 1, row, stream, step, k0, k1)
        noise = tl.join(
            tl.join(tl.join(n0, n4), tl.join(n2, n6)),
            tl.join(tl.join(n1, n5), tl.join(n3, n7)),
        )
    return tl.reshape(noise, (ROWS, COLUMNS))


@triton.jit
def place_of_tile(rows, first_row, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First column and global rows [ROWS] of a program's tile of [rows, WIDTH], and for its elements [ROWS, COLUMNS]
    the offsets in memory and a mask, True within the tensor."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return first_column, row + first_row, row.to(tl.int64)[:, None] * WIDTH + column[None, :], inside


@triton.jit(do_not_specialize=["rows", "first_row", "noise_stream"])
def normal_kernel(
    normals_ptr,
    rng_ptr,
    rows,
    first_row,
    noise_stream,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write standard normals, float32 [rows, WIDTH]; a program writes one tile.

    The stream of the noise is named `noise_stream`, since Triton reserves `stream` for that of the launch.
    """
    first_column, row, offset, inside = place_of_tile(rows, first_row, WIDTH, ROWS, COLUMNS)
    noise = noise_tile(rng_ptr, row, first_column // 4, noise_stream, ROWS, COLUMNS, VECTOR)
    tl.store(normals_ptr + offset, noise, mask=inside)


def normal_launch(stream: int, first_row: int, rows: int, width: int, *, warp_size: int = 32) -> Launch:
    """Launch of `normal_kernel` for float32 [rows, width], neither of them 0. Pointers: normals, rng."""
    return _launch_of_tiles(normal_kernel, tile_of(width, torch.float32, warp_size), stream, first_row, rows, width)


def _launch_of_tiles(
    kernel: triton.JITFunction, tile: Tile, stream: int, first_row: int, rows: int, width: int
) -> Launch:
    return Launch(
        kernel=kernel,
        grid=tile.grid(rows, width),
        integers={"rows": rows, "first_row": first_row, "noise_stream": stream},
        constants={"WIDTH": width, **tile.constants()},
        num_warps=tile.num_warps,
    )


def normal(rng: Tensor, stream: int, first_row: int, rows: int, width: int) -> Tensor:
    """Draw `kernels.normal` with the kernel, on the device of `rng`."""
    normals = torch.empty((rows, width), dtype=torch.float32, device=rng.device)
    if normals.numel():
        launch = normal_launch(stream, first_row, rows, width, warp_size=warp_size_of(rng.device))
        launch(normals_ptr=normals, rng_ptr=rng)
    return normals


@triton.jit
def halves_tile(rng_ptr, row, first_block, stream, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Draw random 16-bit numbers of a tile, uint32 [ROWS, COLUMNS]: low, then high halves of its counters' words.

    One thread draws eight adjacent numbers. Arguments are as in `noise_tile`, with eight numbers per counter.
    """
    k0, k1, step = key_and_step(rng_ptr)
    shape: tl.constexpr = (ROWS, COLUMNS // 8)
    group = tl.arange(0, COLUMNS // 8) + first_block
    w0, w1, w2, w3 = philox_4x32_10(
        tl.broadcast_to(group.to(tl.uint32)[None, :], shape),
        tl.broadcast_to(row.to(tl.uint32)[:, None], shape),
        tl.full(shape, 0, tl.uint32) + stream.to(tl.uint32),
        tl.full(shape, 0, tl.uint32) + step,
        k0,
        k1,
    )
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))


@triton.jit(do_not_specialize=["rows", "first_row", "noise_stream"])
def binarize_kernel(
    binary_ptr,
    images_ptr,
    rng_ptr,
    rows,
    first_row,
    noise_stream,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write 1.0 with the probability intensity / 255, else 0.0, for uint8 [rows, WIDTH]; a program writes one tile."""
    first_column, row, offset, inside = place_of_tile(rows, first_row, WIDTH, ROWS, COLUMNS)
    intensity = tl.load(images_ptr + offset, mask=inside, other=0).to(tl.uint32)
    halves = halves_tile(rng_ptr, row, first_column // VECTOR, noise_stream, ROWS, COLUMNS)
    ones = tl.minimum(halves, 65534) < intensity * 257
    tl.store(binary_ptr + offset, ones.to(tl.float32), mask=inside)


def binarize_launch(stream: int, first_row: int, rows: int, width: int, *, warp_size: int = 32) -> Launch:
    """Launch of `binarize_kernel` for uint8 [rows, width], neither of them 0. Pointers: binary, images, rng."""
    tile = tile_of(width, torch.uint16, warp_size)  # eight draws of 16 bits per thread
    return _launch_of_tiles(binarize_kernel, tile, stream, first_row, rows, width)


def binarize(images: Tensor, rng: Tensor, stream: int, first_row: int) -> Tensor:
    """Draw `kernels.binarize` with the kernel, on the device of `rng`."""
    images = images.contiguous()
    binary = torch.empty_like(images, dtype=torch.float32)
    if binary.numel():
        rows, width = len(images), images[0].numel()
        launch = binarize_launch(stream, first_row, rows, width, warp_size=warp_size_of(rng.device))
        launch(binary_ptr=binary, images_ptr=images, rng_ptr=rng)
    return binary
