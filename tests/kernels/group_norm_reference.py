"""Group normalization with SiLU in float64, its gradients, and the sizes of the terms of both."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.accuracy import assert_close
from tests.kernels.group_norm_calls import EPS, Inputs, run_passes
from tests.kernels.kernel_compiler import REPOSITORY

ERROR = 2e-6
"""Tolerance of float32 results, in units of the sum of their terms' sizes. Where terms cancel, as where a normalized
number times its weight is near minus the bias, no float32 arithmetic is nearer to the result.

bfloat16 and float16: 1 unit in the last place of the float64 result rounded once; where terms cancel, the tolerance of
float32. All this must hold with the largest error that NVIDIA documents for approximate instructions: 2^x, quotients,
reciprocal square roots.
"""


class Reference:
    """Results in float64 by torch's own operators, and their scales: the sums of the sizes of their terms.

    Attributes:
        sums: maps, or their sums with the residual, rounded to their dtype; the rest is computed from these.
        results: float64 results by the names of the kernels' arguments.
        scales: float64 scales by the same names.
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        self.sums = inputs.maps
        if inputs.residual is not None:
            self.sums = (inputs.maps.float() + inputs.residual.float()).to(case.dtype)
        self._sums = self.sums.double().requires_grad_()
        self._weight = inputs.weight.double().requires_grad_()
        self._bias = inputs.bias.double().requires_grad_()
        outputs = F.group_norm(self._sums, case.groups, self._weight, self._bias, EPS)
        outputs = F.silu(outputs) if case.silu else outputs
        gradient = inputs.outputs_gradient.double()
        maps, weight, bias = torch.autograd.grad(outputs, (self._sums, self._weight, self._bias), gradient)
        added = torch.zeros_like(maps) if inputs.sums_gradient is None else inputs.sums_gradient.double()
        self.results = {
            "outputs_ptr": outputs.detach(),
            "maps_gradient_ptr": maps + added,
            "weight_gradient_ptr": weight,
            "bias_gradient_ptr": bias,
        }
        self.scales = self._scales(inputs, gradient.abs(), added.abs())

    def _scales(self, inputs: Inputs, gradient: Tensor, added: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return _scales(inputs, self._sums, self._weight, self._bias, gradient, added)


def _scales(
    inputs: Inputs, sums: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor, added: Tensor
) -> dict[str, Tensor]:
    case = inputs.case

    def by_channel(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (sums.ndim - 2))

    def mean(values: Tensor) -> Tensor:
        grouped = values.reshape(case.shape[0], case.groups, -1)
        return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(values.shape)

    weight, bias = by_channel(weight), by_channel(bias)
    distance = sums - mean(sums)
    reciprocal = (mean(distance**2) + EPS).rsqrt()
    normal = distance * reciprocal
    # A normalized number is as exact as its group's mean: to a fraction of itself and of the deviation, which is 1.
    normal_scale = normal.abs() + 1.0
    before = normal * weight + bias
    before_scale = normal_scale * weight.abs() + bias.abs()
    outputs_scale, slope_scale = before_scale, torch.ones_like(before)
    if case.silu:
        # The error of exp(-x) is proportional to x.
        share = before.sigmoid()
        spread = share * (1.0 - share)
        slope, curvature = share + before * spread, spread * (2.0 + before * (1.0 - 2.0 * share))
        outputs_scale = slope.abs() * before_scale + (before * share).abs() * (1.0 + before.abs())
        slope_scale = share + (before * spread).abs() * (1.0 + before.abs()) + curvature.abs() * before_scale
    gradient = gradient * slope_scale
    level, tilt = mean(gradient * weight.abs()), mean(gradient * weight.abs() * normal_scale)
    over = [0, *range(2, sums.ndim)]
    return {
        "outputs_ptr": outputs_scale,
        "maps_gradient_ptr": reciprocal * (gradient * weight.abs() + level + normal_scale * tilt) + added,
        "weight_gradient_ptr": (gradient * normal_scale).sum(over),
        "bias_gradient_ptr": gradient.sum(over),
    }


def check_passes(
    inputs: Inputs, target: str, directory: Path = REPOSITORY, approximations: Sequence[float] = (0.0,)
) -> None:
    """Check the kernels of both passes against float64.

    Args:
        inputs: the case.
        target: where the kernels would run.
        directory: parent of the package whose kernels are compiled.
        approximations: errors of approximate instructions, as in `execute`, one run for each.
    """
    expected = Reference(inputs)

    def check_results(tensors: dict[str, Tensor]) -> None:
        if inputs.residual is not None:
            assert torch.equal(tensors["sums_ptr"], expected.sums)
        for name in expected.results.keys() & tensors.keys():
            assert_close(tensors[name], expected.results[name], expected.scales[name], ERROR)

    for approximation in approximations:
        passes = run_passes(inputs, target, directory, approximation, between=check_results)
        check_results(passes.tensors)
        assert passes.tensors.keys() >= expected.results.keys()
