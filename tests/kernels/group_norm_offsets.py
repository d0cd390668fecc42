"""Maps of more than 2^31 elements, of which the last program of a launch runs alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gen_dist.kernels import triton_group_norm
from tests.kernels.accuracy import assert_close
from tests.kernels.calls import Call, memory_of
from tests.kernels.group_norm_calls import EPS, Case, Inputs
from tests.kernels.group_norm_reference import ERROR, Reference
from tests.kernels.kernel_compiler import REPOSITORY
from tests.kernels.ptx.executor import execute
from tests.kernels.ptx.program import parse


def run_last_program(call: Call, directory: Path = REPOSITORY) -> Tensor:
    """Run the last program of a call alone, and return the outputs.

    Only the pages of memory that it touches are ever allocated.
    """
    compiled = call.compile("sm_90", directory)
    tensors = {**call.inputs, **call.outputs}
    memories = [memory_of(tensor) for name in compiled.runtime if (tensor := tensors[name]) is not None]
    x, y = call.launch.grid
    execute(parse(compiled.assembly), (x, y), memories, shared_bytes=compiled.shared_bytes, only=[x * y - 1])
    return call.output("outputs_ptr")


def lazily_zero(case: Case) -> Tensor:
    """Maps of zeros, whose memory exists where it is written."""
    return torch.from_numpy(np.zeros(case.elements, np.uint16)).view(case.dtype).view(case.shape)


def check_last_image(directory: Path = REPOSITORY) -> None:
    """Check the forward kernel on the last group of the last of 2^18 + 1 images."""
    case = Case((2**18 + 1, 32, 16, 16), 32, torch.bfloat16)
    assert case.elements > 2**31
    last = Inputs.of(replace(case, shape=(1, *case.shape[1:])))
    maps = lazily_zero(case)
    maps[-1] = last.maps[0]
    (launch,) = triton_group_norm.forward_launches(maps, case.groups, EPS, case.silu)
    call = Call(
        launch,
        {"maps_ptr": maps, "residual_ptr": None, "weight_ptr": last.weight, "bias_ptr": last.bias},
        {
            "outputs_ptr": lazily_zero(case),
            "sums_ptr": None,
            "statistics_ptr": torch.zeros(case.shape[0], case.groups, 3),
        },
    )
    outputs = run_last_program(call, directory)[-1, -1]
    expected = Reference(last)
    result, scale = (of["outputs_ptr"][-1, -1] for of in (expected.results, expected.scales))
    assert_close(outputs, result, scale, ERROR)
