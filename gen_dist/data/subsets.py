"""Choice of some images out of many, and keyed permutations of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gen_dist.randomness import Stream


def evenly_spaced(count: int, available: int) -> NDArray[np.int64]:
    """Places of `count` things spread evenly over `available`, in order: int64 [count].

    Many sources are in the order of their classes; the first images would be of one class. Places repeat where
    `count` is the larger number.
    """
    return np.arange(count) * available // max(count, 1)


def held_out_order(count: int) -> NDArray[np.int64]:
    """Fixed permutation of `count` images, int64 [count]: the held-out images are the first of it."""
    return keyed_permutation(count, 0, Stream.HELD_OUT, 0)


def keyed_permutation(count: int, seed: int, stream: Stream, step: int) -> NDArray[np.int64]:
    """Permutation of `count` places as a function of its key: int64 [count], not to be written to."""
    # Raw bits of a bit generator stay the same over NumPy versions; Generator.permutation is not promised to.
    philox = np.random.Philox(key=[seed, stream], counter=[0, 0, step, 0])
    permutation = np.argsort(philox.random_raw(count), kind="stable")
    permutation.flags.writeable = False
    return permutation
