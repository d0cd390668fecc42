"""Group normalization with SiLU on CPUs against torch in float64, its gradients, and what it refuses."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_dist.kernels import computed_again, group_norm_cpu, group_norm_silu

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-6
SHAPES = {  # shape, groups, channels_last
    "no pixels": ((3, 8), 2, False),
    "one dimension": ((2, 6, 9), 3, False),
    "image": ((2, 12, 5, 3), 3, False),
    "channels_last": ((2, 12, 5, 3), 3, True),
    "groups of one channel": ((2, 5, 4, 4), 5, True),
    "volume": ((2, 6, 3, 2, 4), 2, False),
    "channels_last_3d": ((2, 6, 3, 2, 4), 2, True),
    "no images": ((0, 8, 3, 3), 2, False),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=LAST[len(shape)]) if channels_last else values


def plain(maps: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str) -> Tensor:
    outputs = F.group_norm(maps, groups, weight, bias, EPS)
    return F.silu(outputs) if activation == "silu" else outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_outputs_and_gradients_equal_torch_in_float64(shape: str, activation: Any, dtype: torch.dtype) -> None:
    sizes, groups, channels_last = SHAPES[shape]
    leaves = [draw(sizes, 1, dtype, channels_last), *(draw(sizes[1:2], seed, dtype) for seed in (2, 3))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = group_norm_silu(leaves[0], leaves[1], leaves[2], groups, EPS, activation=activation)
    expected = plain(wide[0], wide[1], wide[2], groups, activation)
    rounding = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=4e-6)
    assert found.dtype == dtype
    assert found.stride() == leaves[0].stride()
    gradient = draw(sizes, 4, dtype, channels_last)
    gradients = torch.autograd.grad(found, leaves, gradient)
    references = torch.autograd.grad(expected, wide, gradient.double())
    for leaf, one, other in zip(leaves, gradients, references, strict=True):
        size = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=4e-6 * max(1.0, size))
        assert one.stride() == leaf.stride()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_residual_is_added_before_the_norm(channels_last: bool) -> None:
    maps, residual = (draw((2, 8, 4, 3), seed, torch.float64, channels_last).requires_grad_() for seed in (1, 2))
    weight, bias = (draw((8,), seed, torch.float64).requires_grad_() for seed in (3, 4))
    outputs, sums = group_norm_silu(maps, weight, bias, 2, EPS, residual=residual)
    torch.testing.assert_close(sums, maps + residual, rtol=0, atol=0)
    torch.testing.assert_close(outputs, plain(maps + residual, weight, bias, 2, "silu"))

    def both(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return group_norm_silu(leaves[0], leaves[2], leaves[3], 2, EPS, residual=leaves[1])

    assert torch.autograd.gradcheck(both, (maps, residual, weight, bias))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_keeps_one_map(with_residual: bool, memory_format: torch.memory_format) -> None:
    """Torch's own two operations keep two; with the convolution before or after them, the same memory counts once."""
    maps = draw((4, 32, 8, 8), 1).contiguous(memory_format=memory_format).requires_grad_()
    residual = draw((4, 32, 8, 8), 2).contiguous(memory_format=memory_format) if with_residual else None
    weight, bias = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = group_norm_silu(maps, weight, bias, 8, EPS, residual=residual)
    small = weight.nbytes + bias.nbytes + 4 * 8 * 3 * 4
    assert maps.nbytes <= sum(kept.values()) <= maps.nbytes + small
    if residual is not None:
        assert found[1].data_ptr() in kept
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        plain(maps, weight, bias, 8, "silu")
    assert sum(kept.values()) >= 2 * maps.nbytes


@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_computed_again_have_equal_bits(channels_last: bool) -> None:
    leaves = [draw((5, 8, 6, 7), 1, channels_last=channels_last) + 30.0, draw((8,), 2), draw((8,), 3)]
    leaves.append(draw((4, 8, 3, 3), 4))

    def gradients(context: Any, *, spoil: bool) -> tuple[Tensor, ...]:
        maps, weight, bias, kernel = some = [leaf.clone().requires_grad_() for leaf in leaves]
        outputs = group_norm_silu(maps, weight, bias, 4, EPS)
        with context(outputs):
            found = F.conv2d(outputs, kernel)
        if spoil:
            outputs.data.zero_()  # behind autograd's back: gradients that read it would be wrong
        return torch.autograd.grad(found.square().sum(), some)

    expected = gradients(contextlib.nullcontext, spoil=False)
    for one, other in zip(gradients(computed_again, spoil=True), expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(gradients(contextlib.nullcontext, spoil=True)[3], expected[3])


def test_only_outputs_of_the_norm_are_computed_again() -> None:
    maps = draw((2, 8, 4, 4), 1).requires_grad_()
    outputs = group_norm_silu(maps, torch.ones(8), torch.zeros(8), 4, EPS)
    other = draw((2, 8, 4, 4), 2)
    with computed_again(outputs):
        (gradient,) = torch.autograd.grad((outputs * other).sum(), outputs)
    assert torch.equal(gradient, other)
    with computed_again(maps), computed_again(outputs.detach()):
        (maps * maps).sum().backward()
    assert torch.equal(maps.grad, 2 * maps)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_it_is_one_graph_with_the_same_results(memory_format: torch.memory_format, activation: Any) -> None:
    def step(maps: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs, sums = group_norm_silu(maps, weight, bias, 2, EPS, residual=residual, activation=activation)
        return (outputs * sums).sum()

    leaves = [draw((2, 4, 5, 3), seed).contiguous(memory_format=memory_format) for seed in (1, 2)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, draw((4,), 3), draw((4,), 4))]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    eager = step(*leaves)
    torch.testing.assert_close(compiled, eager)
    for one, other in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_residual", [False, True])
def test_other_devices_take_the_operator(with_residual: bool) -> None:
    """Tensors on "meta" represent those of other devices."""
    maps = torch.empty(2, 8, 3, 5, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    parameter = torch.empty(8, device="meta")
    residual = torch.empty_like(maps) if with_residual else None
    found: Any = group_norm_silu(maps, parameter, parameter, 4, EPS, residual=residual)
    for each in found if with_residual else [found]:
        assert each.shape == maps.shape
        assert each.dtype == torch.bfloat16
        assert each.stride() == maps.stride()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mean_far_above_the_deviation_is_right(channels_last: bool) -> None:
    """ATen's variance of channels_last maps is mean squares less squared means, which loses it; ours does not."""
    maps = (1e3 + 1e-2 * draw((2, 4, 16, 16), 1, channels_last=channels_last)).requires_grad_()
    wide = maps.detach().double().requires_grad_()
    expected = F.group_norm(wide, 2, eps=1e-12)
    found = group_norm_silu(maps, torch.ones(4), torch.zeros(4), 2, 1e-12, activation="none")
    # Both round the mean to float32, which is up to 0.3 % of this deviation.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)
    gradient = draw((2, 4, 16, 16), 2)
    (one,) = torch.autograd.grad(found, maps, gradient)
    (other,) = torch.autograd.grad(expected, wide, gradient.double())
    torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-2 * other.abs().max().item())


def test_contiguous_maps_have_the_bits_of_torch() -> None:
    """So networks may take this operation in place of torch's two."""
    maps, weight, bias = leaves = [draw((3, 8, 5, 7), 1), draw((8,), 2), draw((8,), 3)]
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for outputs in (group_norm_silu(maps, weight, bias, 4, EPS), plain(maps, weight, bias, 4, "silu")):
        results.append((outputs, *torch.autograd.grad(outputs, leaves, draw((3, 8, 5, 7), 4))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_images_are_computed_alike_however_many_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [draw((5, 8, 6, 7), 1, channels_last=True), draw((8,), 2), draw((8,), 3)]
    results = []
    for elements in (group_norm_cpu.CACHED_ELEMENTS, 1):
        monkeypatch.setattr(group_norm_cpu, "CACHED_ELEMENTS", elements)
        some = [leaf.clone().requires_grad_() for leaf in leaves]
        outputs = group_norm_silu(some[0], some[1], some[2], 4, EPS)
        results.append((outputs, *torch.autograd.grad(outputs.square().sum(), some)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


GOOD = torch.zeros(2, 6, 3, 3)
SIX = torch.zeros(6)


@pytest.mark.parametrize(
    ("maps", "weight", "bias", "options", "message"),
    [
        (torch.zeros(6), SIX, SIX, {}, r"maps \[6\] are not \[B, C"),
        (GOOD, SIX, SIX, {"groups": 4}, r"4 groups do not divide 6 channels; use one of \[1, 2, 3, 6\]"),
        (GOOD, SIX, SIX, {"groups": 0}, "0 groups do not divide 6 channels"),
        (GOOD.long(), SIX, SIX, {}, "maps are torch.int64; use float32"),
        (GOOD, torch.zeros(5), SIX, {}, r"weight is torch.float32 \[5\]; it must be \[6\]"),
        (GOOD, SIX, SIX.double(), {}, r"bias is torch.float64 \[6\]"),
        (GOOD, SIX.long(), SIX.long(), {}, r"weight is torch.int64 \[6\]"),
        (GOOD, SIX, SIX, {"eps": -1.0}, "eps is -1.0; it must be at least 0"),
        (GOOD, SIX, SIX, {"eps": float("nan")}, "eps is nan"),
        (GOOD, SIX, SIX, {"residual": torch.zeros(2, 6, 3)}, r"residual is torch.float32 \[2, 6, 3\], maps are"),
        (GOOD, SIX, SIX, {"residual": GOOD.double()}, "residual is torch.float64"),
        (GOOD, SIX, SIX, {"activation": "relu"}, "activation is 'relu'; use silu or none"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_values(
    maps: Tensor, weight: Tensor, bias: Tensor, options: dict[str, Any], message: str
) -> None:
    arguments = {"groups": 2, "eps": EPS} | options
    with pytest.raises(ValueError, match=message):
        group_norm_silu(maps, weight, bias, **arguments)
