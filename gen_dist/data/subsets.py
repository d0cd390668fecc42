"""Choice of some images out of many."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def evenly_spaced(count: int, available: int) -> NDArray[np.int64]:
    """Places of `count` things spread evenly over `available`, in order: int64 [count].

    Many sources are in the order of their classes; the first images would be of one class. Places repeat where
    `count` is the larger number.
    """
    return np.arange(count) * available // max(count, 1)
