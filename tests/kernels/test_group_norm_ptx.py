"""Group normalization kernels compiled for GPUs, executed on the CPU, against float64: both passes of every kernel.

The tolerances are in tests/kernels/group_norm_reference.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from gen_dist.kernels import group_norm_layout, triton_group_norm
from tests.kernels.accuracy import assert_close
from tests.kernels.calls import Call
from tests.kernels.group_norm_calls import EPS, QUICK_CASES, Case, Inputs, run_passes
from tests.kernels.group_norm_offsets import check_last_image, lazily_zero, run_last_program
from tests.kernels.group_norm_reference import ERROR, check_passes

CUDA = ("sm_80", "sm_90", "sm_100")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
EVERY_ERROR = (0.0, -1.0, 1.0)
WHOLE, STREAMED = QUICK_CASES[0], Case((1, 4, 70, 70), 2)


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_kernels_for_sm_90_equal_float64(case: Case) -> None:
    check_passes(Inputs.of(case), "sm_90", approximations=EVERY_ERROR)


@pytest.mark.parametrize(("case", "target"), [(QUICK_CASES[2], "sm_80"), (QUICK_CASES[4], "sm_100")], ids=str)
def test_kernels_for_other_gpus_equal_float64(case: Case, target: str) -> None:
    check_passes(Inputs.of(case), target, approximations=EVERY_ERROR)


def every_case() -> Iterator[Case]:
    """Every dtype, layout and option, at sizes from groups of one pixel to several programs a group."""
    shapes = [
        ((3, 6, 1, 1), 3),
        ((2, 5, 3, 3), 5),
        ((2, 32, 8, 8), 2),
        ((2, 24, 9, 7), 4),
        ((1, 12, 2, 5, 3), 2),
        ((1, 4, 70, 70), 2),
        ((1, 6, 3, 41, 43), 1),
        ((1, 2, 150, 113), 2),
    ]
    options: list[dict[str, Any]] = [{}, {"misaligned": True, "residual": True}]
    for (shape, groups), dtype, channels_last, option in product(shapes, DTYPES, (False, True), options):
        yield replace(Case(shape, groups, dtype, channels_last), **option)
    for (shape, groups), dtype, channels_last in product(shapes[3::2], DTYPES, (False, True)):
        yield Case(shape, groups, dtype, channels_last, silu=False, parameters=BFLOAT16)
        yield Case(shape, groups, dtype, channels_last, residual=True, parameters=FLOAT16)


def every_target(case: Case) -> tuple[str, ...]:
    """GPUs for which a case is compiled: the largest maps take half a minute each."""
    return CUDA if case.pixels < 10_000 else ("sm_90",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "target"), [(case, target) for case in every_case() for target in every_target(case)], ids=str
)
def test_every_compiled_kernel_equals_float64(case: Case, target: str) -> None:
    check_passes(Inputs.of(case), target, approximations=EVERY_ERROR)


@pytest.mark.parametrize("case", [WHOLE, STREAMED], ids=str)
def test_a_large_mean_costs_no_digits(case: Case) -> None:
    check_passes(Inputs.of(replace(case, offset=1e3, deviation=1e-2)), "sm_90")


@pytest.mark.parametrize(
    "channels_last", [pytest.param(False, marks=pytest.mark.slow), True], ids=["contiguous", "channels_last"]
)
def test_programs_that_take_several_tiles_equal_float64(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm_layout, "WHOLE_ELEMENTS", 256)
    monkeypatch.setattr(group_norm_layout, "STREAMED_ELEMENTS", 256)
    monkeypatch.setattr(group_norm_layout, "MOST_SPANS", 3)
    # Of 9 tiles a group, the last is nearly empty; the last program has fewer tiles than the others or less in them.
    inputs = Inputs.of(Case((2, 6, 19, 29), 3, channels_last=channels_last, offset=5.0))
    passes = run_passes(inputs, "sm_90")
    assert len(passes.forward) == 2
    check_passes(inputs, "sm_90")


@pytest.mark.parametrize("case", [WHOLE, STREAMED], ids=str)
def test_nan_stays_in_its_group(case: Case) -> None:
    inputs = Inputs.of(case)
    inputs.maps[0, 1, 2, 3] = torch.nan
    tensors = run_passes(inputs, "sm_90").tensors
    channels = case.shape[1] // case.groups
    for name in ("outputs_ptr", "maps_gradient_ptr"):
        broken = tensors[name].isnan()
        assert broken[0, :channels].all()
        assert not broken[0, channels:].any() and not broken[1:].any()
    for name in ("weight_gradient_ptr", "bias_gradient_ptr"):
        assert tensors[name].isnan().tolist() == [channel < channels for channel in range(case.shape[1])]


@pytest.mark.parametrize("case", [WHOLE, replace(STREAMED, shape=(2, 4, 70, 70))], ids=str)
def test_a_shard_of_images_has_the_bits_of_the_whole(case: Case) -> None:
    whole = Inputs.of(case)
    tensors = run_passes(whole, "sm_90").tensors
    shard = replace(
        whole,
        case=replace(case, shape=(1, *case.shape[1:])),
        maps=whole.maps[1:],
        outputs_gradient=whole.outputs_gradient[1:],
    )
    part = run_passes(shard, "sm_90").tensors
    for name in ("outputs_ptr", "statistics_ptr", "maps_gradient_ptr"):
        assert torch.equal(part[name], tensors[name][1:])


def test_offsets_of_images_pass_32_bits() -> None:
    check_last_image()


@pytest.mark.slow
def test_offsets_within_an_image_pass_32_bits() -> None:
    case = Case((1, 64, 4096, 8193), 32, BFLOAT16)
    assert case.elements > 2**31
    maps = lazily_zero(case)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(1e-3).to(case.dtype)
    maps.view(-1)[-1000:] = values
    launches = triton_group_norm.forward_launches(maps, case.groups, EPS, case.silu)
    parts = triton_group_norm.forward_parts(maps, case.groups, launches)
    assert parts is not None
    weight, bias = torch.linspace(0.5, 1.5, 64), torch.linspace(-1.0, 1.0, 64)
    call = Call(
        launches[1],
        # Groups of mean 0 and variance 0: only eps is in the denominator.
        {"maps_ptr": maps, "parts_ptr": parts.zero_(), "weight_ptr": weight, "bias_ptr": bias},
        {"outputs_ptr": lazily_zero(case), "statistics_ptr": torch.zeros(1, case.groups, 3)},
    )
    before = values.double() * EPS**-0.5 * weight[-1] + bias[-1]
    outputs = run_last_program(call).view(-1)[-1000:]
    assert_close(outputs, before * before.sigmoid(), 1.0 + before.abs(), ERROR)
