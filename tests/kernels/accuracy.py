"""Comparison of a kernel's results with float64."""

import torch
from torch import Tensor


def ulps_apart(values: Tensor, expected: Tensor) -> Tensor:
    """Distance of `values` from `expected` rounded to their dtype, in numbers of that dtype; NaN equals NaN.

    Args:
        values: float32, bfloat16 or float16.
        expected: float64, of the same shape.

    Returns:
        int64.
    """
    integer = torch.int32 if values.dtype == torch.float32 else torch.int16

    def order(numbers: Tensor) -> Tensor:
        bits = numbers.contiguous().view(integer).long()
        lowest = torch.iinfo(integer).min
        return torch.where(bits < 0, lowest - bits, bits)

    rounded = expected.to(values.dtype)
    apart = (order(values) - order(rounded)).abs()
    return torch.where(values.isnan() & rounded.isnan(), 0, apart)


def errors_in_scale(values: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Errors as fractions of the scale, float64; 0 where both are equal, NaN and infinity included."""
    same = (values.double() == expected) | (values.isnan() & expected.isnan())
    return torch.where(same, 0.0, (values.double() - expected).abs() / scale)


def assert_close(values: Tensor, expected: Tensor, scale: Tensor, allowed: float) -> None:
    """Assert that errors are at most `allowed` of the scale, or in half precision at most 1 ulp."""
    errors = errors_in_scale(values, expected, scale)
    close = errors <= allowed
    if values.dtype != torch.float32:
        close |= ulps_apart(values, expected) <= 1
    assert close.all(), f"{int((~close).sum())} of {close.numel()} beyond {allowed}: up to {errors[~close].max()}"
