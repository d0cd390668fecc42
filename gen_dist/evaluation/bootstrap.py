"""Confidence intervals of figures of two sets of images, by drawing both sets again from themselves (Efron 1979).

An interval is the figure plus or minus 1.96 standard deviations of its values on drawn sets, more of few sets
(Student's t). Their mean is not used: a drawn set has fewer different images, which makes a Frechet distance larger. So
an interval says how far the figure would move with other samples and other reference images, as many of each. It does
not hold the bias of a Frechet distance at this count, nor the difference between two trainings.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gen_dist.randomness import Stream

REPLICATES = 100
REPLICATES_OF_WIDE_FEATURES = 10
"""Each takes a covariance and two decompositions of matrices."""
WIDE = 256
"""Features above which fewer sets are drawn."""


def drawn_counts(count: int, first: int, last: int, which: int) -> Tensor:
    """Number of times that each of `count` images is in the drawn sets `first` to `last` - 1: float64 [sets, count].

    Each set has `count` images, drawn with replacement. It is a function of its number, and of `which` of the two sets
    of images it is drawn from.
    """
    rows = []
    for replicate in range(first, last):
        philox = np.random.Philox(key=[0, Stream.BOOTSTRAP], counter=[0, 0, replicate, which])
        places = (philox.random_raw(count) >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)
        rows.append(np.bincount(places.astype(np.int64), minlength=count).astype(np.float64))
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count, dtype=torch.float64)


def interval(value: float, drawn: Tensor, least: float | None = None) -> tuple[float, float]:
    """95 % confidence interval of a value from its values on drawn sets [sets], of which none is below `least`."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    spread = float(stdtrit(len(drawn) - 1, 0.975) * drawn.double().std())
    low = value - spread
    return low if least is None else max(least, low), value + spread
