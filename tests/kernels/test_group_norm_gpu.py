"""The kernels of group normalization on a real GPU: results, bits, under torch.compile and in a CUDA graph."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_dist.kernels import group_norm_silu
from gen_dist.kernels.group_norm_layout import groups_of, tiling_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

EPS = 1e-6
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = {  # shape, groups
    "no pixels": ((130, 64), 8),
    "small": ((5, 32, 4, 4), 8),
    "odd": ((3, 18, 17, 19), 3),
    "odd and large": ((2, 9, 131, 127), 3),
    "groups of one channel": ((3, 40, 33, 31), 40),
    "one group": ((2, 512, 16, 16), 1),
    "many channels": ((2, 6000, 3, 3), 2),
    "32 pixels": ((8, 128, 32, 32), 32),
    "64 pixels": ((4, 128, 64, 64), 32),
    "volume": ((2, 32, 9, 16, 16), 8),
    "largest": ((8, 128, 256, 256), 32),
}


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    values = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=LAST[len(shape)]) if channels_last else values


def leaves_of(shape: str, dtype: torch.dtype, channels_last: bool, with_residual: bool) -> list[Tensor]:
    """Maps, weight and bias, and the residual if there is one."""
    sizes, _ = SHAPES[shape]
    parameters = [1 + 0.5 * draw(sizes[1:2], 3, torch.float32), draw(sizes[1:2], 4, torch.float32)]
    maps = [draw(sizes, seed, dtype, channels_last) for seed in range(1 + with_residual)]
    return [leaf.requires_grad_() for leaf in (maps[0], *parameters, *maps[1:])]


def run(leaves: list[Tensor], groups: int, activation: str) -> list[Tensor]:
    """Outputs, the sums if there is a residual, and the gradients of all leaves."""
    maps, weight, bias, *residual = leaves
    found = group_norm_silu(  # type: ignore[call-overload]
        maps, weight, bias, groups, EPS, residual=residual[0] if residual else None, activation=activation
    )
    outputs = list(found) if residual else [found]
    gradients = [output.detach().flip(0) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


def assert_equals_float64(leaves: list[Tensor], groups: int, activation: str) -> None:
    found = run(leaves, groups, activation)
    maps, weight, bias, *residual = leaves
    count = 1 + len(residual)
    gradients = [output.detach().flip(0).double() for output in found[:count]]
    dtype = maps.dtype
    sums = (maps.float() + residual[0].float()).to(dtype) if residual else maps
    wide = [each.detach().double().requires_grad_() for each in (sums, weight, bias)]
    expected = F.group_norm(wide[0], groups, wide[1], wide[2], EPS)
    expected = F.silu(expected) if activation == "silu" else expected
    references = list(torch.autograd.grad(expected, wide, gradients[0]))
    if residual:
        assert torch.equal(found[1], sums)
        references[0] += gradients[1]
        references.append(references[0])
    rounding = torch.finfo(dtype).eps * 0.51 if dtype != torch.float32 else 2e-6
    torch.testing.assert_close(found[0].double(), expected, rtol=rounding, atol=4e-6)
    for leaf, one, other in zip(leaves, found[count:], references, strict=True):
        bound = rounding if leaf.dtype == dtype else 4e-6
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=4e-6 * max(1.0, other.abs().max().item()))
        assert one.stride() == leaf.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_equals_float64(shape: str, channels_last: bool, dtype: torch.dtype) -> None:
    sizes, groups = SHAPES[shape]
    if channels_last and len(sizes) < 4:
        pytest.skip("no channels_last format")
    assert_equals_float64(leaves_of(shape, dtype, channels_last, with_residual=False), groups, "silu")


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("shape", ["odd", "32 pixels", "odd and large"])
def test_group_norm_of_a_sum_equals_float64(shape: str, activation: str) -> None:
    leaves = leaves_of(shape, torch.bfloat16, channels_last=True, with_residual=True)
    assert_equals_float64(leaves, SHAPES[shape][1], activation)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", ["odd", "32 pixels", "largest"])
def test_two_calls_have_equal_bits(shape: str, channels_last: bool) -> None:
    leaves = leaves_of(shape, torch.bfloat16, channels_last, with_residual=True)
    for one, other in zip(*(run(leaves, SHAPES[shape][1], "silu") for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", ["32 pixels", "64 pixels", "odd and large"])
def test_a_shard_of_images_has_the_bits_of_the_whole(shape: str) -> None:
    maps, weight, bias = (leaf.detach() for leaf in leaves_of(shape, torch.bfloat16, True, with_residual=False))
    groups = SHAPES[shape][1]
    parts = [group_norm_silu(shard, weight, bias, groups, EPS) for shard in maps.split(1)]
    assert torch.equal(group_norm_silu(maps, weight, bias, groups, EPS), torch.cat(parts))


@pytest.mark.parametrize("sides", [(16, 16), (150, 149)])
def test_a_mean_far_above_the_deviation_is_right(sides: tuple[int, int]) -> None:
    maps = (1e3 + 1e-2 * draw((2, 8, *sides), 1, torch.float32)).requires_grad_()
    wide = maps.detach().double().requires_grad_()
    ones, zeros = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    found = group_norm_silu(maps, ones, zeros, 2, 1e-12, activation="none")
    expected = F.group_norm(wide, 2, eps=1e-12)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = draw((2, 8, *sides), 2, torch.float32)
    (one,), (other,) = (
        torch.autograd.grad(found, maps, gradient),
        torch.autograd.grad(expected, wide, gradient.double()),
    )
    torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", ["odd", "odd and large"])
def test_penalties_on_slopes_have_the_right_gradients(shape: str, channels_last: bool) -> None:
    groups = SHAPES[shape][1]

    def gradients(leaves: list[Tensor], normalize: Any) -> tuple[Tensor, ...]:
        maps, weight, bias = leaves

        def score(values: Tensor) -> Tensor:
            total: Tensor = normalize(values, weight, bias).tanh().sum()
            return total

        slopes = torch.func.grad(score)(maps)
        return torch.autograd.grad(slopes.square().sum(), (weight, bias))

    leaves = leaves_of(shape, torch.float32, channels_last, with_residual=False)
    found = gradients(leaves, functools.partial(group_norm_silu, groups=groups, eps=EPS, activation="none"))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = gradients(wide, lambda maps, weight, bias: F.group_norm(maps, groups, weight, bias, EPS))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_compiled_it_is_one_graph_with_the_same_results() -> None:
    def step(*leaves: Tensor) -> Tensor:
        outputs, sums = group_norm_silu(leaves[0], leaves[1], leaves[2], 32, EPS, residual=leaves[3])
        return (outputs * sums).float().square().mean()

    leaves = leaves_of("32 pixels", torch.bfloat16, channels_last=True, with_residual=True)
    losses = [function(*leaves) for function in (step, torch.compile(step, fullgraph=True))]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2 * other.abs().max().item())


@pytest.mark.parametrize("shape", ["32 pixels", "odd and large"])
def test_a_cuda_graph_reads_new_maps_at_each_replay(shape: str) -> None:
    leaves, groups = leaves_of(shape, torch.bfloat16, channels_last=True, with_residual=True), SHAPES[shape][1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(leaves, groups, "silu")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(leaves, groups, "silu")
    for seed in range(2):
        with torch.no_grad():
            leaves[0].copy_(draw(tuple(leaves[0].shape), 10 + seed, torch.bfloat16))
        graph.replay()
        for one, other in zip(recorded, run(leaves, groups, "silu"), strict=True):
            assert torch.equal(one, other)


def test_maps_of_more_than_two_billion_elements_are_indexed_right() -> None:
    """Offsets of 32 bits would wrap around."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    maps = torch.empty(1, 4, 2**15, 2**14 + 2**10, device="cuda", dtype=torch.bfloat16)
    assert maps.numel() > 2**31
    assert not tiling_of(groups_of(maps, 2), 2, 32).whole
    maps[:, :, : 2**14].fill_(-1.0)
    maps[:, :, 2**14 :].fill_(1.0)
    maps[:, 3] *= 3.0
    outputs = group_norm_silu(
        maps, torch.ones(4, device="cuda"), torch.zeros(4, device="cuda"), 2, 0.0, activation="none"
    )
    for channel, (low, high) in enumerate([(-1.0, 1.0)] * 2 + [(-(5**-0.5), 5**-0.5), (-3 * 5**-0.5, 3 * 5**-0.5)]):
        for rows, expected in ((slice(2**14), low), (slice(2**14, None), high)):
            found = outputs[0, channel, rows]
            assert found.min().item() == found.max().item() == pytest.approx(expected, rel=2**-8)
