"""The kernels of group normalization under Triton's interpreter, in a process of their own."""

from pathlib import Path

import pytest

from tests.kernels.interpreter import run_tests_interpreted

pytest.importorskip("triton")

CASES = Path(__file__).with_name("group_norm_kernel_cases.py")


def test_interpreted_group_norm_equals_float64() -> None:
    run_tests_interpreted(CASES, "not slow")


@pytest.mark.slow
def test_interpreted_group_norm_equals_float64_everywhere() -> None:
    run_tests_interpreted(CASES, "slow")
