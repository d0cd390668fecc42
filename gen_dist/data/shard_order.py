"""Order of the images of many shards, computed row by row: no table of images, whatever their number.

A Feistel network permutes the numbers 0 .. 2^b - 1 as a function of a key, and walking its cycles permutes 0 .. n - 1
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). One network over all images would read the shards at
random places. Here an epoch is blocked:

1. The shards are in a keyed order, anew each epoch, and cut into groups of up to `SHARDS_MIXED`.
2. Each shard of a group is cut into as many pieces of consecutive images, which are taken in turn from a keyed one on.
   Window j of the group is the j-th piece of each of its shards.
3. A keyed Feistel network permutes the images of a window, `IMAGES_MIXED` or fewer.

Mixing: an image comes at any time of an epoch, with equal chances but for rounding; it meets other pieces of other
shards each epoch, and within a window any order. Neighbours within a piece always share a window, as behind a shuffle
buffer of that size. A set of at most `IMAGES_MIXED` images in `SHARDS_MIXED` shards is one window, mixed as a whole.

Memory: 32 bytes a shard for an epoch's order, and two numbers a window of the group. Reading stays sequential within
each of the shards of a group, and a window's images are on the local disk at once: 8,192 of 100 KB are 0.8 GB.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.subsets import keyed_permutation
from gen_dist.randomness import Stream

# Part of the definition of a run.
SHARDS_MIXED = 16
IMAGES_MIXED = 8192
_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))  # of SplitMix64, Steele et al. 2014


class _Epoch(NamedTuple):
    shards: NDArray[np.int64]
    """Shards in their order."""
    edges: NDArray[np.int64]
    """First position in `shards` of each group, and their number."""
    starts: NDArray[np.int64]
    """Images before each group, and all of them."""


class _Group(NamedTuple):
    shards: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """Images of each shard."""
    shifts: NDArray[np.int64]
    """Piece of each shard that is in the first window."""
    starts: NDArray[np.int64]
    """Images of the group before each window, and all of them."""


class _Window(NamedTuple):
    first_images: NDArray[np.int64]
    """First image of each piece, counted over all shards."""
    starts: NDArray[np.int64]
    """Images of the window before each piece."""
    size: int
    keys: NDArray[np.uint64]
    """Keys of the network's rounds."""


class ShardOrder:
    """Images in the order of a run's epochs, as a function of (seed, position)."""

    def __init__(self, counts: NDArray[np.int64], seed: int) -> None:
        """
        Args:
            counts: images of each shard, int64 [shards].
            seed: key of the order.
        """
        self.count = int(counts.sum())
        """Number of images."""
        self._counts = counts
        self._seed = seed
        self._first_images = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        # A batch may straddle two epochs, groups and windows, and blocks are fetched ahead of it.
        self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)
        self._group = functools.lru_cache(maxsize=4)(self._make_group)
        self._window = functools.lru_cache(maxsize=16)(self._make_window)

    def images(self, first: int, rows: int) -> NDArray[np.int64]:
        """Images of consecutive positions of a run: all epochs, laid end to end.

        The time is that of a few windows, whatever `first` is: about 1 us an image for 64 images or more.

        Args:
            first: position of the first, such as step * global_batch_size + row.
            rows: number of positions.

        Returns:
            int64 [rows], each in 0 .. count - 1, counted over all shards.
        """
        found = []
        end = first + rows
        while first < end:
            epoch, place = divmod(first, self.count)
            starts = self._epoch(epoch).starts
            group = int(np.searchsorted(starts, place, "right")) - 1
            windows = self._group(epoch, group).starts
            place -= int(starts[group])
            window = int(np.searchsorted(windows, place, "right")) - 1
            place -= int(windows[window])
            part = self._window(epoch, group, window)
            stop = min(place + end - first, part.size)
            places = permuted(np.arange(place, stop, dtype=np.uint64), part.size, part.keys)
            pieces = np.searchsorted(part.starts, places, "right") - 1
            found.append(part.first_images[pieces] + (places - part.starts[pieces]))
            first += stop - place
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = keyed_permutation(len(self._counts), self._seed, Stream.SHARDS, epoch)
        groups = -(-len(shards) // SHARDS_MIXED)
        edges = np.arange(groups + 1) * len(shards) // groups
        return _Epoch(shards, edges, np.concatenate([[0], np.cumsum(self._counts[shards])])[edges])

    def _make_group(self, epoch: int, group: int) -> _Group:
        order = self._epoch(epoch)
        shards = order.shards[order.edges[group] : order.edges[group + 1]]
        sizes = self._counts[shards]
        windows = max(1, -(-int(sizes.sum()) // IMAGES_MIXED))
        raw = np.random.Philox(key=[self._seed, Stream.SHARD_WINDOWS], counter=[0, 0, epoch, 2 * group])
        shifts = (raw.random_raw(len(shards)) % np.uint64(windows)).astype(np.int64)
        pieces = np.arange(windows + 1)[:, None] + shifts
        starts = (sizes * pieces // windows - sizes * shifts // windows).sum(axis=1)
        return _Group(shards, sizes, shifts, starts)

    def _make_window(self, epoch: int, group: int, window: int) -> _Window:
        of = self._group(epoch, group)
        windows = len(of.starts) - 1
        pieces = (window + of.shifts) % windows
        first, end = of.sizes * pieces // windows, of.sizes * (pieces + 1) // windows
        starts = np.cumsum(end - first) - (end - first)
        counter = [0, window, epoch, 2 * group + 1]
        keys = np.random.Philox(key=[self._seed, Stream.SHARD_WINDOWS], counter=counter).random_raw(_ROUNDS)
        size = int(of.starts[window + 1] - of.starts[window])
        return _Window(self._first_images[of.shards] + first, starts, size, keys)


def permuted(places: NDArray[np.uint64], count: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Places of a keyed permutation of 0 .. count - 1.

    Args:
        places: uint64 [n], each below `count`.
        count: size of the domain, at most 2^62.
        keys: uint64 [rounds], the keys of the rounds.

    Returns:
        int64 [n].
    """
    bits = max(2, (count - 1).bit_length())
    found = _network(places, bits, keys)
    # The domain has less than twice as many numbers, or is of 4: few steps lead back into 0 .. count - 1.
    outside = np.flatnonzero(found >= count)
    while len(outside):
        found[outside] = _network(found[outside], bits, keys)
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)


def _network(numbers: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Alternating Feistel network on numbers of `bits` bits, whose halves differ by a bit if those are odd."""
    low_bits = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    halves = [numbers >> low_bits, numbers & masks[1]]
    for turn, key in enumerate(keys):
        changed = turn % 2
        mixed = (halves[1 - changed] + key) * _MULTIPLIERS[0]
        mixed ^= mixed >> np.uint64(32)
        mixed *= _MULTIPLIERS[1]
        mixed >>= np.uint64(33)
        mixed &= masks[changed]
        halves[changed] = halves[changed] ^ mixed
    return (halves[0] << low_bits) | halves[1]
