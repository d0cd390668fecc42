"""The kernels under Triton's interpreter, in a process of their own."""

from pathlib import Path

import pytest

from tests.kernels.interpreter import run_tests_interpreted

pytest.importorskip("triton")


CASES = Path(__file__).with_name("latent_kernel_cases.py")


def test_interpreted_kernels_equal_their_float64_twins() -> None:
    run_tests_interpreted(CASES, "not slow")


@pytest.mark.slow
def test_interpreted_kernels_equal_their_float64_twins_at_other_widths() -> None:
    run_tests_interpreted(CASES, "slow")
