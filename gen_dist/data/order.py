"""Keyed order: images of a step and held-out images, as functions of a seed and a position."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from gen_dist.randomness import Stream


def image_indices(
    count: int, seed: int, step: int, global_batch_size: int, first_row: int, rows: int
) -> NDArray[np.int64]:
    """Positions in the split of the images in rows first_row .. first_row + rows - 1 of the global batch of `step`.

    All batches of a run, laid end to end, are one permutation of the `count` images after another, each epoch with its
    own. So no image is repeated or dropped within an epoch, and a batch may straddle two epochs.

    Returns:
        int64 [rows], each in 0 .. count - 1.
    """
    parts = [
        epoch_order(count, seed, epoch)[span]
        for epoch, span in spans(count, step * global_batch_size + first_row, rows)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def spans(count: int, first: int, rows: int) -> list[tuple[int, slice]]:
    """Epochs of `rows` images from position `first` of a run, each with a slice of the epoch's order."""
    found = []
    end = first + rows
    while first < end:
        epoch, start = divmod(first, count)
        stop = min(start + end - first, count)
        found.append((epoch, slice(start, stop)))
        first += stop - start
    return found


def held_out_order(count: int) -> NDArray[np.int64]:
    """Fixed permutation of `count` images, int64 [count]: the held-out images are the first of it."""
    return _keyed_permutation(count, 0, Stream.HELD_OUT, 0)


@functools.lru_cache(maxsize=2)  # a batch that straddles two epochs needs both
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Positions in the split of the images of an epoch, in their order: int64 [count], not to be written to."""
    return _keyed_permutation(count, seed, Stream.ORDER, epoch)


def _keyed_permutation(count: int, seed: int, stream: Stream, step: int) -> NDArray[np.int64]:
    # Raw bits of a bit generator stay the same over NumPy versions; Generator.permutation is not promised to.
    philox = np.random.Philox(key=[seed, stream], counter=[0, 0, step, 0])
    permutation = np.argsort(philox.random_raw(count), kind="stable")
    permutation.flags.writeable = False
    return permutation
