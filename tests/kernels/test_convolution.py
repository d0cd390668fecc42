"""Convolutions as matrix products against torch's in float64: results, gradients, and conditions of their choice."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.kernels import DoublingConvolution, HalvingConvolution
from gen_dist.kernels.convolution import (
    IMAGE_CHANNELS,
    WEIGHTS_OF_A_PRODUCT,
    _Doubling,
    _Halving,
    double,
    weight_gradient,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAYERS: dict[str, tuple[Any, Any]] = {"halving": (_Halving, F.conv2d), "doubling": (_Doubling, F.conv_transpose2d)}
SHAPES = [(1, 5, 1, 1, 1), (3, 8, 3, 2, 3), (2, 6, IMAGE_CHANNELS, 7, 7), (4, 7, 5, 3, 2), (2, 256, 128, 2, 2)]
"""Images, channels on the small and on the large side, height and width of the small side."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _leaves(layer: str, shape: tuple[int, ...], layout: torch.memory_format) -> list[Tensor]:
    """Maps, weight and bias."""
    batch, small, large, height, width = shape
    halving = layer == "halving"
    maps = _random(batch, large, 2 * height, 2 * width) if halving else _random(batch, small, height, width)
    leaves = maps.contiguous(memory_format=layout), _random(small, large, 4, 4, seed=1)
    return [leaf.requires_grad_() for leaf in (*leaves, _random(small if halving else large, seed=2))]


@pytest.fixture
def few_weights_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small layers use the products of large ones."""
    monkeypatch.setattr("gen_dist.kernels.convolution.WEIGHTS_OF_A_PRODUCT", 100)
    monkeypatch.setattr("gen_dist.kernels.convolution.IMAGE_CHANNELS", 1000)


@pytest.mark.parametrize("products", ["all", "chosen"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "pixels"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_results_and_gradients_equal_float64(
    layer: str, shape: tuple[int, ...], layout: torch.memory_format, products: str, request: pytest.FixtureRequest
) -> None:
    if products == "all":
        request.getfixturevalue("few_weights_are_many")
    ours, torchs = LAYERS[layer]
    leaves = _leaves(layer, shape, layout)
    result = ours.apply(*leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torchs(*wide, stride=2, padding=1)
    upstream = _random(*expected.shape, seed=3)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-4)
    gradients = torch.autograd.grad(result, leaves, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=5e-4)
    if products == "all":
        assert gradients[1].stride() == leaves[1].stride()


@pytest.mark.usefixtures("few_weights_are_many")
@pytest.mark.parametrize("frozen", ["maps", "weight"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_frozen_operand_leaves_the_other_its_gradient(layer: str, frozen: str) -> None:
    """In a generator's turn, for example, the discriminator's weights get no gradients."""
    ours, torchs = LAYERS[layer]
    maps, weight, _ = _leaves(layer, (3, 8, 3, 2, 3), torch.channels_last)
    (maps if frozen == "maps" else weight).requires_grad_(False)
    free = weight if frozen == "maps" else maps
    result = ours.apply(maps, weight, None)
    expected = torchs(maps.double(), weight.double(), stride=2, padding=1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-4)
    found, reference = (torch.autograd.grad(output.square().sum(), free)[0] for output in (result, expected))
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=2e-3)


@pytest.mark.usefixtures("few_weights_are_many")
@pytest.mark.parametrize("transform", [torch.func.grad, None], ids=["torch.func", "autograd"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_penalty_on_gradients_has_the_right_gradient(layer: str, transform: Any) -> None:
    ours, torchs = LAYERS[layer]

    def penalty_gradients(layer_of: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        maps, weight, bias = leaves

        def score(inputs: Tensor) -> Tensor:
            total: Tensor = layer_of(inputs, weight, bias).tanh().sum()
            return total

        slopes = transform(score)(maps) if transform else torch.autograd.grad(score(maps), maps, create_graph=True)[0]
        return torch.autograd.grad(slopes.square().sum(), leaves)

    leaves = _leaves(layer, (2, 6, 3, 3, 2), torch.channels_last)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = penalty_gradients(lambda *inputs: torchs(*inputs, stride=2, padding=1), wide)
    for found, reference in zip(penalty_gradients(ours.apply, leaves), expected, strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("few_weights_are_many")
def test_results_are_the_same_bits_each_time() -> None:
    large, small, weight = _random(8, 16, 14, 14), _random(8, 32, 7, 7), _random(32, 16, 4, 4)
    for product in (lambda: double(small, weight), lambda: weight_gradient(large, small, weight)):
        first = product()
        assert all(torch.equal(first, product()) for _ in range(10))


@pytest.mark.parametrize(
    ("ours", "torchs"), [(HalvingConvolution, nn.Conv2d), (DoublingConvolution, nn.ConvTranspose2d)]
)
def test_a_layer_starts_as_torchs_does_and_keeps_its_names(ours: Any, torchs: Any) -> None:
    torch.manual_seed(3)
    mine = ours(3, 20)
    torch.manual_seed(3)
    theirs = torchs(3, 20, kernel_size=4, stride=2, padding=1)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(mine.state_dict()[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    "case", ["image", "many weights", "few weights", "odd sides", "half precision", "autocast", "other instructions"]
)
def test_products_are_taken_where_they_are_faster(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = "AVX512" if case == "other instructions" else "AVX2"
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    inputs, outputs = {"many weights": (128, WEIGHTS_OF_A_PRODUCT // 2**11), "few weights": (8, 8)}.get(case, (3, 8))
    for layer, name in (
        (HalvingConvolution(inputs, outputs), "_HalvingBackward"),
        (DoublingConvolution(outputs, inputs), "_DoublingBackward"),
    ):
        maps = _random(2, inputs if name == "_HalvingBackward" else outputs, 6, 5 if case == "odd sides" else 6)
        if case == "half precision":
            layer, maps = layer.to(torch.bfloat16), maps.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            result = layer(maps)
        chosen = case in ("image", "many weights") or (case == "odd sides" and name == "_DoublingBackward")
        assert (type(result.grad_fn).__name__ == name) == chosen, name
