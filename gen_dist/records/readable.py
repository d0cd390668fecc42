"""Numbers as text for people. Each rounding has one name; which one fits depends on what the number is."""

from __future__ import annotations

import math


def readable_number(value: float) -> str:
    """Loss, rate or time, which is watched as it changes: 24,310, 107.93, 0.0120, 9.1e-05, nan."""
    size = abs(value)
    if not math.isfinite(value) or size >= 10_000:
        return f"{value:,.0f}"
    if size >= 1 or size == 0:
        return f"{value:.2f}"
    return f"{value:.4f}" if size >= 0.01 else f"{value:.1e}"


def readable_result(value: float) -> str:
    """Metric in a table of results, with three significant digits below 1: 12,479, 105.41, 0.0815, 17."""
    if abs(value) >= 1000 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:#.3g}"


def readable_figure(value: float) -> str:
    """Metric on a line of its own, with the decimals that repeated evaluations agree on: 12,479.3, 105.4123, 17."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def readable_share(value: float) -> str:
    """Share as a whole percentage: 71%, nan."""
    return f"{value:.0%}" if math.isfinite(value) else str(value)


def readable_tick(value: float) -> str:
    """Round number at an axis, with all of its digits: 0.25, 12,500."""
    return f"{value:,.10g}"


def readable_time(seconds: float) -> str:
    """Time left, in whole seconds: 0:07, 14:59, 2:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def readable_duration(seconds: float) -> str:
    """Time that something took; tenths of a second count below a minute: 7.3 s, 14:59."""
    return f"{seconds:.1f} s" if seconds < 60 else readable_time(seconds)
