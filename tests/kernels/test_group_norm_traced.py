"""Group normalization with SiLU as compiled code has it on CPUs, run uncompiled, against torch in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.kernels import group_norm_silu
from gen_dist.kernels.group_norm_traced import traced_group_norm_silu
from tests.kernels.test_group_norm import EPS, SHAPES, draw, plain

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_outputs_and_gradients_equal_torch_in_float64(shape: str, silu: bool) -> None:
    sizes, groups, channels_last = SHAPES[shape]
    leaves = [draw(sizes, 1, channels_last=channels_last), *(draw(sizes[1:2], seed) for seed in (2, 3))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = traced_group_norm_silu(leaves[0], leaves[1], leaves[2], groups, EPS, silu)
    expected = plain(wide[0], wide[1], wide[2], groups, "silu" if silu else "none")
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=4e-6)
    assert found.stride() == leaves[0].stride()
    gradient = draw(sizes, 4, channels_last=channels_last)
    gradients = torch.autograd.grad(found, leaves, gradient)
    references = torch.autograd.grad(expected, wide, gradient.double())
    for one, other in zip(gradients, references, strict=True):
        size = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=4e-6 * max(1.0, size))


def test_its_gradients_have_gradients() -> None:
    shapes = [(2, 4, 3, 2), (4,), (4,)]
    leaves = [draw(shape, seed, torch.float64).requires_grad_() for seed, shape in enumerate(shapes)]

    def norm(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return traced_group_norm_silu(maps, weight, bias, 2, EPS, True)

    assert torch.autograd.gradgradcheck(norm, leaves)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mean_far_above_the_deviation_is_right(channels_last: bool) -> None:
    maps = (1e3 + 1e-2 * draw((2, 4, 16, 16), 1, channels_last=channels_last)).requires_grad_()
    wide = maps.detach().double().requires_grad_()
    expected = F.group_norm(wide, 2, eps=1e-12)
    found = traced_group_norm_silu(maps, torch.ones(4), torch.zeros(4), 2, 1e-12, False)
    # Both round the mean to float32, which is up to 0.3 % of this deviation.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)
    gradient = draw((2, 4, 16, 16), 2)
    (one,) = torch.autograd.grad(found, maps, gradient)
    (other,) = torch.autograd.grad(expected, wide, gradient.double())
    torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-2 * other.abs().max().item())


def test_a_nan_spoils_its_group_alone() -> None:
    maps = draw((2, 6, 4, 4), 1)
    maps[1, 3, 2, 2] = torch.nan
    spoiled = traced_group_norm_silu(maps, torch.ones(6), torch.zeros(6), 3, EPS, True).isnan()
    assert spoiled[1, 2:4].all() and spoiled.sum() == 2 * 16


class _Normed(nn.Module):
    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.activation = activation

    def forward(self, maps: Tensor) -> Tensor:
        return group_norm_silu(maps, self.norm.weight, self.norm.bias, 2, EPS, activation=self.activation)


@pytest.mark.parametrize(("activation", "names"), [("silu", ["group_norm", "silu"]), ("none", ["group_norm"])])
def test_exported_programs_have_the_operations_that_other_runtimes_know(activation: Any, names: list[str]) -> None:
    module, maps = _Normed(activation), draw((2, 4, 3, 3), 1)
    program = torch.export.export(module, (maps,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "metadata" not in name and ".to." not in name] == [
        f"aten.{name}.default" for name in names
    ]
    torch.testing.assert_close(program.module()(maps), module(maps))
