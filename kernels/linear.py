"""A linear layer that multiplies float32 matrices with the faster of torch's two CPU libraries, MKL and oneDNN.

torch gives float32 matrix products to MKL, which does not use the 512-bit vectors of AMD's processors. oneDNN does:
there, forward and both gradients of a layer of 784 x 400 take half the time in it. On AMD's processors without such
vectors MKL is faster: whole VAE steps take 1.1 to 1.2 times as long in oneDNN.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_WEIGHTS = 2**16
"""Smallest number of weights for which oneDNN is faster; measured on two Zen 5 cores at batches of 128 and 256."""


class Linear(nn.Linear):
    """An `nn.Linear` with equal parameters, names and initial values, and equal results up to rounding."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, in_features] -> [B, out_features]."""
        weight = self.weight  # read once: a parametrization recomputes it at each access
        # Compiled code and autocast choose their own matrix products.
        if (
            inputs.device.type == "cpu"
            and inputs.dtype == weight.dtype == torch.float32
            and inputs.ndim == 2
            and weight.numel() >= LEAST_WEIGHTS
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and onednn_is_faster()
        ):
            output: Tensor = _OneDnnLinear.apply(inputs, weight, self.bias)
            return output
        return F.linear(inputs, weight, self.bias)


@functools.cache
def onednn_is_faster() -> bool:
    """True if this machine has oneDNN, and a processor on which MKL is slow."""
    path = Path("/proc/cpuinfo")
    return path.exists() and mkl_is_slow(path.read_text()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def mkl_is_slow(cpuinfo: str) -> bool:
    """True if the text of /proc/cpuinfo describes an AMD processor with 512-bit vectors.

    The choice does not depend on a timing, so it is equal in any two runs that must agree bit for bit.
    """
    return "AuthenticAMD" in cpuinfo and "avx512f" in cpuinfo


class _OneDnnLinear(torch.autograd.Function):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = sum dy. The gradients are differentiable products themselves."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_linear(inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Save tensors; separate from `forward`, as torch.func requires."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight, _ = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias = wanted_gradients(ctx)
        return (
            _OneDnnLinear.apply(gradient, weight.t(), None) if wants_inputs else None,
            _OneDnnLinear.apply(gradient.t(), inputs.t(), None) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs [N, K] times the transpose of weight [M, K], plus bias [M]: float32 [N, M]. All may be views."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return output


def wanted_gradients(ctx: Any) -> tuple[bool, bool, bool]:
    """True for each gradient of inputs, weight and bias (all saved) that is still needed.

    Gradients of leaves frozen since the forward pass are not needed. With `autograd.grad`, or `backward` with `inputs`,
    the engine skips unneeded gradients of torch's own layers, but a Python function learns only which tensors required
    a gradient at the forward pass.
    """
    return tuple(  # type: ignore[return-value]
        wanted and (tensor is None or tensor.requires_grad)
        for wanted, tensor in zip(ctx.needs_input_grad, ctx.saved_tensors, strict=True)
    )
