"""The kernels of group normalization, interpreted, against float64. Run by tests/kernels/test_group_norm_kernel.py.

It needs TRITON_INTERPRET=1 before Triton is imported, so its name keeps pytest from collecting it.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from gen_dist.kernels import group_norm, group_norm_layout, triton_group_norm, triton_group_norm_backward
from gen_dist.kernels.latent_layout import memory_format_of
from tests.kernels.interpreter import record_launches, round_bfloat16_to_nearest

assert triton.knobs.runtime.interpret, "run tests/kernels/test_group_norm_kernel.py"
round_bfloat16_to_nearest()

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-5
# Half a unit in the last place of a result, plus a margin for the float32 arithmetic before.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LIMITS = {  # WHOLE_ELEMENTS, STREAMED_ELEMENTS, MOST_SPANS; a part may have any number of elements
    "whole": (16_384, 4096, 64),
    "streamed": (64, 64, 64),
    "streamed in steps": (64, 64, 3),
}
SHAPES = {  # shape, groups
    "no pixels": ((3, 8), 2),
    "one dimension": ((2, 6, 20), 3),
    "image": ((2, 8, 8, 8), 4),
    "one group": ((2, 8, 5, 3), 1),
    "groups of one channel": ((2, 5, 7, 5), 5),
    "odd groups": ((1, 9, 5, 7), 3),
    "odd number of groups": ((2, 12, 4, 4), 3),
    "volume": ((1, 4, 3, 4, 5), 2),
}
QUICK = {"odd groups", "groups of one channel", "volume"}
CASES = [pytest.param(shape, marks=() if shape in QUICK else pytest.mark.slow) for shape in SHAPES]
LAST_CASES = [case for case in CASES if len(SHAPES[str(case.values[0])][0]) > 3]


@pytest.fixture(params=["whole", pytest.param("streamed", marks=pytest.mark.slow), "streamed in steps"])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Limits of the tiles, so that small maps as well take two launches, of several programs a group."""
    for name, limit in zip(("WHOLE_ELEMENTS", "STREAMED_ELEMENTS", "MOST_SPANS"), LIMITS[request.param], strict=True):
        monkeypatch.setattr(group_norm_layout, name, limit)
    monkeypatch.setattr(group_norm_layout, "PART_ELEMENTS", 1)
    return str(request.param)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=LAST[len(shape)]) if channels_last else values


def assert_equals_float64(
    maps: Tensor,
    groups: int,
    residual: Tensor | None = None,
    *,
    silu: bool = True,
    with_sums_gradient: bool = True,
    parameter_dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-6,
) -> None:
    """Assert that outputs, sums and all gradients equal those of float64, from the same rounded inputs."""
    channels, dtype = maps.shape[1], maps.dtype
    weight = (1 + 0.5 * draw((channels,), 3, torch.float32)).to(parameter_dtype)
    bias = draw((channels,), 4, parameter_dtype)
    outputs, sums, statistics = triton_group_norm.forward(maps, residual, weight, bias, groups, EPS, silu)
    if residual is None:
        assert sums is None
        sums = maps
    else:
        assert sums is not None
        torch.testing.assert_close(sums, (maps.float() + residual.float()).to(dtype), rtol=0, atol=0)
    wide = [each.double().requires_grad_() for each in (sums, weight, bias)]
    expected = F.group_norm(wide[0], groups, wide[1], wide[2], EPS)
    expected = F.silu(expected) if silu else expected
    assert outputs.dtype == dtype
    assert outputs.stride() == maps.stride()
    torch.testing.assert_close(outputs.double(), expected, rtol=ROUNDING[dtype], atol=tolerance)

    gradient = draw(tuple(maps.shape), 5, dtype).contiguous(memory_format=memory_format_of(maps))
    sums_gradient = 0.5 * gradient if residual is not None and with_sums_gradient else None
    found = triton_group_norm_backward.backward(gradient, sums_gradient, sums, weight, bias, statistics, groups, silu)
    references = list(torch.autograd.grad(expected, wide, gradient.double()))
    if sums_gradient is not None:
        references[0] = references[0] + sums_gradient.double()
    for one, other, like in zip(found, references, (maps, weight, bias), strict=True):
        assert one.dtype == like.dtype
        assert one.stride() == like.stride()
        # Sums of terms that cancel are as exact as their largest term.
        size = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=ROUNDING[like.dtype], atol=tolerance * size)


@pytest.mark.parametrize("shape", CASES)
def test_kernels_equal_float64_in_every_shape(limits: str, shape: str) -> None:
    sizes, groups = SHAPES[shape]
    assert_equals_float64(draw(sizes, 1, torch.float32), groups)


@pytest.mark.parametrize("shape", LAST_CASES)
def test_kernels_equal_float64_in_channels_last(limits: str, shape: str) -> None:
    sizes, groups = SHAPES[shape]
    assert_equals_float64(draw(sizes, 1, torch.float32, channels_last=True), groups)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(limits: str, dtype: torch.dtype, parameter_dtype: torch.dtype | None) -> None:
    maps = draw((1, 8, 4, 5), 1, dtype, channels_last=dtype == torch.bfloat16)
    assert_equals_float64(maps, 2, parameter_dtype=parameter_dtype or dtype)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_sums_gradient", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_kernels_add_the_residual_before_the_norm(limits: str, silu: bool, with_sums_gradient: bool) -> None:
    dtype = torch.float32 if silu else torch.bfloat16
    maps, residual = (draw((1, 8, 6, 5), seed, dtype, channels_last=silu) for seed in (1, 2))
    assert_equals_float64(maps, 2, residual, silu=silu, with_sums_gradient=with_sums_gradient)


def test_a_mean_far_above_the_deviation_is_right(limits: str) -> None:
    """Mean squares minus squared means would lose all of the variance; a float32 mean alone, half of the digits."""
    maps = 1e3 + 1e-2 * draw((1, 4, 8, 6), 1, torch.float32)
    weight, bias = torch.ones(4), torch.zeros(4)
    outputs, _, statistics = triton_group_norm.forward(maps, None, weight, bias, 2, 1e-12, False)
    wide = maps.double().requires_grad_()
    expected = F.group_norm(wide, 2, eps=1e-12)
    torch.testing.assert_close(outputs.double(), expected, rtol=2e-6, atol=4e-6)
    gradient = draw((1, 4, 8, 6), 2, torch.float32)
    found = triton_group_norm_backward.backward(gradient, None, maps, weight, bias, statistics, 2, False)[0]
    (reference,) = torch.autograd.grad(expected, wide, gradient.double())
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


def test_parts_of_different_means_are_merged(limits: str) -> None:
    """Spans of a group differ by more than they vary within."""
    ramp = torch.linspace(-100, 100, 96).view(1, 1, 12, 8) + 1e-3 * draw((1, 4, 12, 8), 1, torch.float32)
    assert_equals_float64(ramp, 2, tolerance=1e-5)


def test_nan_spoils_its_group_alone(limits: str) -> None:
    maps = draw((2, 4, 6, 5), 1, torch.float32)
    maps[1, 2, 3, 4] = float("nan")
    weight, bias = torch.ones(4), torch.zeros(4)
    outputs, _, statistics = triton_group_norm.forward(maps, None, weight, bias, 2, EPS, True)
    spoilt = torch.zeros(2, 4, dtype=torch.bool)
    spoilt[1, 2:] = True
    assert torch.equal(outputs.isnan().all(3).all(2), spoilt)
    assert torch.equal(outputs.isnan().any(3).any(2), spoilt)
    gradients = triton_group_norm_backward.backward(maps.nan_to_num(), None, maps, weight, bias, statistics, 2, True)
    assert torch.equal(gradients[0].isnan().all(3).all(2), spoilt)
    assert torch.equal(gradients[0].isnan().any(3).any(2), spoilt)
    for gradient in gradients[1:]:
        assert torch.equal(gradient.isnan(), spoilt.any(0))


def test_equal_maps_give_the_bias_and_wild_ones_are_finite(limits: str) -> None:
    maps = torch.full((1, 4, 6, 5), 0.1)
    maps[:, 2:] = 1e4 * draw((1, 2, 6, 5), 1, torch.float32)
    weight, bias = torch.full((4,), 50.0), torch.tensor([0.5, -0.5, 0.5, -0.5])
    outputs, _, _ = triton_group_norm.forward(maps, None, weight, bias, 2, EPS, True)
    torch.testing.assert_close(outputs[:, :2], F.silu(bias[None, :2, None, None]).expand(1, 2, 6, 5), atol=1e-3, rtol=0)
    assert outputs.isfinite().all()
    assert_equals_float64(200 * maps[:, 2:], 1, tolerance=1e-5)


def test_a_shard_of_images_has_the_bits_of_the_whole(limits: str) -> None:
    maps, weight, bias = draw((3, 4, 6, 5), 1, torch.float32), torch.ones(4), torch.zeros(4)

    def outputs_and_gradient(first: int, last: int) -> tuple[Tensor, Tensor]:
        shard = maps[first:last]
        outputs, _, statistics = triton_group_norm.forward(shard, None, weight, bias, 2, EPS, True)
        gradients = triton_group_norm_backward.backward(shard, None, shard, weight, bias, statistics, 2, True)
        return outputs, gradients[0]

    shards = zip(outputs_and_gradient(0, 1), outputs_and_gradient(1, 3), strict=True)
    for whole, parts in zip(outputs_and_gradient(0, 3), shards, strict=True):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("make", [lambda maps: maps, lambda maps: maps.transpose(2, 3)], ids=["dense", "transposed"])
def test_the_operator_runs_and_differentiates_the_kernels(
    monkeypatch: pytest.MonkeyPatch, with_residual: bool, make: Callable[[Tensor], Tensor]
) -> None:
    def outputs_and_gradients() -> list[Tensor]:
        leaf = draw((2, 4, 3, 5), 1, torch.float32, channels_last=with_residual).requires_grad_()
        residual = draw((2, 4, 3, 5), 2, torch.float32).requires_grad_()
        weight, bias = (torch.linspace(-1, 2, 8)[::2].requires_grad_() for _ in range(2))
        arguments = (make(leaf), *([make(residual)] if with_residual else []), weight, bias, 2, EPS, True)
        operator = group_norm.add_group_norm_silu_operator if with_residual else group_norm.group_norm_silu_operator
        outputs = operator(*arguments)[:-1]
        loss = sum((output * torch.linspace(-1, 1, 120).view(output.shape)).sum() for output in outputs)
        leaves = [leaf, residual, weight, bias] if with_residual else [leaf, weight, bias]
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    expected = outputs_and_gradients()
    monkeypatch.setattr(group_norm, "runs_triton", lambda device: True)
    launched = record_launches(monkeypatch, (triton_group_norm, "forward"), (triton_group_norm_backward, "backward"))
    found = outputs_and_gradients()
    assert launched == ["forward", "backward"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
        assert one.stride() == other.stride()
