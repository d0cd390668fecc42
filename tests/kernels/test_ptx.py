"""Kernels compiled for GPUs, executed on the CPU, against float64: every kernel, dtype, layout and option.

The tolerances are in tests/kernels/latent_checks.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from gen_dist.kernels.device_noise import device_words
from gen_dist.kernels.triton_noise import Launch
from tests.kernels.latent_calls import QUICK_CASES, Case, Inputs, backward_call, forward_call, with_logvar
from tests.kernels.latent_checks import check_backward, check_forward
from tests.kernels.latent_reference import reference
from tests.kernels.noise_calls import check_binarize, check_normal, normal_call

CUDA = ("sm_80", "sm_90", "sm_100")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)


def check(case: Case, target: str) -> None:
    inputs = Inputs.of(case)
    expected = reference(inputs)
    for approximation in (0.0, -1.0, 1.0):
        check_forward(inputs, expected, target, approximation=approximation)
        check_backward(inputs, expected, target, approximation=approximation)


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_kernels_compiled_for_sm_90_equal_float64(case: Case) -> None:
    check(case, "sm_90")


@pytest.mark.parametrize(("case", "target"), list(zip(QUICK_CASES, cycle(["sm_80", "sm_100"]), strict=False)), ids=str)
def test_kernels_compiled_for_other_gpus_equal_float64(case: Case, target: str) -> None:
    check(case, target)


def every_case() -> Iterator[Case]:
    """Every dtype, layout and option, at sizes from one latent to several programs a row."""
    shapes = {
        False: [(3, 2), (130, 2 * 20), (3, 2 * 1000), (2, 2 * 3000), (2, 6, 5), (3, 4, 3, 5)],
        True: [(3, 2, 3, 5), (2, 6, 5, 7), (2, 32, 9, 9), (2, 10, 2, 3, 2)],
    }
    options: list[dict[str, Any]] = [
        {},
        {"prior": True},
        {"samples": 3},
        {"samples": 2, "prior": True},
        {"deterministic": True, "samples": 2},
        {"misaligned": True, "prior": True},
    ]
    for dtype, channels_last in product(DTYPES, (False, True)):
        for shape, option in product(shapes[channels_last], options):
            yield replace(Case(shape, dtype, channels_last), **option)


@pytest.mark.slow
@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("case", list(every_case()), ids=str)
def test_every_compiled_kernel_equals_float64(case: Case, target: str) -> None:
    check(case, target)


@pytest.mark.parametrize("of", [{"of_kl": False}, {"of_latents": False}], ids=["latents only", "KL only"])
def test_gradients_of_one_output_alone(of: dict[str, Any]) -> None:
    inputs = Inputs.of(Case((3, 2 * 20), prior=True))
    check_backward(inputs, reference(inputs, **of), "sm_90", **of)


def test_one_gradient_for_the_divergence_of_all_rows() -> None:
    inputs = Inputs.of(Case((5, 2 * 64)))
    inputs = replace(inputs, kl_gradient=inputs.kl_gradient[:1].expand(5))
    check_backward(inputs, reference(inputs), "sm_90")


BELOW = (-80.0, -30.5, 0.0, 1e-3, -29.875)
BEYOND = (80.0, 20.5, 19.875, *BELOW)


# Next to variances of e^20 the divergence of a variance of e^-30 is lost to rounding, so those below have own cases.
@pytest.mark.parametrize("logvars", [BELOW, BEYOND], ids=["below", "beyond"])
@pytest.mark.parametrize("case", [Case((4, 2 * 64)), Case((4, 2 * 64), BFLOAT16)], ids=str)
def test_clamped_log_variances_get_no_gradient(case: Case, logvars: tuple[float, ...]) -> None:
    inputs = with_logvar(Inputs.of(case), *logvars)
    expected = reference(inputs)
    check_forward(inputs, expected, "sm_90")
    check_backward(inputs, expected, "sm_90")
    call = backward_call(inputs, "sm_90")
    call.run("sm_90")
    logvar, gradient = inputs.parameters.chunk(2, 1)[1], call.output("parameters_gradient_ptr").chunk(2, 1)[1]
    outside = (logvar < -30) | (logvar > 20)
    assert outside.any() and (gradient[outside] == 0).all() and (gradient[~outside] != 0).any()


def test_log_variances_of_posterior_and_prior_are_clamped_alike() -> None:
    inputs = with_logvar(Inputs.of(Case((2, 2 * 1500), BFLOAT16, samples=2, prior=True)), 40.0, 19.0, 0.0, -1.0)
    expected = reference(inputs)
    check_forward(inputs, expected, "sm_90")
    check_backward(inputs, expected, "sm_90")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    inputs = Inputs.of(Case((4, 2 * 64), dtype))
    inputs.parameters[1, 64 + 7] = torch.nan  # a log-variance
    inputs.parameters[2, 9] = torch.nan  # a mean
    forward, backward = forward_call(inputs, "sm_90"), backward_call(inputs, "sm_90")
    forward.run("sm_90")
    backward.run("sm_90")
    assert forward.output("latents_ptr").isnan().nonzero().tolist() == [[1, 7], [2, 9]]
    assert forward.output("kl_ptr").sum(1).isnan().tolist() == [False, True, True, False]
    assert backward.output("parameters_gradient_ptr").isnan().nonzero().tolist() == [[1, 64 + 7], [2, 9]]


RNG = torch.tensor([-2, 2**32 + 5])  # high half of the seed and of the step in use


@pytest.mark.parametrize(
    ("rows", "width", "target"), [(3, 7, "sm_80"), (130, 20, "sm_90"), (2, 1030, "sm_90"), (2, 1030, "sm_100")]
)
def test_normal_kernel_equals_its_definition(rows: int, width: int, target: str) -> None:
    check_normal(RNG, 9, rows, width, target)


@pytest.mark.parametrize(
    ("rows", "width", "target"), [(3, 7, "sm_80"), (130, 20, "sm_90"), (2, 1030, "sm_90"), (3, 784, "sm_100")]
)
def test_binarize_kernel_equals_its_definition(rows: int, width: int, target: str) -> None:
    check_binarize(RNG, 9, rows, width, target)


def test_normal_kernel_is_exact_at_the_rarest_words() -> None:
    # The smallest of a million words gives the largest radius, and the largest a radius near 0.
    words = device_words(RNG, 4, 0, 2**18, 4)
    for row in (words[:, 0].argmin(), words[:, 2].argmin(), words[:, 0].argmax(), words[:, 2].argmax()):
        check_normal(RNG, int(row), 1, 4, "sm_90")


@pytest.mark.parametrize("case", [Case((6, 2 * 20)), Case((6, 8, 5, 3), BFLOAT16, channels_last=True)], ids=str)
def test_two_shards_of_rows_are_bit_equal_to_the_whole(case: Case) -> None:
    whole = Inputs.of(case)
    call = forward_call(whole, "sm_90")
    call.run("sm_90")
    for first, last in ((0, 2), (2, 6)):
        shard = replace(case, shape=(last - first, *case.shape[1:]), first_row=case.first_row + first)
        part = forward_call(replace(Inputs.of(shard), parameters=whole.parameters[first:last]), "sm_90")
        part.run("sm_90")
        for name in part.outputs:
            assert torch.equal(part.output(name), call.output(name)[first:last])


def test_a_row_is_the_same_from_any_tile() -> None:
    # As `normal` in one program of 1,024 columns, and in four of 256 with other rows.
    call = normal_call(RNG, 4, 9, 2, 1000, "sm_90")
    call.run("sm_90")
    narrow = normal_call(RNG, 4, 9, 2, 1000, "sm_90")
    constants = {**narrow.launch.constants, "ROWS": 2, "COLUMNS": 256}
    launch = Launch(narrow.launch.kernel, (1, 4), narrow.launch.integers, constants, num_warps=2)
    replace(narrow, launch=launch).run("sm_90")
    assert torch.equal(call.output("normals_ptr"), narrow.output("normals_ptr"))
