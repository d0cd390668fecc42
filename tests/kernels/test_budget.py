"""Resources of the compiled kernels, read from their machine code without a GPU.

No stack, no local memory, no atomics, accesses of 128 bits where alignment allows, few enough registers for half of a
GPU's threads to run at once, and few enough instructions per element.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from tests.kernels.calls import Call, warp_size_of
from tests.kernels.kernel_compiler import TARGETS
from tests.kernels.latent_calls import Case, Inputs, backward_call, forward_call
from tests.kernels.machine_code import Usage, check_memory, cuda_usage, ptxas_usage, usage_of
from tests.kernels.noise_calls import binarize_call, normal_call

KERNELS = {"forward": forward_call, "backward": backward_call}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of two programs, and images whose pixels have 16 channels: every access can be of 128 bits.
LAYOUTS = {False: (4, 2 * 2048), True: (4, 2 * 16, 16, 16)}
OPTIONS: list[dict[str, Any]] = [{}, {"samples": 4}, {"prior": True}, {"samples": 4, "prior": True}]

MOST_REGISTERS = 64
"""Registers per thread at half of a GPU's largest number of threads: eight warps per scheduler."""

MOST_INSTRUCTIONS = {
    ("forward", False): 70,
    ("forward", True): 80,
    ("backward", False): 80,
    ("backward", True): 106,
}
"""Instructions in the machine code per element of a thread, by kernel and presence of a prior.

With a prior four numbers are read and up to four written; in float32 a thread then holds four elements instead of
eight, so fewer elements share the address arithmetic."""

LOOP_INSTRUCTIONS = 4
"""The same with several samples. The code has the loop once, so this counts one sample and the work per image."""


def most_registers(kernel: str, case: Case, target: str) -> int:
    """`MOST_REGISTERS`, except for the backward pass over several samples, and on AMD's GPUs with a prior.

    That pass keeps parameters, prior and sums alive at once. 72 registers allow 28 warps of 32; limited to 64, NVIDIA's
    compiler spills 24 to 40 bytes per thread, AMD's 92 to 188.
    """
    if kernel == "backward" and target.startswith("gfx") and case.prior:
        return 80
    return 72 if kernel == "backward" and case.samples > 1 else MOST_REGISTERS


def every_case() -> list[Case]:
    return [
        replace(Case(LAYOUTS[channels_last], dtype, channels_last), **option)
        for dtype, channels_last, option in product(DTYPES, LAYOUTS, OPTIONS)
    ]


def check(kernel: str, case: Case, target: str) -> None:
    call = KERNELS[kernel](Inputs.of(case), target)
    usage = usage_of(call, target)
    assert usage.registers <= most_registers(kernel, case, target)
    # Narrow: seed and step, which may be one access or two, and a row's own part or gradient of the divergence.
    check_memory(usage, target, narrow_loads=3, narrow_stores=1)
    allowed = MOST_INSTRUCTIONS[kernel, case.prior] + LOOP_INSTRUCTIONS * (case.samples > 1)
    assert instructions_an_element(call, usage, target) <= allowed


def instructions_an_element(call: Call, usage: Usage, target: str) -> float:
    constants = call.launch.constants
    elements = constants["ROWS"] * constants["COLUMNS"] / (call.launch.num_warps * warp_size_of(target))
    return usage.operations.total() / elements


QUICK = [
    *product(KERNELS, [Case((4, 2 * 2048), dtype) for dtype in DTYPES], ["sm_90"]),
    *product(KERNELS, [Case((4, 2 * 16, 16, 16), torch.bfloat16, channels_last=True)], ["sm_80", "gfx942"]),
    *product(KERNELS, [Case((4, 2 * 2048), prior=True, samples=4)], ["sm_100"]),
]


@pytest.mark.parametrize(("kernel", "case", "target"), QUICK, ids=str)
def test_latent_kernels_stay_within_their_budget(kernel: str, case: Case, target: str) -> None:
    check(kernel, case, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", every_case(), ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_latent_kernel_stays_within_its_budget(kernel: str, case: Case, target: str) -> None:
    check(kernel, case, target)


@pytest.mark.parametrize("target", TARGETS)
def test_normal_kernel_stays_within_its_budget(target: str) -> None:
    call = normal_call(torch.tensor([1, 2]), 3, 4, 8, 1024, target)
    usage = usage_of(call, target)
    assert usage.registers <= 40
    check_memory(usage, target, narrow_loads=2, narrow_stores=0)
    assert instructions_an_element(call, usage, target) <= 50


@pytest.mark.parametrize("target", TARGETS)
def test_binarize_kernel_stays_within_its_budget(target: str) -> None:
    images = torch.zeros(8, 1024, dtype=torch.uint8)
    call = binarize_call(images, torch.tensor([1, 2]), 3, 4, target)
    usage = usage_of(call, target)
    assert usage.registers <= 40
    check_memory(usage, target, narrow_loads=3, narrow_stores=0)
    assert instructions_an_element(call, usage, target) <= 30


def test_two_ways_to_count_registers_agree() -> None:
    compiled = forward_call(Inputs.of(Case((4, 2 * 2048))), "sm_90").compile("sm_90")
    assert ptxas_usage(compiled).registers == cuda_usage(compiled).registers
