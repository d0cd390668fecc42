"""What is told of repeated measurements."""

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of some values, and how many they are."""
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return {"p20": low, "median": middle, "p80": high, "n": len(values)}
