"""The PTX executor: instructions against their definitions, and refused programs."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kernels.ptx.executor import execute
from tests.kernels.ptx.program import PtxError, parse
from tests.kernels.ptx.trace import Trace


def module(body: str, parameters: int = 2, threads: int = 32) -> str:
    """Kernel with pointers in %rd0, %rd1, ..., the thread's number in %r0, and 4 and 8 times that in %rd10, %rd11."""
    names = [f"kernel_param_{index}" for index in range(parameters)]
    declared = ",\n".join(f".param .u64 {name}" for name in names)
    loads = "\n".join(f"ld.param.b64 %rd{index}, [{name}];" for index, name in enumerate(names))
    return f"""
.version 8.4
.target sm_90
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{declared}
)
.reqntid {threads}
{{
    .reg .b64 %rd<20>;
    {loads}
    mov.u32 %r0, %tid.x;  // a comment; with a semicolon
    mul.wide.u32 %rd10, %r0, 4;
    mul.wide.u32 %rd11, %r0, 8;
    {body}
    ret;
}}
"""


def run(
    body: str, *arguments: NDArray[Any] | int, threads: int = 32, grid: tuple[int, ...] = (1,), **options: Any
) -> Trace:
    return execute(parse(module(body, len(arguments), threads)), grid, arguments, **options)


def result_of(body: str, *operands: NDArray[Any], dtype: Any = np.uint32) -> NDArray[Any]:
    """Result of `body` in %r9 (32 bits) for operands in %r1, %r2, ..., with one thread for each of 32 elements."""
    loads = ""
    for index, _ in enumerate(operands, start=1):
        loads += f"add.s64 %rd12, %rd{index}, %rd10; ld.global.b32 %r{index}, [%rd12];"
    out = np.zeros(32, np.uint32)
    run(f"{loads} {body} add.s64 %rd12, %rd0, %rd10; st.global.b32 [%rd12], %r9;", out, *operands)
    return out.view(dtype)


def words(*values: int) -> NDArray[np.uint32]:
    """The given words, then random ones, 32 in all."""
    random = np.random.default_rng(0).integers(2**32, size=32, dtype=np.uint32)
    random[: len(values)] = values
    return random


def floats(*values: float) -> NDArray[np.float32]:
    random = np.random.default_rng(1).normal(size=32).astype(np.float32)
    random[: len(values)] = values
    return random


X, Y, Z = (
    words(0, 1, 0xFFFFFFFF, 0x80000000, 31, 32),
    words(1, 0xFFFFFFFF, 2, 33, 32, 31)[::-1].copy(),
    words()[::-1].copy(),
)


def signed(values: NDArray[np.uint32]) -> NDArray[np.int64]:
    return values.view(np.int32).astype(np.int64)


WIDE_X, WIDE_Y = X.astype(np.uint64), Y.astype(np.uint64)


def high_products(is_signed: bool) -> NDArray[np.uint64]:
    """Upper halves of (x, y) (y, z), pairs of low and high words, by Python's integers."""
    kind = np.int64 if is_signed else np.uint64
    first, second = (
        (low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))) for low, high in ((X, Y), (Y, Z))
    )
    products = (int(a) * int(b) for a, b in zip(first.view(kind), second.view(kind), strict=True))
    return np.array([(product >> 64) & (2**64 - 1) for product in products], np.uint64)


PAIRS = "mov.b64 %rd1, {%r1, %r2}; mov.b64 %rd2, {%r2, %r3};"

INTEGER_INSTRUCTIONS = {
    "add.s32 %r9, %r1, %r2;": X + Y,
    "sub.s32 %r9, %r1, %r2;": X - Y,
    "neg.s32 %r9, %r1;": np.uint32(0) - X,
    "mul.lo.s32 %r9, %r1, %r2;": X * Y,
    "mul.hi.u32 %r9, %r1, %r2;": (WIDE_X * WIDE_Y) >> np.uint64(32),
    "mul.hi.s32 %r9, %r1, %r2;": (signed(X) * signed(Y)) >> 32,
    "mul.wide.u32 %rd1, %r1, %r2; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r9, %rd1;": (WIDE_X * WIDE_Y) >> np.uint64(32),
    "mul.wide.s32 %rd1, %r1, %r2; mov.b64 {_, %r9}, %rd1;": (signed(X) * signed(Y)) >> 32,
    f"{PAIRS} mul.hi.u64 %rd1, %rd1, %rd2; mov.b64 {{_, %r9}}, %rd1;": high_products(False) >> np.uint64(32),
    f"{PAIRS} mul.hi.u64 %rd1, %rd1, %rd2; mov.b64 {{%r9, _}}, %rd1;": high_products(False) & np.uint64(0xFFFFFFFF),
    f"{PAIRS} mul.hi.s64 %rd1, %rd1, %rd2; mov.b64 {{_, %r9}}, %rd1;": high_products(True) >> np.uint64(32),
    f"{PAIRS} mul.hi.s64 %rd1, %rd1, %rd2; mov.b64 {{%r9, _}}, %rd1;": high_products(True) & np.uint64(0xFFFFFFFF),
    "mad.lo.s32 %r9, %r1, %r2, 7;": X * Y + np.uint32(7),
    "min.s32 %r9, %r1, %r2;": np.minimum(signed(X), signed(Y)),
    "max.u32 %r9, %r1, %r2;": np.maximum(X, Y),
    "and.b32 %r9, %r1, %r2;": X & Y,
    "or.b32 %r9, %r1, 0x80000001;": X | np.uint32(0x80000001),
    "xor.b32 %r9, %r1, -1;": ~X,
    "not.b32 %r9, %r1;": ~X,
    "lop3.b32 %r9, %r1, %r2, %r3, 0x96;": X ^ Y ^ Z,
    "lop3.b32 %r9, %r1, %r2, %r3, 0xEA;": (X & Y) | Z,
    "shl.b32 %r9, %r1, 5;": X << np.uint32(5),
    "shl.b32 %r9, %r1, 32;": X * 0,
    "shr.u32 %r9, %r1, 33;": X * 0,
    "shr.s32 %r9, %r1, 40;": signed(X) >> 31,
    "shr.s32 %r9, %r1, 3;": signed(X) >> 3,
    "shf.l.wrap.b32 %r9, %r1, %r2, 8;": (Y << np.uint32(8)) | (X >> np.uint32(24)),
    "shf.r.wrap.b32 %r9, %r1, %r2, 8;": (X >> np.uint32(8)) | (Y << np.uint32(24)),
    "bfe.u32 %r9, %r1, 4, 9;": (X >> np.uint32(4)) & np.uint32(511),
    "bfe.s32 %r9, %r1, 30, 2;": signed(X) >> 30,
    "prmt.b32 %r9, %r1, %r2, 0x5410;": (X & np.uint32(0xFFFF)) | (Y << np.uint32(16)),
    "prmt.b32 %r9, %r1, %r2, 0x7777;": (Y >> np.uint32(24)) * np.uint32(0x01010101),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;": signed(X) < signed(Y),
    "setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;": X < Y,
    "setp.ge.u32 %p1, %r1, %r2; not.pred %p2, %p1; selp.b32 %r9, %r1, %r2, %p2;": np.minimum(X, Y),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};": (X >> np.uint32(16)) | (X << np.uint32(16)),
    "cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r9, %rs1;": X.astype(np.uint16).view(np.int16).astype(np.int64),
    "cvt.s64.s32 %rd1, %r1; shr.u64 %rd1, %rd1, 40; cvt.u32.u64 %r9, %rd1;": (signed(X) >> 40) & 0xFFFFFF,
}


@pytest.mark.parametrize("instructions", INTEGER_INSTRUCTIONS)
def test_integer_instructions_follow_their_definition(instructions: str) -> None:
    expected = np.asarray(INTEGER_INSTRUCTIONS[instructions]).astype(np.int64).astype(np.uint32)
    np.testing.assert_array_equal(result_of(instructions, X, Y, Z), expected)


A, B = floats(0.0, -0.0, np.inf, np.nan, 2.0**-140, 3.0, np.nan), floats(1.0, 1.0, -np.inf, 1.0, 2.0, -7.0, np.nan)
PI = np.float32(np.pi)

FLOAT_INSTRUCTIONS = {
    "add.f32 %r9, %r1, %r2;": lambda: A + B,
    "sub.rn.f32 %r9, %r1, %r2;": lambda: A - B,
    "mul.f32 %r9, %r1, 0f40490FDB;": lambda: A * PI,
    "mul.ftz.f32 %r9, %r1, %r2;": lambda: np.where(np.abs(A) < 1e-38, np.float32(0), A) * B,
    "div.rn.f32 %r9, %r1, %r2;": lambda: A / B,
    "neg.f32 %r9, %r1;": lambda: -A,
    "abs.f32 %r9, %r1;": lambda: np.abs(A),
    "min.f32 %r9, %r1, %r2;": lambda: np.fmin(A, B),
    "max.NaN.f32 %r9, %r1, %r2;": lambda: np.maximum(A, B),
    "sqrt.approx.f32 %r9, %r3;": lambda: np.sqrt(np.abs(A)),
    "ex2.approx.ftz.f32 %r9, %r2;": lambda: np.exp2(B.astype(np.float64)).astype(np.float32),
    "rsqrt.approx.f32 %r9, %r3;": lambda: (1.0 / np.sqrt(np.abs(A).astype(np.float64))).astype(np.float32),
    "div.full.f32 %r9, %r1, %r2;": lambda: A / B,
    "lg2.approx.f32 %r9, %r3;": lambda: np.log2(np.abs(A).astype(np.float64)).astype(np.float32),
    "rcp.rn.f32 %r9, %r2;": lambda: np.float32(1) / B,
    "cvt.rn.f32.s32 %r9, %r4;": lambda: X.view(np.int32).astype(np.float32),
    "cvt.rn.f32.u32 %r9, %r4;": lambda: X.astype(np.float32),
    "setp.neu.f32 %p1, %r1, %r2; selp.f32 %r9, %r1, %r2, %p1;": lambda: np.where(A != B, A, B),
    "setp.ltu.f32 %p1, %r1, %r2; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda: ~(A >= B),
    "setp.nan.f32 %p1, %r1, %r2; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda: np.isnan(A) | np.isnan(B),
    "mov.b64 %rd1, {%r1, %r2}; mul.f32x2 %rd1, %rd1, %rd1; mov.b64 {_, %r9}, %rd1;": lambda: B * B,
    "cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r9, %rs1;": lambda: torch.from_numpy(A).bfloat16().float().numpy(),
    "cvt.rn.bf16.f32 %rs1, %r1; sub.rn.f32.bf16 %r9, %rs1, %r2;": lambda: (
        torch.from_numpy(A).bfloat16().float().numpy() - B
    ),
    "cvt.rn.f16.f32 %rs1, %r1; add.rn.f32.f16 %r9, %rs1, %r2;": lambda: A.astype(np.float16).astype(np.float32) + B,
}


@pytest.mark.parametrize("instructions", FLOAT_INSTRUCTIONS)
def test_float_instructions_follow_their_definition(instructions: str) -> None:
    with np.errstate(all="ignore"):
        expected = np.asarray(FLOAT_INSTRUCTIONS[instructions]()).astype(np.float32)
    np.testing.assert_array_equal(result_of(instructions, A, B, np.abs(A), X, dtype=np.float32), expected)


def test_floats_to_integers_round_as_asked_for_and_saturate() -> None:
    values = floats(2.5, -2.5, 3.5, 1e20, -1e20, np.nan)

    def converted(rounding: str, kind: str) -> list[int]:
        return result_of(
            f"cvt.{rounding}.{kind}.f32 %r9, %r1;", values, dtype=np.int32 if kind == "s32" else np.uint32
        )[:6].tolist()

    assert converted("rni", "s32") == [2, -2, 4, 2**31 - 1, -(2**31), 0]
    assert converted("rzi", "s32") == [2, -2, 3, 2**31 - 1, -(2**31), 0]
    assert converted("rmi", "s32") == [2, -3, 3, 2**31 - 1, -(2**31), 0]
    assert converted("rzi", "u32") == [2, 0, 3, 2**32 - 1, 0, 0]


def test_a_fused_multiply_add_rounds_once() -> None:
    # x y = 1 + 2^-11 + 2^-24 is half-way between two float32 numbers; any addend decides the rounding.
    root = 1 + 2.0**-12
    x, y, z = (
        floats(root, root, root, 1e30),
        floats(root, root, -root, 1e30),
        floats(2.0**-90, -(2.0**-90), 2.0**-90, -1.0),
    )
    results = result_of("fma.rn.f32 %r9, %r1, %r2, %r3;", x, y, z, dtype=np.float32)
    assert results[:3].tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11, -(1 + 2.0**-11)]
    assert results[3] == np.inf
    for index in range(4, 32):
        exact = Fraction(float(x[index])) * Fraction(float(y[index])) + Fraction(float(z[index]))
        neighbours = [np.nextafter(results[index], np.float32(side)) for side in (-np.inf, np.inf)]
        error = abs(exact - Fraction(float(results[index])))
        assert all(error <= abs(exact - Fraction(float(neighbour))) for neighbour in neighbours)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_conversions_to_halves_round_to_nearest_even(half: torch.dtype) -> None:
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[half]
    # Two floats in one register; the first operand goes to the high half.
    ties = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F801000, 0x3F803000, 0x00008000, 0x33000001, 0x7F7FFFFF], np.uint32
    )
    low, high = words(*ties).view(np.float32), words(*ties[::-1]).view(np.float32)
    packed = result_of(f"cvt.rn.{kind}x2.f32 %r9, %r2, %r1;", low, high)
    for part, values in ((packed & 0xFFFF, low), (packed >> 16, high)):
        expected = torch.from_numpy(values).to(half).view(torch.int16).numpy().view(np.uint16)
        number = ~np.isnan(values)
        np.testing.assert_array_equal(part[number], expected[number])
        assert (part[~number] == 0x7FFF).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_arithmetic_of_packed_halves_rounds_once(half: torch.dtype, name: str) -> None:
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[half]
    x, y = (torch.from_numpy(floats().repeat(2) * scale).to(half) for scale in (1.0, 0.37))
    results = result_of(
        f"{name}.{kind}x2 %r9, %r1, %r2;", *(v.view(torch.int32).numpy().view(np.uint32) for v in (x, y))
    )
    expected = getattr(torch, name)(x.double(), y.double()).to(half)
    assert torch.equal(torch.from_numpy(results.view(np.int32)).view(half), expected)


def test_packed_comparisons_give_a_predicate_for_each_half() -> None:
    x, y = torch.tensor([1.0, 2.0] * 32).bfloat16(), torch.tensor([2.0, 1.0] * 32).bfloat16()
    body = "setp.lt.bf16x2 %p1|%p2, %r1, %r2; selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; or.b32 %r9, %r3, %r4;"
    assert set(result_of(body, *(v.view(torch.int32).numpy().view(np.uint32) for v in (x, y)))) == {1}


SHUFFLES = {
    "bfly.b32 %r9, %r0, 5, 31": lambda lane: lane ^ 5,
    "idx.b32 %r9, %r0, 7, 31": lambda lane: 7,
    "up.b32 %r9, %r0, 3, 0": lambda lane: lane - 3 if lane >= 3 else lane,
    "down.b32 %r9, %r0, 3, 31": lambda lane: lane + 3 if lane < 29 else lane,
    # Segments of 8 lanes: 0x1807 = segment mask 24, clamp 7.
    "down.b32 %r9, %r0, 3, 0x1807": lambda lane: lane + 3 if lane % 8 < 5 else lane,
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffles_stay_within_a_warp_and_its_segments(shuffle: str) -> None:
    out = np.zeros(64, np.uint32)
    run(f"shfl.sync.{shuffle}, -1; add.s64 %rd12, %rd0, %rd10; st.global.b32 [%rd12], %r9;", out, threads=64)
    expected = [32 * (thread // 32) + SHUFFLES[shuffle](thread % 32) for thread in range(64)]
    assert out.tolist() == expected


def test_threads_that_part_meet_again() -> None:
    out = np.zeros(64, np.uint32)
    # Thread t adds 1 + 2 + ... + t in a loop of its own length; odd threads then add 1000 more.
    run(
        """
        mov.b32 %r1, 0; mov.b32 %r2, %r0;
        $again: setp.eq.b32 %p1, %r2, 0; @%p1 bra $done;
        add.s32 %r1, %r1, %r2; sub.s32 %r2, %r2, 1; bra.uni $again;
        $done: and.b32 %r3, %r0, 1; setp.eq.b32 %p2, %r3, 1; @!%p2 bra $even;
        add.s32 %r1, %r1, 1000;
        $even: bar.sync 0; mov.u32 %r4, %ctaid.x; mul.wide.u32 %rd1, %r4, 128; add.s64 %rd1, %rd1, %rd0;
        add.s64 %rd1, %rd1, %rd10; st.global.b32 [%rd1], %r1;
        """,
        out,
        grid=(2,),
    )
    expected = [thread * (thread + 1) // 2 + 1000 * (thread % 2) for thread in range(32)]
    assert out.tolist() == expected * 2


def test_predicated_instructions_leave_other_threads_alone() -> None:
    out = np.full(32, 9, np.uint32)
    trace = run(
        "setp.lt.u32 %p1, %r0, 20; add.s64 %rd1, %rd0, %rd10; @%p1 st.global.b32 [%rd1], %r0;",
        out,
    )
    assert out.tolist() == [*range(20), *[9] * 12]
    assert trace.counts(0, "store", out.nbytes).tolist() == [1] * 80 + [0] * 48


def test_the_trace_counts_bytes_and_widths() -> None:
    source, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    trace = run(
        """
        add.s64 %rd2, %rd1, %rd11; ld.global.v2.b32 {%r1, %r2}, [%rd2]; ld.global.b32 %r3, [%rd1+4];
        add.s64 %rd3, %rd0, %rd11; st.global.v2.b32 [%rd3], {%r1, %r2};
        """,
        out,
        source,
    )
    np.testing.assert_array_equal(out, source)
    assert trace.widths(1, "load") == {8: 32, 4: 32}
    assert trace.widths(0, "store") == {8: 32}
    assert trace.counts(1, "load", 256).tolist() == [1] * 4 + [33] * 4 + [1] * 248
    assert trace.counts(1, "store", 256).sum() == 0


def test_the_trace_counts_bytes_of_each_program_once() -> None:
    source, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    # Both programs read the first number with all threads, and each writes its own half of the output.
    trace = run(
        """
        ld.global.b32 %r1, [%rd1]; mov.u32 %r4, %ctaid.x; mul.wide.u32 %rd2, %r4, 128;
        add.s64 %rd2, %rd2, %rd0; add.s64 %rd2, %rd2, %rd10; st.global.b32 [%rd2], %r1;
        """,
        out,
        source,
        grid=(2,),
    )
    assert trace.counts(1, "load", 256)[:4].tolist() == [64] * 4
    assert trace.bytes_of_programs(1, "load") == 2 * 4
    assert trace.bytes_of_programs(0, "store") == 256


def test_reads_of_unwritten_registers_are_counted_and_poison() -> None:
    out = np.zeros(32, np.uint32)
    body = """
    setp.lt.u32 %p1, %r0, 30; @%p1 mov.b32 %r1, 5;
    add.s32 %r2, %r1, 1; add.s64 %rd1, %rd0, %rd10; st.global.b32 [%rd1], %r2;
    """
    trace = run(body, out, poison=0x1111)
    assert trace.undefined == {"%r1": 2}
    assert out.tolist() == [6] * 30 + [0x1112] * 2


# Instruction, its exact result, and its largest relative error as documented.
APPROXIMATE = [
    ("sqrt.approx.f32 %r2, 0f40400000;", 3.0**0.5, 2.0**-23),
    ("rsqrt.approx.ftz.f32 %r2, 0f40400000;", 3.0**-0.5, 2.0**-22.9),
    ("rcp.approx.f32 %r2, 0f40400000;", 1.0 / 3.0, 2.0**-23),
    ("div.full.f32 %r2, 0f3F800000, 0f40400000;", 1.0 / 3.0, 2.0**-22),
    ("ex2.approx.f32 %r2, 0f3F000000;", 2.0**0.5, 2.0**-22.5),
]


@pytest.mark.parametrize(("instruction", "exact", "documented"), APPROXIMATE)
def test_approximate_instructions_err_as_far_as_documented(instruction: str, exact: float, documented: float) -> None:
    out = np.zeros(32, np.float32)
    errors = []
    for approximation in (-1.0, 0.0, 1.0):
        run(f"{instruction} add.s64 %rd1, %rd0, %rd10; st.global.b32 [%rd1], %r2;", out, approximation=approximation)
        errors.append(float(out[0]) / exact - 1.0)
    assert errors[0] < errors[1] < errors[2]
    assert 0.5 * documented < max(map(abs, errors)) <= documented + 2.0**-24


SHARED_STORE = "cvt.u32.u64 %r1, %rd10; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2; st.shared.b32 [%r1], %r0;"
READ_OTHER_WARP = (
    "xor.b32 %r3, %r1, 128; ld.shared.b32 %r4, [%r3]; add.s64 %rd1, %rd0, %rd10; st.global.b32 [%rd1], %r4;"
)


def test_shared_memory_passes_values_between_warps_of_a_program() -> None:
    out = np.zeros(128, np.uint32)
    body = f"{SHARED_STORE} bar.sync 0; {READ_OTHER_WARP}".replace(
        "add.s64 %rd1, %rd0, %rd10;",
        "mov.u32 %r5, %ctaid.y; mul.wide.u32 %rd1, %r5, 256; add.s64 %rd1, %rd1, %rd0; add.s64 %rd1, %rd1, %rd10;",
    )
    run(body, out, threads=64, grid=(1, 2), shared_bytes=256)
    assert out.tolist() == [thread ^ 32 for thread in range(64)] * 2


REFUSED = {
    "out of bounds": "add.s64 %rd1, %rd0, %rd10; st.global.b32 [%rd1+4], %r0;",
    "bytes -4 to": "add.s64 %rd1, %rd0, %rd10; ld.global.b32 %r1, [%rd1+-4];",
    "off its alignment": "add.s64 %rd1, %rd0, %rd10; ld.global.v2.b32 {%r1, %r2}, [%rd1];",
    "pointer to no argument": "mov.b64 %rd1, 0; ld.global.b32 %r1, [%rd1];",
    "unknown instruction or modifier: add.rz": "add.rz.f32 %r1, %r0, %r0;",
    "unknown instruction or modifier: atom": "atom.global.add.u32 %r1, [%rd0], %r0;",
    "unknown instruction or modifier: add.cc": "add.cc.u32 %r1, %r0, %r0;",
    "unknown instruction or modifier: mul.f32.bf16": "mul.f32.bf16 %r1, %r0, %r0;",
    "unknown symbol elsewhere": "mov.b32 %r1, elsewhere;",
    "unknown label": "bra $nowhere;",
    "local memory": ".local .align 4 .b8 stack[16];",
    "wrong number of registers": "ld.global.v2.b32 {%r1}, [%rd0];",
    "read before it was written": "mov.b32 %r1, global_smem; ld.shared.b32 %r2, [%r1];",
    "no barrier since another warp wrote": f"{SHARED_STORE} {READ_OTHER_WARP}",
    "no barrier since another warp touched": f"{SHARED_STORE} bar.sync 0; {READ_OTHER_WARP} {SHARED_STORE}",
    "shared memory of 256 bytes": "mov.b32 %r1, 256; st.shared.b32 [%r1], %r0;",
    "barrier that not all": "setp.lt.u32 %p1, %r0, 3; @%p1 bra $on; bar.sync 0; $on: bar.sync 0;",
    "shuffle from a thread": "setp.lt.u32 %p1, %r0, 3; @%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;",
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_a_gpu_forbids_or_nobody_wrote_down_is_refused(problem: str) -> None:
    with pytest.raises(PtxError, match=problem):
        run(REFUSED[problem], np.zeros(64, np.uint32)[:64], threads=64, shared_bytes=256)


def test_inputs_cannot_be_written() -> None:
    frozen = np.zeros(32, np.uint32)
    frozen.flags.writeable = False
    with pytest.raises(PtxError, match="read-only"):
        run("st.global.b32 [%rd0], %r0;", frozen)


def test_a_pointer_has_the_alignment_of_its_array() -> None:
    memory = np.zeros(65, np.uint32)
    start = (-memory.ctypes.data // 4) % 2  # words until a multiple of 8 bytes
    body = "add.s64 %rd1, %rd0, %rd11; ld.global.v2.b32 {%r1, %r2}, [%rd1];"
    run(body, memory[start : start + 64], threads=32)
    with pytest.raises(PtxError, match="off its alignment"):
        run(body, memory[1 - start : 1 - start + 64], threads=32)
