"""Convolutions that halve the sides of feature maps, and transposed ones that double them, faster on CPUs.

Both have kernel 4, stride 2 and padding 1. On processors without AVX-512 oneDNN is slow in two of their gradients and
results: gradients of weights that outgrow the cache take it two to four times as long as one matrix product of the same
numbers, and so does whatever makes an image of a few channels. Those are matrix products here.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wanted import wanted_gradients

# Measured on two Zen 3 cores at batches of 64 and 128.
WEIGHTS_OF_A_PRODUCT = 2**19
"""The gradient of so many weights is faster as a matrix product."""
IMAGE_CHANNELS = 4
"""And all that has at most so many channels on its large side is, but for the halving convolution itself."""


class HalvingConvolution(nn.Conv2d):
    """An `nn.Conv2d` that halves both sides, with its results to rounding."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, inputs, 2H, 2W] -> [B, outputs, H, W]; odd sides are halved and rounded down."""
        weight = self.weight  # read once: a parametrization computes it anew at each reading
        even = not (maps.shape[2] % 2 or maps.shape[3] % 2)
        if even and products_are_faster(maps, weight):
            halved: Tensor = _Halving.apply(maps, weight, self.bias)
            return halved
        return F.conv2d(maps, weight, self.bias, stride=2, padding=1)


class DoublingConvolution(nn.ConvTranspose2d):
    """An `nn.ConvTranspose2d` that doubles both sides, with its results to rounding."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:  # type: ignore[override]
        """[B, inputs, H, W] -> [B, outputs, 2H, 2W]."""
        weight = self.weight
        if products_are_faster(maps, weight):
            doubled: Tensor = _Doubling.apply(maps, weight, self.bias)
            return doubled
        return F.conv_transpose2d(maps, weight, self.bias, stride=2, padding=1)


def pixel_by_pixel(maps: Tensor) -> Tensor:
    """The same feature maps [B, C, H, W], laid out with channels last.

    What convolutions and all else do with such maps keeps that layout. Where maps and their gradient have two layouts,
    each operation on both takes several times as long.
    """
    if maps.shape[1] == 1:  # laid out either way already, and taken for the other one unless the strides say so
        return maps.reshape(len(maps), *maps.shape[2:], 1).permute(0, 3, 1, 2)
    return maps.contiguous(memory_format=torch.channels_last)


def products_are_faster(maps: Tensor, weight: Tensor) -> bool:
    """Whether some of a layer's arithmetic should be matrix products; weight [D, C, 4, 4], with C on the large side.

    Compiled code and autocast go their own ways. Told by the processor's instructions and not by a timing, so that it
    never changes between two runs that have to agree bit for bit.
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
    """The convolution. Its backward is made of operations that have gradients themselves."""

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(maps, weight, bias, stride=2, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Apart from `forward`, so that torch.func takes gradients."""
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
    """The transposed convolution: in its gradients, maps and gradient change places."""

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        doubled = double(maps, weight)
        return doubled if bias is None else doubled + bias[:, None, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """As in `_Halving`."""
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
    """Gradient in weight [D, C, 4, 4], between maps [B, C, 2H, 2W] and maps of half their sides, [B, D, H, W]."""
    if weight.numel() < WEIGHTS_OF_A_PRODUCT and weight.shape[1] > IMAGE_CHANNELS:
        shape = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(small, large, weight, None, *shape, [False, True, False])[1]
    padded = F.pad(large.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    # Patches as rows, with channels last as the maps have them, so that they are copied in long runs.
    patches = padded.unfold(1, 4, 2).unfold(2, 4, 2).permute(0, 1, 2, 4, 5, 3).flatten(0, 2).flatten(1)
    product = small.permute(0, 2, 3, 1).flatten(0, 2).t() @ patches
    # Through one dimension, for the strides of the weight even where C is 1: DistributedDataParallel minds them.
    return product.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2).flatten().view(weight.shape)


def double(maps: Tensor, weight: Tensor) -> Tensor:
    """The transposed convolution of maps [B, D, H, W] with weight [D, C, 4, 4]: [B, C, 2H, 2W]."""
    if weight.shape[1] > IMAGE_CHANNELS:
        return F.conv_transpose2d(maps, weight, stride=2, padding=1)
    batch, _, height, width = maps.shape
    patches = maps.permute(0, 2, 3, 1).flatten(0, 2) @ weight.permute(0, 2, 3, 1).flatten(1)
    # Row 2i + 2a + p of the padded result takes row 2a + p of the patch at row i; columns likewise.
    patches = patches.view(batch, height, width, 2, 2, 2, 2, -1)
    padded = patches.new_zeros(batch, height + 1, 2, width + 1, 2, weight.shape[1])
    for a, b in itertools.product((0, 1), (0, 1)):
        padded[:, a : a + height, :, b : b + width].add_(patches[:, :, :, a, :, b].permute(0, 1, 3, 2, 4, 5))
    return padded.flatten(1, 2).flatten(2, 3)[:, 1:-1, 1:-1].contiguous().permute(0, 3, 1, 2)
