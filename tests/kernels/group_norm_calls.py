"""Calls of the group normalization kernels for tests: cases, inputs and launches."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gen_dist.kernels import triton_group_norm, triton_group_norm_backward
from tests.kernels.calls import NAMES, Call, Run, placed, warp_size_of
from tests.kernels.kernel_compiler import REPOSITORY

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One call of `group_norm_silu`.

    Attributes:
        shape: shape of the maps, [B, C, ...].
        groups: number of groups.
        dtype: dtype of maps, residual and outputs.
        channels_last: True if they are channels_last.
        residual: True if a residual is added before the norm, and the sums have a gradient of their own.
        silu: True for SiLU, False for no activation.
        misaligned: True if tensors start one element off a multiple of 16 bytes.
        offset: mean of the maps; their deviation is 1, or `deviation`.
        parameters: dtype of weight and bias.
    """

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    residual: bool = False
    silu: bool = True
    misaligned: bool = False
    offset: float = 0.5
    deviation: float = 1.0
    parameters: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), f"{self.groups}groups", NAMES[self.dtype]]
        words += [name for name in ("channels_last", "residual", "misaligned") if getattr(self, name)]
        words += [] if self.silu else ["none"]
        words += [] if self.offset == 0.5 else [f"mean{self.offset:g}"]
        words += [] if self.parameters == torch.float32 else [f"{NAMES[self.parameters]}_parameters"]
        return "-".join(words)

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.elements // (self.shape[0] * self.shape[1])

    @property
    def elements(self) -> int:
        """Elements of the maps."""
        return int(torch.Size(self.shape).numel())


QUICK_CASES = (
    Case((2, 6, 5, 7), 3),
    Case((3, 6, 5, 7), 3, torch.float16, residual=True),
    Case((2, 32, 4, 8), 2, torch.bfloat16, channels_last=True),
    Case((2, 5, 3, 3), 5, torch.bfloat16, silu=False, misaligned=True),  # groups of one channel
    Case((1, 4, 70, 70), 2, torch.bfloat16, residual=True),  # groups of several programs
    Case((1, 12, 3, 40, 40), 3, channels_last=True),
)
"""Every dtype, layout and option, groups that fit into a program and others, in few calls, for few compilations."""


@dataclass
class Inputs:
    """Tensors of a case, and the gradients of its results."""

    case: Case
    maps: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    outputs_gradient: Tensor
    sums_gradient: Tensor | None

    @staticmethod
    def of(case: Case) -> "Inputs":
        """Draw normal numbers; each channel has a mean of its own."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def maps(scale: float, offset: float) -> Tensor:
            channels = draw(case.shape[1]).view(-1, *[1] * (len(case.shape) - 2))
            return place(case, (draw(*case.shape) + 0.5 * channels) * scale + offset)

        return Inputs(
            case=case,
            maps=maps(case.deviation, case.offset),
            residual=maps(0.5 * case.deviation, -0.25) if case.residual else None,
            weight=(1.0 + 0.5 * draw(case.shape[1])).to(case.parameters),
            bias=(0.5 * draw(case.shape[1])).to(case.parameters),
            outputs_gradient=place(case, draw(*case.shape)),
            sums_gradient=place(case, draw(*case.shape)) if case.residual else None,
        )


def place(case: Case, values: Tensor) -> Tensor:
    """Copy values to the case's dtype, memory format and alignment."""
    return placed(values, case.dtype, channels_last=case.channels_last, misaligned=case.misaligned)


def forward_calls(inputs: Inputs, target: str) -> list[Call]:
    """Calls of the forward pass, in order. They share tensors: what one writes, the next reads."""
    case = inputs.case
    launches = triton_group_norm.forward_launches(
        inputs.maps, case.groups, EPS, case.silu, warp_size=warp_size_of(target)
    )
    parts = triton_group_norm.forward_parts(inputs.maps, case.groups, launches)
    sums = None if inputs.residual is None else place(case, inputs.residual)
    read: dict[str, Tensor | None] = {"maps_ptr": inputs.maps, "residual_ptr": inputs.residual}
    parameters: dict[str, Tensor | None] = {"weight_ptr": inputs.weight, "bias_ptr": inputs.bias}
    written: dict[str, Tensor | None] = {
        "outputs_ptr": place(case, inputs.maps),
        "statistics_ptr": torch.empty(case.shape[0], case.groups, 3),
    }
    if parts is None:
        return [Call(launches[0], read | parameters, {**written, "sums_ptr": sums})]
    maps = inputs.maps if sums is None else sums
    return [
        Call(launches[0], read, {"sums_ptr": sums, "parts_ptr": parts}),
        Call(launches[1], {**parameters, "maps_ptr": maps, "parts_ptr": parts}, written),
    ]


def backward_calls(inputs: Inputs, sums: Tensor, statistics: Tensor, target: str) -> list[Call]:
    """Calls of the backward pass, in order.

    Args:
        inputs: the case.
        sums: the maps, or their sums with the residual.
        statistics: from the forward pass.
        target: where it runs.
    """
    case = inputs.case
    first, second = launches = triton_group_norm_backward.backward_launches(
        inputs.maps, case.groups, case.silu, warp_size=warp_size_of(target)
    )
    parts = triton_group_norm_backward.backward_parts(inputs.maps, case.groups, launches)
    read: dict[str, Tensor | None] = {
        "outputs_gradient_ptr": inputs.outputs_gradient,
        "maps_ptr": sums,
        "weight_ptr": inputs.weight,
        "bias_ptr": inputs.bias,
        "statistics_ptr": statistics,
    }
    added: dict[str, Tensor | None] = {"sums_gradient_ptr": inputs.sums_gradient}
    maps_gradient: dict[str, Tensor | None] = {"maps_gradient_ptr": place(case, inputs.maps)}
    of_parameters: dict[str, Tensor | None] = {
        "weight_gradient_ptr": torch.empty_like(inputs.weight),
        "bias_gradient_ptr": torch.empty_like(inputs.bias),
    }
    partial: dict[str, Tensor | None] = {**parts}
    if "SPANS" not in first.constants:
        return [Call(first, read | added, maps_gradient | partial), Call(second, partial, of_parameters)]
    return [Call(first, read, partial), Call(second, read | added | partial, maps_gradient | of_parameters)]


@dataclass
class Passes:
    """Finished forward and backward passes.

    Attributes:
        forward: runs of the forward kernels, in order.
        backward: runs of the backward kernels, in order.
        tensors: what they wrote, by argument name.
    """

    forward: list[Run]
    backward: list[Run]
    tensors: dict[str, Tensor]


def run_passes(
    inputs: Inputs,
    target: str,
    directory: Path = REPOSITORY,
    approximation: float = 0.0,
    between: Callable[[dict[str, Tensor]], None] | None = None,
) -> Passes:
    """Run both passes as training does: the backward pass takes the statistics that the forward pass wrote.

    `between` is called with what the forward pass wrote, before the backward pass is compiled.
    """
    tensors: dict[str, Tensor] = {}

    def run(calls: list[Call]) -> list[Run]:
        runs = []
        for call in calls:
            runs.append(call.run(target, directory, approximation))
            tensors.update({name: tensor for name, tensor in call.outputs.items() if tensor is not None})
        return runs

    forward = run(forward_calls(inputs, target))
    if between is not None:
        between(tensors)
    maps = tensors.get("sums_ptr", inputs.maps)
    return Passes(forward, run(backward_calls(inputs, maps, tensors["statistics_ptr"], target)), tensors)
