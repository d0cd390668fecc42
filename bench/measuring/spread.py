"""What is told of repeated measurements."""

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of some values, and how many they are."""
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return {"p20": low, "median": middle, "p80": high, "n": len(values)}


def spread_of_ratios(above: Sequence[float], below: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """The spread over the rounds of `factor` times the ratio of two measurements, whose blocks are seconds apart.

    Not the ratio of their medians: a shared machine has fast minutes and slow ones, and one median may be of a fast
    minute where the other is of a slow one. (Once that ratio was below those of four fifths of the rounds.)
    """
    return spread([factor * one / other for one, other in zip(above, below, strict=True)])
