"""Registered operators of group normalization on CPU tensors, where they run the kernels' twins."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from gen_dist.kernels.group_norm import (
    add_group_norm_silu_operator,
    group_norm_silu_backward_operator,
    group_norm_silu_double_backward_operator,
    group_norm_silu_operator,
)
from gen_dist.kernels.group_norm_twin import double_backward, twin_backward, twin_forward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-5
SHAPES: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "no pixels": ((3, 6), torch.contiguous_format),
    "no images": ((0, 6, 2, 2), torch.contiguous_format),
    "image": ((2, 6, 3, 4), torch.contiguous_format),
    "channels_last": ((2, 6, 3, 4), torch.channels_last),
    "channels_last_3d": ((1, 4, 3, 2, 2), torch.channels_last_3d),
}

QUICK = {("no pixels", False), ("image", False), ("channels_last", True)}
"""Operators that `make test` checks."""


def draw(shape: tuple[int, ...], memory_format: torch.memory_format, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=memory_format)


def inputs(shape: str, dtype: torch.dtype, with_residual: bool) -> list[Tensor]:
    """Maps, the residual if there is one, weight and bias."""
    sizes, memory_format = SHAPES[shape]
    maps = [draw(sizes, memory_format, seed, dtype) for seed in range(1 + with_residual)]
    parameters = [draw(sizes[1:2], torch.contiguous_format, seed, dtype) for seed in (3, 4)]
    return [each.requires_grad_() for each in (*maps, *parameters)]


@pytest.mark.parametrize(
    ("shape", "dtype", "with_residual"),
    [
        pytest.param(shape, dtype, with_residual, marks=() if (shape, with_residual) in QUICK else pytest.mark.slow)
        for shape, dtype in [
            *((shape, torch.float32) for shape in SHAPES),
            ("channels_last", torch.bfloat16),
            ("image", torch.float64),
        ]
        for with_residual in (False, True)
    ],
    ids=str,
)
def test_operators_pass_opcheck(shape: str, dtype: torch.dtype, with_residual: bool) -> None:
    leaves = inputs(shape, dtype, with_residual)
    operator: Any = add_group_norm_silu_operator if with_residual else group_norm_silu_operator
    torch.library.opcheck(operator, (*leaves, 2, EPS, True))
    *_, statistics = operator(*leaves, 2, EPS, True)
    maps, *rest = (leaf.detach() for leaf in leaves)
    sums_gradient = maps.clone().requires_grad_() if with_residual else None
    differentiated = (maps.clone().requires_grad_(), sums_gradient, *(leaves[0], *leaves[-2:]))
    torch.library.opcheck(group_norm_silu_backward_operator, (*differentiated, statistics.detach(), 2, True))
    cotangents = (maps.clone(), *(None if with_residual else each.clone() for each in rest[-2:]))
    arguments = (*cotangents, maps.clone(), maps, *rest[-2:], statistics.detach(), 2, True)
    torch.library.opcheck(group_norm_silu_double_backward_operator, arguments)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "no images"])
def test_gradients_and_theirs_pass_gradcheck_in_float64(shape: str, with_residual: bool, silu: bool) -> None:
    leaves = inputs(shape, torch.float64, with_residual)
    if with_residual:
        function: Any = lambda *tensors: add_group_norm_silu_operator(*tensors, 2, EPS, silu)[:2]  # noqa: E731
    else:
        function = lambda *tensors: group_norm_silu_operator(*tensors, 2, EPS, silu)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_gradients_of_one_output_alone_equal_those_of_autograd() -> None:
    maps, residual, weight, bias = leaves = inputs("image", torch.float64, True)
    outputs, sums, _ = add_group_norm_silu_operator(*leaves, 2, EPS, True)
    expected = F.silu(F.group_norm(maps + residual, 2, weight, bias, EPS))
    for one, other in zip(
        torch.autograd.grad(outputs.square().sum(), leaves, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    of_maps, of_residual, *none = torch.autograd.grad(sums.square().sum(), leaves, allow_unused=True)
    torch.testing.assert_close(of_maps, 2 * (maps + residual))
    torch.testing.assert_close(of_residual, 2 * (maps + residual))
    assert none == [None, None]


@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_keeps_one_map_and_three_numbers_a_group(with_residual: bool) -> None:
    leaves = inputs("channels_last", torch.bfloat16, with_residual)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    operator: Any = add_group_norm_silu_operator if with_residual else group_norm_silu_operator
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        *outputs, statistics = operator(*leaves, 2, EPS, True)
    maps = outputs[1] if with_residual else leaves[0]
    expected = [maps, *leaves[-2:], statistics]
    assert [each.data_ptr() for each in kept] == [each.data_ptr() for each in expected]
    assert statistics.shape == (2, 2, 3)
    assert statistics.dtype == torch.float32


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", ["image", "channels_last", "channels_last_3d"])
def test_twins_in_float32_equal_those_in_float64(shape: str, silu: bool) -> None:
    maps, residual, weight, bias = (leaf.detach() for leaf in inputs(shape, torch.float32, True))
    wide = [each.double() for each in (maps, residual, weight, bias)]
    outputs, sums, statistics = twin_forward(maps, residual, weight, bias, 2, EPS, silu)
    wide_arguments: Any = (*wide, 2, EPS, silu)
    expected, expected_sums, expected_statistics = twin_forward(*wide_arguments)
    assert sums is not None
    assert expected_sums is not None
    torch.testing.assert_close(outputs.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-6, atol=1e-6)
    found = twin_backward(maps, residual, sums, weight, bias, statistics, 2, silu)
    references = twin_backward(wide[0], wide[1], expected_sums, wide[2], wide[3], expected_statistics, 2, silu)
    for one, other in zip(found, references, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", ["no pixels", "image", "channels_last", "channels_last_3d"])
def test_gradients_of_gradients_equal_autograd_in_float64(shape: str, silu: bool, dtype: torch.dtype) -> None:
    maps, weight, bias = (leaf.detach() for leaf in inputs(shape, dtype, False))
    memory_format = SHAPES[shape][1]
    gradient, *cotangents = (draw(SHAPES[shape][0], memory_format, seed, dtype) for seed in (7, 8))
    cotangents += [draw(weight.shape, torch.contiguous_format, seed, dtype) for seed in (9, 10)]
    statistics = twin_forward(maps, None, weight, bias, 2, EPS, silu)[2]
    wide = [each.double().requires_grad_() for each in (gradient, maps, weight, bias)]
    outputs = F.group_norm(wide[1], 2, wide[2], wide[3], EPS)
    outputs = F.silu(outputs) if silu else outputs
    once = torch.autograd.grad(outputs, wide[1:], wide[0], create_graph=True)
    for used in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        given = [each if use else None for each, use in zip(cotangents, used, strict=True)]
        found = double_backward(given[0], given[1], given[2], gradient, maps, weight, bias, statistics, 2, silu)
        pairs = [(one, each.double()) for one, each in zip(once, given, strict=True) if each is not None]
        total = torch.stack([(one * each).sum() for one, each in pairs]).sum()
        expected = torch.autograd.grad(total, wide, retain_graph=True, allow_unused=True, materialize_grads=True)
        for one, other, like in zip(found, expected, (gradient, maps, weight, bias), strict=True):
            rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            atol = 1e-5 * max(1.0, other.abs().max().item())
            torch.testing.assert_close(one.double(), other, rtol=rounding, atol=atol)
            assert (one.dtype, one.stride()) == (dtype, like.stride())


def penalty_gradients(norm: Any, maps: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a penalty on slopes, taken as `slopes_and_scores` does."""

    def score(values: Tensor) -> Tensor:
        total: Tensor = norm(values, weight, bias).tanh().sum()
        return total

    loss = torch.func.grad(score)(maps).square().sum() + score(maps)
    return torch.autograd.grad(loss, (weight, bias))


def plain(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(maps, 2, weight, bias, EPS))


def ours(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    outputs: Tensor = group_norm_silu_operator(maps, weight, bias, 2, EPS, True)[0]
    return outputs


@pytest.mark.parametrize("shape", ["image", "channels_last"])
def test_penalties_on_slopes_have_the_right_gradients(shape: str) -> None:
    leaves = inputs(shape, torch.float32, False)
    expected = penalty_gradients(plain, *(leaf.detach().double().requires_grad_() for leaf in leaves))
    for one, other in zip(penalty_gradients(ours, *leaves), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_a_compiled_penalty_is_one_graph_of_the_operators() -> None:
    """Dynamo silently loses the second gradient of an `autograd.Function` here."""
    leaves = inputs("channels_last", torch.float32, False)
    kept: list[str] = []

    def remember(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        kept.extend(str(node.target) for node in graph.graph.nodes if "gen_dist" in str(node.target))
        return graph

    compiled = torch.compile(penalty_gradients, fullgraph=True, backend=aot_autograd(fw_compiler=remember))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = compiled(ours, *leaves)
    for one, other in zip(found, penalty_gradients(ours, *leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    names = [name.removeprefix("gen_dist.").removesuffix(".default") for name in kept]
    assert set(names) == {f"group_norm_silu{suffix}" for suffix in ("", "_backward", "_double_backward")}


def test_a_third_gradient_is_refused() -> None:
    leaves = inputs("image", torch.float64, False)
    (once,) = torch.autograd.grad(ours(*leaves).square().sum(), leaves[:1], create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gen_dist::group_norm_silu_double_backward are not"):
        torch.autograd.grad(twice.square().sum(), leaves[:1])


def test_maps_with_gaps_give_what_dense_ones_give() -> None:
    maps, weight, bias = (leaf.detach() for leaf in inputs("image", torch.float32, False))
    gaps = torch.zeros(2, 6, 3, 8)[..., ::2].copy_(maps)
    for one, other in zip(
        group_norm_silu_operator(gaps, weight, bias, 2, EPS, True),
        group_norm_silu_operator(maps, weight, bias, 2, EPS, True),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.is_contiguous()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compilation_keeps_the_operator_and_its_memory_format(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, 3, padding=1).to(memory_format=memory_format)
    images = draw((2, 3, 6, 5), memory_format, 1, torch.float32)
    weight, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    targets: list[str] = []

    def remember(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def step(images: Tensor) -> Tensor:
        maps = convolution(images)
        outputs, sums, _ = add_group_norm_silu_operator(maps, maps, weight, bias, 2, EPS, True)
        return outputs * sums

    eager = step(images)
    compiled = torch.compile(step, fullgraph=True)(images)
    assert compiled.stride() == eager.stride()
    torch.testing.assert_close(compiled, eager)
    leaves = [weight, bias, *convolution.parameters()]
    for one, other in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.compile(step, fullgraph=True, backend=remember)(images)
    assert sum("add_group_norm_silu" in target for target in targets) == 1
