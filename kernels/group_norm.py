"""Group normalization and SiLU, after a residual sum, in one operation (Wu & He 2018; Elfwing et al. 2018).

It has three implementations: that of CPUs (kernels/group_norm_cpu.py), the fused kernels of GPUs
(kernels/triton_group_norm.py), and those kernels' twin in torch operations, for tests and other devices.
"""

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .group_norm_cpu import GroupNormSilu
from .group_norm_layout import kernels_take
from .group_norm_traced import traced_group_norm_silu
from .group_norm_twin import double_backward, twin_backward, twin_forward
from .latent_layout import arithmetic_dtype, memory_format_of
from .noise import runs_triton
from .twice_differentiable import define_operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GroupNormActivation = Literal["silu", "none"]


@overload
def group_norm_silu(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    residual: None = None,
    activation: GroupNormActivation = "silu",
) -> Tensor: ...


@overload
def group_norm_silu(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    residual: Tensor,
    activation: GroupNormActivation = "silu",
) -> tuple[Tensor, Tensor]: ...


def group_norm_silu(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: GroupNormActivation = "silu",
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize groups of channels of maps, or of maps + residual, and activate: silu(norm(maps) * weight + bias).

    norm(x) = (x - mean) / sqrt(variance + eps), with the biased variance, over the channels of a group and all pixels
    of an image (Wu & He 2018, eq. 1 and 7); silu(y) = y / (1 + exp(-y)). All arithmetic is float32, or float64 for
    float64 maps, except that sums of maps and residual are rounded to the dtype of the maps.

    The residual is added before the normalization, where residual networks have it: a block's output,
    shortcut + convolution, is normalized by the next block and is its shortcut. So the sums are returned as well.
    Then neither this sum nor that of its two gradients is a pass over memory of its own.

    Backward keeps the maps (with a residual, the sums instead) and three numbers a group; it computes the normalized
    maps again. Gradients have gradients, under torch.func too, but for float32 and float64 maps on CPUs that are not
    compiled.

    Args:
        maps: [B, C, ...] of float32, bfloat16, float16 or float64, contiguous or channels_last.
        weight: [C], of one of these dtypes.
        bias: [C], as `weight`.
        groups: number of groups, a divisor of C; a group is C / groups adjacent channels.
        eps: number added to the variance.
        residual: as `maps`; None adds nothing.
        activation: silu, or none for the normalized maps themselves.

    Returns:
        outputs, in shape, dtype and memory format of `maps`; with a residual, outputs and maps + residual.

    Raises:
        ValueError: a shape, dtype or number is invalid.
    """
    _check(maps, weight, bias, groups, eps, residual, activation)
    silu = activation == "silu"
    if maps.device.type != "cpu" or maps.dtype in (torch.bfloat16, torch.float16):
        if residual is None:
            return group_norm_silu_operator(maps, weight, bias, groups, eps, silu)[0]
        return add_group_norm_silu_operator(maps, residual, weight, bias, groups, eps, silu)[:2]
    if residual is not None:
        maps = maps + residual
    weight, bias = weight.to(maps.dtype), bias.to(maps.dtype)
    if torch.compiler.is_exporting():  # other runtimes know these two, and have fast ones of their own
        outputs = F.group_norm(maps, groups, weight, bias, eps)
        outputs = F.silu(outputs) if silu else outputs
    elif torch.compiler.is_compiling():
        outputs = traced_group_norm_silu(maps, weight, bias, groups, eps, silu)
    else:
        outputs = GroupNormSilu.apply(maps, weight, bias, groups, eps, silu)
    return outputs if residual is None else (outputs, maps)


def _check(
    maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, residual: Tensor | None, activation: str
) -> None:
    if maps.ndim < 2:
        raise ValueError(f"maps {list(maps.shape)} are not [B, C, ...]")
    channels = maps.shape[1]
    if groups < 1 or channels % groups:
        divisors = [number for number in range(1, channels + 1) if channels % number == 0]
        raise ValueError(f"{groups} groups do not divide {channels} channels; use one of {divisors}")
    if maps.dtype not in DTYPES:
        raise ValueError(f"maps are {maps.dtype}; use float32, bfloat16, float16 or float64")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != (channels,) or parameter.dtype not in DTYPES or parameter.dtype != weight.dtype:
            raise ValueError(
                f"{name} is {parameter.dtype} {list(parameter.shape)}; it must be [{channels}], as the maps' channels, "
                "of a floating-point dtype that weight and bias share"
            )
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be at least 0")
    if residual is not None and (residual.shape != maps.shape or residual.dtype != maps.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)}, maps are {maps.dtype} {list(maps.shape)}: "
            "they must be equal"
        )
    if activation not in ("silu", "none"):
        raise ValueError(f"activation is {activation!r}; use silu or none")


def _forward(
    maps: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    maps = _dense(maps)
    arguments = (maps, _like(residual, maps), weight.contiguous(), bias.contiguous(), groups, eps, silu)
    if _runs_kernels(maps, groups):
        from . import triton_group_norm  # macOS and Windows have no Triton

        return triton_group_norm.forward(*arguments)
    return twin_forward(*arguments)


def _norm(maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    outputs, _, statistics = _forward(maps, None, weight, bias, groups, eps, silu)
    return outputs, statistics


def _add_norm(
    maps: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, sums, statistics = _forward(maps, residual, weight, bias, groups, eps, silu)
    assert sums is not None
    return outputs, sums, statistics


def _backward(
    outputs_gradient: Tensor,
    sums_gradient: Tensor | None,
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    maps = _dense(maps)
    outputs_gradient, sums_gradient = _like(outputs_gradient, maps), _like(sums_gradient, maps)
    arguments = (outputs_gradient, sums_gradient, maps, weight.contiguous(), bias.contiguous(), statistics)
    if _runs_kernels(maps, groups):
        from . import triton_group_norm_backward

        return triton_group_norm_backward.backward(*arguments, groups, silu)
    return twin_backward(*arguments, groups, silu)


def _runs_kernels(maps: Tensor, groups: int) -> bool:
    """True if the kernels take these dense maps on their device."""
    return runs_triton(maps.device) and kernels_take(maps, groups)


def _dense(maps: Tensor) -> Tensor:
    """Make maps dense in their memory format."""
    return maps.contiguous(memory_format=memory_format_of(maps))


def _like(tensor: Tensor | None, maps: Tensor) -> Any:
    """Make a tensor dense in the memory format of `maps`."""
    return None if tensor is None else tensor.contiguous(memory_format=memory_format_of(maps))


def _fake_maps(maps: Tensor) -> Tensor:
    return torch.empty_like(maps, memory_format=memory_format_of(maps))


def _fake_norm(maps: Tensor, weight: Tensor, bias: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_maps(maps), maps.new_empty((maps.shape[0], groups, 3), dtype=arithmetic_dtype(maps))


def _fake_add_norm(maps: Tensor, _: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs, statistics = _fake_norm(maps, *rest)
    return outputs, torch.empty_like(outputs), statistics


def _fake_backward(
    outputs_gradient: Tensor, sums_gradient: Tensor | None, maps: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_maps(maps), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _fake_double_backward(_: Any, __: Any, ___: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, maps, weight, bias, *_ = rest
    return _fake_maps(maps), *_fake_backward(maps, None, maps, weight, bias)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    maps, weight, bias, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(maps, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, outputs_gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, outputs_gradient, None), None, None, None


def _keep_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, bias, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(output[1], weight, bias, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate_sums(
    ctx: Any, outputs_gradient: Tensor | None, sums_gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradient, *parameter_gradients = _gradients(ctx, outputs_gradient, sums_gradient)
    return gradient, gradient, *parameter_gradients, None, None, None


def _gradients(
    ctx: Any, outputs_gradient: Tensor | None, sums_gradient: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of maps, weight and bias; the incoming gradient of an unused output is None."""
    if outputs_gradient is None:
        return sums_gradient, None, None
    found: tuple[Tensor, Tensor, Tensor] = group_norm_silu_backward_operator(
        outputs_gradient, sums_gradient, *ctx.saved_tensors, ctx.groups, ctx.silu
    )
    return found


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    outputs_gradient, sums_gradient, *tensors, ctx.groups, ctx.silu = inputs
    ctx.save_for_backward(outputs_gradient, *tensors)
    ctx.has_sums_gradient = sums_gradient is not None
    ctx.set_materialize_grads(False)


def _differentiate_gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    of_outputs_gradient, *others = group_norm_silu_double_backward_operator(
        *cotangents, *ctx.saved_tensors, ctx.groups, ctx.silu
    )
    return of_outputs_gradient, cotangents[0] if ctx.has_sums_gradient else None, *others, None, None, None


group_norm_silu_operator = define_operator("group_norm_silu", _norm, _fake_norm, _keep_inputs, _differentiate)
"""Operator of `group_norm_silu`: outputs and statistics, by the kernels on Triton devices, else by their twin.

Backward saves the maps, the parameters and the statistics.
"""
add_group_norm_silu_operator = define_operator(
    "add_group_norm_silu", _add_norm, _fake_add_norm, _keep_sums, _differentiate_sums
)
"""Operator of `group_norm_silu` with a residual: outputs, maps + residual and statistics."""
group_norm_silu_backward_operator = define_operator(
    "group_norm_silu_backward", _backward, _fake_backward, _keep_gradients, _differentiate_gradients
)
"""Gradients of the maps, weight and bias; with a residual, maps are the sums, and its gradient is theirs."""
group_norm_silu_double_backward_operator = define_operator(
    "group_norm_silu_double_backward", double_backward, _fake_double_backward
)
"""Gradients of those gradients, in torch operations on every device."""
