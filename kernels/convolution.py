"""Convolutions that halve the sides of feature maps, and transposed ones that double them, faster on CPUs.

Both have kernel 4, stride 2 and padding 1. On processors without AVX-512, oneDNN is slow in two cases: gradients of
weights that outgrow the cache, and operations with an image of a few channels as result. Each takes two to four times
as long as one matrix product of the same numbers, which is used here instead.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import wanted_gradients

# Measured on two Zen 3 cores at batches of 64 and 128.
WEIGHTS_OF_A_PRODUCT = 2**19
"""Number of weights from which their gradient is faster as a matrix product."""
IMAGE_CHANNELS = 4
"""Largest number of channels on the large side for which every operation but the halving itself is a product."""


class HalvingConvolution(nn.Conv2d):
    """An `nn.Conv2d` that halves both sides, with equal results up to rounding."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Feature maps [B, inputs, 2H, 2W] -> [B, outputs, H, W]; halves of odd sides are rounded down."""
        weight = self.weight  # read once: a parametrization recomputes it at each access
        even = not (maps.shape[2] % 2 or maps.shape[3] % 2)
        if even and products_are_faster(maps, weight):
            halved: Tensor = _Halving.apply(maps, weight, self.bias)
            return halved
        return F.conv2d(maps, weight, self.bias, stride=2, padding=1)


class DoublingConvolution(nn.ConvTranspose2d):
    """An `nn.ConvTranspose2d` that doubles both sides, with equal results up to rounding."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:  # type: ignore[override]
        """Feature maps [B, inputs, H, W] -> [B, outputs, 2H, 2W]."""
        weight = self.weight
        if products_are_faster(maps, weight):
            doubled: Tensor = _Doubling.apply(maps, weight, self.bias)
            return doubled
        return F.conv_transpose2d(maps, weight, self.bias, stride=2, padding=1)


def pixel_by_pixel(maps: Tensor) -> Tensor:
    """Copy feature maps [B, C, H, W] into the channels_last layout.

    Convolutions and other operations keep that layout. Operations on maps and gradients of different layouts take
    several times as long.
    """
    if maps.shape[1] == 1:  # both layouts are equal in memory: only the strides mark the maps as channels_last
        return maps.reshape(len(maps), *maps.shape[2:], 1).permute(0, 3, 1, 2)
    return maps.contiguous(memory_format=torch.channels_last)


def products_are_faster(maps: Tensor, weight: Tensor) -> bool:
    """True if some of a layer's arithmetic should be matrix products; weight [D, C, 4, 4], with C on the large side.

    Never with compiled code or autocast. The choice depends on the processor's instruction set, not on a timing, so it
    is equal in any two runs that must agree bit for bit.
    """
    return (
        (weight.numel() >= WEIGHTS_OF_A_PRODUCT or weight.shape[1] <= IMAGE_CHANNELS)
        and maps.device.type == "cpu"
        and maps.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


class _Halving(torch.autograd.Function):
    """The convolution. Its backward consists of differentiable operations."""

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(maps, weight, bias, stride=2, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Save tensors; separate from `forward`, as torch.func requires."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        maps, weight, _ = ctx.saved_tensors
        wants_maps, wants_weight, wants_bias = wanted_gradients(ctx)
        gradient = pixel_by_pixel(gradient)
        return (
            double(gradient, weight) if wants_maps else None,
            weight_gradient(maps, gradient, weight) if wants_weight else None,
            gradient.sum(dim=(0, 2, 3)) if wants_bias else None,
        )


class _Doubling(torch.autograd.Function):
    """The transposed convolution: in its gradients, maps and gradient exchange roles."""

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        doubled = double(maps, weight)
        return doubled if bias is None else doubled.add_(bias[:, None, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Save tensors, as in `_Halving`."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        maps, weight, _ = ctx.saved_tensors
        wants_maps, wants_weight, wants_bias = wanted_gradients(ctx)
        gradient = pixel_by_pixel(gradient)
        return (
            F.conv2d(gradient, weight, stride=2, padding=1) if wants_maps else None,
            weight_gradient(gradient, maps, weight) if wants_weight else None,
            gradient.sum(dim=(0, 2, 3)) if wants_bias else None,
        )


def weight_gradient(large: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to weight [D, C, 4, 4], from large maps [B, C, 2H, 2W] and small maps [B, D, H, W]."""
    if weight.numel() < WEIGHTS_OF_A_PRODUCT and weight.shape[1] > IMAGE_CHANNELS:
        shape = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(small, large, weight, None, *shape, [False, True, False])[1]
    padded = F.pad(large.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    # Patches are rows with channels last, as in the maps, so that they are copied in long runs.
    patches = padded.unfold(1, 4, 2).unfold(2, 4, 2).permute(0, 1, 2, 4, 5, 3).flatten(0, 2).flatten(1)
    product = small.permute(0, 2, 3, 1).flatten(0, 2).t() @ patches
    # Flattened first, so that strides equal the weight's even if C is 1: DistributedDataParallel compares them.
    return product.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2).flatten().view(weight.shape)


def double(maps: Tensor, weight: Tensor) -> Tensor:
    """Transposed convolution of maps [B, D, H, W] with weight [D, C, 4, 4]: [B, C, 2H, 2W]."""
    if weight.shape[1] > IMAGE_CHANNELS:
        return F.conv_transpose2d(maps, weight, stride=2, padding=1)
    batch, _, height, width = maps.shape
    patches = maps.permute(0, 2, 3, 1).flatten(0, 2) @ weight.permute(0, 2, 3, 1).flatten(1)
    # Row 2i + 2a + p of the padded result sums row 2a + p of the patch at row i; columns likewise.
    patches = patches.view(batch, height, width, 2, 2, 2, 2, -1)
    padded = patches.new_zeros(batch, height + 1, 2, width + 1, 2, weight.shape[1])
    for a, b in itertools.product((0, 1), (0, 1)):
        padded[:, a : a + height, :, b : b + width].add_(patches[:, :, :, a, :, b].permute(0, 1, 3, 2, 4, 5))
    return padded.flatten(1, 2).flatten(2, 3)[:, 1:-1, 1:-1].contiguous().permute(0, 3, 1, 2)
