"""The oneDNN linear layer against torch's: results, gradients, and conditions of its choice."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gen_dist.kernels import Linear
from gen_dist.kernels.linear import LEAST_WEIGHTS, _OneDnnLinear, mkl_is_slow, onednn_linear

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN linear operator"
    ),
]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 3, 128])
@pytest.mark.parametrize(("inputs", "outputs"), [(784, 400), (400, 784), (7, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_equal_float64(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    x, weight = _random(rows, inputs).requires_grad_(), _random(outputs, inputs, seed=1).requires_grad_()
    offset = _random(outputs, seed=2).requires_grad_() if bias else None
    upstream = _random(rows, outputs, seed=3)
    leaves = [x, weight] if offset is None else [x, weight, offset]
    result = _OneDnnLinear.apply(x, weight, offset)
    gradients = torch.autograd.grad(result, leaves, upstream)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = nn.functional.linear(*wide)
    expected_gradients = torch.autograd.grad(expected, wide, upstream.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-4)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=2e-4)


def test_views_are_multiplied_as_they_are() -> None:
    x, weight = _random(300, 64), _random(300, 96, seed=1)
    torch.testing.assert_close(onednn_linear(x.t(), weight.t()), x.t() @ weight, rtol=1e-5, atol=1e-4)


def test_results_are_the_same_bits_each_time() -> None:
    x, weight = _random(128, 784), _random(400, 784, seed=1)
    assert all(torch.equal(onednn_linear(x, weight), onednn_linear(x.clone(), weight.clone())) for _ in range(10))


def test_a_linear_layer_has_torchs_initial_values_and_names() -> None:
    torch.manual_seed(3)
    ours = Linear(30, 20)
    torch.manual_seed(3)
    theirs = nn.Linear(30, 20)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("case", ["large", "small", "half precision", "autocast", "another maker"])
def test_the_fast_path_is_taken_where_it_is_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gen_dist.kernels.linear.onednn_is_faster", lambda: case != "another maker")
    layer = Linear(LEAST_WEIGHTS // 64, 32 if case == "small" else 64)
    x = _random(4, layer.in_features)
    if case == "half precision":
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        result = layer(x)
    assert (type(result.grad_fn).__name__ == "_OneDnnLinearBackward") == (case == "large")


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        ("vendor_id : AuthenticAMD\nflags : fma avx2 avx512f avx512vl", True),
        ("vendor_id : AuthenticAMD\nflags : fma avx2", False),
        ("vendor_id : GenuineIntel\nflags : fma avx2 avx512f avx512vl", False),
        ("", False),
    ],
)
def test_mkl_is_slow_on_amds_processors_with_wide_vectors(cpuinfo: str, slow: bool) -> None:
    assert mkl_is_slow(cpuinfo) == slow


def test_a_penalty_on_gradients_has_the_right_gradient() -> None:
    """Double backward, which a gradient penalty needs, runs through our products."""

    def penalty_gradient(layer_of: Callable[..., torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        x = _random(4, 30).to(dtype).requires_grad_()
        weight = _random(20, 30, seed=1).to(dtype).requires_grad_()
        (inner,) = torch.autograd.grad(layer_of(x, weight, None).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(inner.square().sum(), weight)[0]

    expected = penalty_gradient(nn.functional.linear, torch.float64)
    result = penalty_gradient(_OneDnnLinear.apply, torch.float32)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)
