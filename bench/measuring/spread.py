"""Percentiles of repeated measurements."""

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of some values, and their number."""
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return {"p20": low, "median": middle, "p80": high, "n": len(values)}


def spread_of_ratios(above: Sequence[float], below: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """Spread over the rounds of `factor` times the ratio of two measurements, whose blocks are seconds apart.

    The ratio of medians would mislead: a shared machine has fast and slow minutes, and one median may come from a fast
    minute while the other comes from a slow one.
    """
    return spread([factor * one / other for one, other in zip(above, below, strict=True)])
