"""The PTX executor on small kernels compiled by Triton, whose results are known."""

from fractions import Fraction
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is made for Linux alone")
import triton.language as tl  # noqa: E402

from gen_dist.kernels.triton_noise import Launch  # noqa: E402
from tests.kernels.calls import Call  # noqa: E402


@triton.jit
def scale_kernel(out_ptr, x_ptr, size, COUNT: tl.constexpr):
    """out = 3 x + 1, rounded to the type of out."""
    index = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, (x * 3.0 + 1.0).to(out_ptr.dtype.element_ty), mask=index < size)


@triton.jit
def product_sum_kernel(out_ptr, x_ptr, y_ptr, COUNT: tl.constexpr):
    """out = x y + x, which Triton contracts to one instruction."""
    index = tl.arange(0, COUNT)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, x * tl.load(y_ptr + index) + x)


@triton.jit
def row_sum_kernel(out_ptr, x_ptr, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """out[r] = sum of row r of float32 [ROWS, COUNT]."""
    offsets = tl.arange(0, ROWS)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    tl.store(out_ptr + tl.arange(0, ROWS), tl.sum(tl.load(x_ptr + offsets), axis=1))


@triton.jit
def transpose_kernel(out_ptr, x_ptr, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """out [COUNT, ROWS] = x [ROWS, COUNT] transposed, through shared memory."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COUNT)
    x = tl.load(x_ptr + row[:, None] * COUNT + column[None, :])
    tl.store(out_ptr + column[:, None] * ROWS + row[None, :], tl.trans(x))


@triton.jit
def running_total_kernel(out_ptr, x_ptr, size, COUNT: tl.constexpr):
    """out = the sum over rows of float32 [size, COUNT], in a loop whose length the compiler does not know."""
    index = tl.arange(0, COUNT)
    total = tl.zeros((COUNT,), tl.float32)
    for row in range(size):
        total += tl.load(x_ptr + row * COUNT + index)
    tl.store(out_ptr + index, total)


def launch(kernel: Any, grid: int, integers: dict[str, int], num_warps: int = 4, **constants: int) -> Launch:
    return Launch(kernel, (grid, 1), integers, dict(constants), num_warps)


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.float32, "sm_80"), (torch.bfloat16, "sm_80"), (torch.float16, "sm_90"), (torch.bfloat16, "sm_100")],
    ids=str,
)
def test_triton_elementwise_kernel_with_a_masked_tail(dtype: torch.dtype, target: str) -> None:
    size = 300
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(size, dtype=dtype)
    Call(launch(scale_kernel, 3, {"size": size}, COUNT=128), {"x_ptr": x}, {"out_ptr": out}).run(target)
    # The product of 3 and a number of eleven or eight binary digits is exact in float32; with 24 digits it rounds once.
    expected = (x.double() * 3.0 + 1.0).to(torch.float32).to(dtype)
    assert torch.equal(out, expected)


def test_triton_contracts_a_product_and_a_sum() -> None:
    x, y = (torch.randn(128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    out = torch.empty(128)
    Call(launch(product_sum_kernel, 1, {}, COUNT=128), {"x_ptr": x, "y_ptr": y}, {"out_ptr": out}).run("sm_90")
    for index, result in enumerate(out.tolist()):
        exact = Fraction(x[index].item()) * Fraction(y[index].item()) + Fraction(x[index].item())
        for side in (-torch.inf, torch.inf):
            neighbour = Fraction(torch.nextafter(out[index], torch.tensor(side)).item())
            assert abs(exact - Fraction(result)) <= abs(exact - neighbour)
    assert not torch.equal(out, x * y + x)  # otherwise the test would prove nothing


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_triton_sum_over_warps(target: str) -> None:
    x = torch.randint(-1000, 1000, (2, 1024), dtype=torch.int64).to(torch.float32)
    out = torch.empty(2)
    ran = Call(launch(row_sum_kernel, 1, {}, ROWS=2, COUNT=1024), {"x_ptr": x}, {"out_ptr": out}).run(target)
    assert ran.compiled.shared_bytes > 0
    assert torch.equal(out, x.sum(1))


@pytest.mark.parametrize(("dtype", "target"), [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90")], ids=str)
def test_triton_transpose_through_shared_memory(dtype: torch.dtype, target: str) -> None:
    x = torch.arange(32 * 64).view(32, 64).to(torch.int16).view(torch.bfloat16)
    x = x if dtype == torch.bfloat16 else torch.arange(32 * 64, dtype=torch.float32).view(32, 64)
    out = torch.empty(64, 32, dtype=dtype)
    Call(launch(transpose_kernel, 1, {}, ROWS=32, COUNT=64), {"x_ptr": x}, {"out_ptr": out}).run(target)
    integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(out.view(integer), x.view(integer).T)


def test_triton_loop() -> None:
    x = torch.randint(-9, 9, (7, 64)).to(torch.float32)
    out = torch.empty(64, dtype=torch.float32)
    Call(launch(running_total_kernel, 1, {"size": 7}, num_warps=2, COUNT=64), {"x_ptr": x}, {"out_ptr": out}).run(
        "sm_90"
    )
    assert torch.equal(out, x.sum(0))
