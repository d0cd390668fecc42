"""Resources of the compiled group normalization kernels, read from their machine code without a GPU.

No stack, no local memory, no atomics, accesses of 128 bits to all maps where alignment allows, and few enough registers
for the programs that have to run at once.
"""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from tests.kernels.calls import Call
from tests.kernels.group_norm_calls import Case, Inputs, backward_calls, forward_calls
from tests.kernels.kernel_compiler import TARGETS
from tests.kernels.machine_code import check_memory, usage_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"fits": (2, 128, 16, 16), "fills the chip": (1, 128, 64, 64), "does not fit": (1, 128, 128, 128)}
"""Maps of 32 groups, with rows and pixels of whole 16-byte accesses."""
MOST_REGISTERS = 128
"""Registers per thread with which the largest programs, of 512 threads, still fit on a GPU's processor."""
MOST_REGISTERS_OF = {
    "forward_kernel": 80,
    "statistics_kernel": 80,
    "normalize_kernel": 80,
    "parameters_kernel": 40,
}
"""The same of kernels that keep one tile at a time. Those of the backward pass keep maps and gradients."""
MOST_REGISTERS_ON_AMD = MOST_REGISTERS_OF | {"statistics_kernel": 104}
"""A compute unit of CDNA 3 has 512 KiB of registers, twice those of NVIDIA's processors, for as many threads."""
NARROW_LOADS, NARROW_STORES = 9, 4
"""Narrow: numbers of a group, a channel or a part: statistics, weight and bias, parts."""


def calls_of(case: Case, target: str) -> list[Call]:
    inputs = Inputs.of(case)
    statistics = torch.empty(case.shape[0], case.groups, 3)
    return [*forward_calls(inputs, target), *backward_calls(inputs, inputs.maps, statistics, target)]


def check(call: Call, target: str) -> None:
    usage = usage_of(call, target)
    kernel = call.launch.kernel.fn.__name__
    most = MOST_REGISTERS_OF if target.startswith("sm_") else MOST_REGISTERS_ON_AMD
    assert usage.registers <= most.get(kernel, MOST_REGISTERS), kernel
    # Kernels that only sum write no maps.
    sums_alone = kernel in ("statistics_kernel", "gradient_sums_kernel", "parameters_kernel")
    check_memory(usage, target, NARROW_LOADS, NARROW_STORES, wide_stores=not sums_alone)


QUICK = [
    (Case(SHAPES["fits"], 32, torch.bfloat16), "sm_80"),
    (Case(SHAPES["fills the chip"], 32), "sm_100"),
    (Case(SHAPES["does not fit"], 32, torch.bfloat16), "sm_90"),
    (Case(SHAPES["does not fit"], 32, torch.bfloat16, channels_last=True, residual=True), "gfx942"),
]


@pytest.mark.parametrize(("case", "target"), QUICK, ids=str)
def test_group_norm_kernels_stay_within_their_budget(case: Case, target: str) -> None:
    for call in calls_of(case, target):
        check(call, target)


def every_case() -> list[Case]:
    return [
        Case(shape, 32, dtype, channels_last, residual=residual)
        for shape, dtype, channels_last, residual in product(SHAPES.values(), DTYPES, (False, True), (False, True))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_group_norm_kernel_stays_within_its_budget(case: Case, target: str) -> None:
    for call in calls_of(case, target):
        check(call, target)
