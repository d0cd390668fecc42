"""Matrix products and convolutions of an action, recorded as it computes them, each with all ways to compute it.

They are recorded below autograd, forward and backward, with their tensors, so that they can be computed again alone on
the same memory.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gen_dist.kernels import pixel_by_pixel
from gen_dist.kernels.convolution import double, weight_gradient
from gen_dist.kernels.linear import onednn_linear

Way = Callable[[], object]

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass
class Product:
    """A matrix product, or a convolution or one of its gradients, on the memory that it had in the step."""

    name: str
    """Kind and sizes."""
    flops: int
    """Floating-point operations: a multiplication and an addition count as two."""
    ways: dict[str, Way]
    """Functions that compute it, by name; not all in the same layout of memory."""
    chosen: str = ""
    """The fastest way, once `choose` has measured them."""


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Context in which layers compute as torch's do, so that products and convolutions are recorded as such."""
    with (
        mock.patch("gen_dist.kernels.linear.onednn_is_faster", lambda: False),
        mock.patch("gen_dist.kernels.convolution.products_are_faster", lambda *_: False),
    ):
        yield


def record(action: Callable[[], object]) -> list[Product]:
    """The products that an action computes, in order. They keep the tensors that it took."""
    recorder = _Recorder()
    with recorder:
        action()
    return recorder.products


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        taken = [value.detach() if isinstance(value, Tensor) else value for value in args]  # the same memory
        if packet in _PRODUCTS:
            self.products.append(_matrix_product(*taken))
        elif packet == torch.ops.aten.convolution:
            self.products.append(_convolution(*taken))
        elif packet == torch.ops.aten.convolution_backward:
            self.products += _convolution_gradients(*taken)
        return func(*args, **(kwargs or {}))


def _matrix_product(*operands: Tensor) -> Product:
    """`mm`, `bmm` of two operands, or `addmm`, `baddbmm` of a bias and two."""
    left, right = operands[-2:]
    bias = operands[0] if len(operands) == 3 else None
    output = left.new_empty(*left.shape[:-1], right.shape[-1])
    is_matrix = left.ndim == 2
    if bias is None:
        multiply = functools.partial(torch.mm if is_matrix else torch.bmm, left, right, out=output)
    else:
        multiply = functools.partial(torch.addmm if is_matrix else torch.baddbmm, bias, left, right, out=output)
    ways: dict[str, Way] = {"torch": multiply}
    plain_bias = bias is None or bias.ndim == 1
    if is_matrix and left.device.type == "cpu" and left.dtype == torch.float32 and plain_bias and _has_onednn():
        ways["oneDNN"] = functools.partial(onednn_linear, left, right.t(), bias)
    sizes = (*left.shape, right.shape[-1])
    return Product(f"product {' x '.join(map(str, sizes))}", 2 * math.prod(sizes), ways)


def _has_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _convolution(maps: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Product:
    """Either kind of convolution, in both layouts of memory."""
    ways: dict[str, Way] = {}
    for layout, (maps_in, weight_in) in _layouts(maps, weight):
        ways[layout] = functools.partial(torch.ops.aten.convolution, maps_in, weight_in, bias, *geometry)
    if _doubles(weight, geometry):
        ways["kernels"] = lambda: double(maps, weight)
    return Product(_name("convolution", maps, weight, geometry), _flops(maps, weight, geometry), ways)


def _convolution_gradients(
    gradient: Tensor, maps: Tensor, weight: Tensor, _bias_sizes: Any, *rest: Any
) -> list[Product]:
    """Gradients of a convolution that its backward pass computes."""
    *geometry, (wants_maps, wants_weight, _) = rest
    products = []
    for wanted, part, mask in (
        (wants_maps, "input gradient", [True, False, False]),
        (wants_weight, "weight gradient", [False, True, False]),
    ):
        if not wanted:
            continue
        ways: dict[str, Way] = {}
        for layout, operands in _layouts(gradient, maps, weight):
            ways[layout] = functools.partial(torch.ops.aten.convolution_backward, *operands, None, *geometry, mask)
        if _doubles(weight, geometry):
            # The gradients of a transposed convolution are those of a convolution whose maps change places.
            if part == "weight gradient":
                ways["kernels"] = lambda: weight_gradient(gradient, maps, weight)
        elif _halves(maps, weight, geometry):
            if part == "input gradient":
                ways["kernels"] = lambda: double(gradient, weight)
            else:
                ways["kernels"] = lambda: weight_gradient(maps, gradient, weight)
        products.append(Product(_name(part, maps, weight, geometry), _flops(maps, weight, geometry), ways))
    return products


def _layouts(*tensors: Tensor) -> list[tuple[str, list[Tensor]]]:
    """The tensors in both layouts of memory; a layout that they have is the memory that they had in the step."""
    if any(tensor.ndim != 4 for tensor in tensors):
        return [("torch", list(tensors))]
    return [
        ("channels first", [tensor.contiguous() for tensor in tensors]),
        ("channels last", [pixel_by_pixel(tensor) for tensor in tensors]),
    ]


def _geometry(geometry: Sequence[Any]) -> tuple[bool, bool]:
    """True if stride and padding are those of kernels/convolution.py; True if the convolution is transposed."""
    stride, padding, dilation, transposed, output_padding, groups = geometry
    plain = (list(stride), list(padding), list(dilation), list(output_padding)) == ([2, 2], [1, 1], [1, 1], [0, 0])
    return plain and groups == 1, transposed


def _doubles(weight: Tensor, geometry: Sequence[Any]) -> bool:
    plain, transposed = _geometry(geometry)
    return plain and transposed and weight.shape[2:] == (4, 4) and weight.dtype == torch.float32


def _halves(maps: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    plain, transposed = _geometry(geometry)
    even = not any(side % 2 for side in maps.shape[2:])
    return plain and not transposed and even and weight.shape[2:] == (4, 4) and weight.dtype == torch.float32


def _flops(maps: Tensor, weight: Tensor, geometry: Sequence[Any]) -> int:
    """Operations of a convolution or of either gradient: one product of each weight and position of the kernel."""
    stride, padding, dilation, transposed, *_ = geometry
    if transposed:  # the kernel is put to every pixel of the maps
        places = math.prod(maps.shape[2:])
    else:
        sides = zip(maps.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        places = math.prod((side + 2 * pad - reach * (size - 1) - 1) // by + 1 for side, size, by, pad, reach in sides)
    return 2 * maps.shape[0] * places * weight.numel()


def _name(part: str, maps: Tensor, weight: Tensor, geometry: Sequence[Any]) -> str:
    kind = "transposed " if geometry[3] else ""
    sizes = " x ".join(map(str, maps.shape))
    kernel = "x".join(map(str, weight.shape[2:]))
    return f"{kind}{part} {sizes}, {weight.shape[0]}:{weight.shape[1]} of {kernel}"
