"""The computed order of images in shards: a permutation of each epoch, mixed at every scale, at a place in no time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from gen_dist.data.shard_order import IMAGES_MIXED, SHARDS_MIXED, ShardOrder, permuted

RAGGED = np.random.default_rng(0).integers(0, 2000, 57)
"""Images of shards that are unlike; one of the shards is empty."""


def test_a_million_images_come_once_an_epoch() -> None:
    order = ShardOrder(np.full(100, 10_000), 3)
    for epoch in range(2):
        assert np.array_equal(np.sort(order.images(epoch * 10**6, 10**6)), np.arange(10**6))


@pytest.mark.parametrize("counts", [[1], [3, 0, 2], [5000], RAGGED, [100_000, 1, 1, 0, 40]], ids=str)
def test_each_image_of_unlike_shards_comes_once_an_epoch(counts: list[int]) -> None:
    order = ShardOrder(np.array(counts), 5)
    epochs = [order.images(epoch * order.count, order.count) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(order.count))
    if order.count > 10:
        assert not np.array_equal(epochs[0], epochs[1])


def test_any_part_of_the_order_is_that_part_of_the_whole() -> None:
    whole = ShardOrder(RAGGED, 9).images(0, 3 * int(RAGGED.sum()))
    for first, rows in ((0, 1), (8191, 3), (len(whole) // 3 - 5, 10), (len(whole) - 7, 7), (30_000, 20_000), (50, 0)):
        assert np.array_equal(ShardOrder(RAGGED, 9).images(first, rows), whole[first : first + rows])
    in_batches = [ShardOrder(RAGGED, 9).images(first, 24) for first in range(0, 2400, 24)]
    assert np.array_equal(np.concatenate(in_batches), whole[:2400])


def test_order_of_shards_is_the_one_that_earlier_versions_had() -> None:
    # These figures are part of the definition of a run. If they change, no old run can be resumed or replayed.
    assert ShardOrder(np.array([5, 3, 4]), 3).images(0, 24).tolist() == ORDER_OF_SEED_3
    assert ShardOrder(np.full(40, 10**6), 2**63 - 1).images(10**12, 6).tolist() == FAR_AWAY


def test_a_place_of_a_billion_images_takes_no_table_and_no_time() -> None:
    order = ShardOrder(np.full(10**5, 10**4), 7)
    order.images(3 * 10**9, 256)  # the sums of the shards of an epoch

    def microseconds_an_image() -> float:
        started = time.process_time()
        for batch in range(40):
            order.images(3 * 10**9 + 5 * 10**8 + 256 * batch, 256)
        return (time.process_time() - started) * 1e6 / (40 * 256)

    assert min(microseconds_an_image() for _ in range(5)) < 2.0
    held = [*order._window(3, 3125, 10), *order._epoch(3), *order._group(3, 3125)]
    assert sum(one.nbytes for one in held if isinstance(one, np.ndarray)) < 20 * 10**5


def test_images_within_a_window_are_mixed() -> None:
    window = IMAGES_MIXED // 2
    order = ShardOrder(np.full(SHARDS_MIXED, window // SHARDS_MIXED), 1)
    table = np.zeros((16, 16), np.int64)
    for epoch in range(200):
        image = order.images(epoch * window, window)
        np.add.at(table, (image * 16 // window, np.arange(window) * 16 // window), 1)
    # Rows and columns of a permutation have fixed sums.
    assert_even(table, 15 * 15 * window / (window - 1))


def test_shards_meet_others_at_other_times_in_each_epoch() -> None:
    shards, images = 4 * SHARDS_MIXED, 64
    order = ShardOrder(np.full(shards, images), 2)
    times = np.zeros((shards, 8), np.int64)
    together = np.zeros((shards, shards), np.int64)
    epochs = 400
    for epoch in range(epochs):
        image = order.images(epoch * order.count, order.count)
        (places,) = np.nonzero(image % images == epoch % images)  # one image of each shard
        np.add.at(times, (image[places] // images, places * 8 // order.count), 1)
        group = image.reshape(4, -1) // images
        for members in map(np.unique, group):
            together[np.ix_(members, members)] += 1
    assert_even(times, (shards - 1) * 7)
    pairs = together[np.triu_indices(shards, 1)]
    chance = (SHARDS_MIXED - 1) / (shards - 1)
    assert abs(pairs.mean() / epochs - chance) < 1e-9
    assert abs(pairs.var() / (epochs * chance * (1 - chance)) - 1) < 0.15


def test_an_image_comes_at_any_time_of_a_group_of_large_shards() -> None:
    windows, epochs = 16, 300
    size = windows * IMAGES_MIXED // SHARDS_MIXED
    order = ShardOrder(np.full(SHARDS_MIXED, size), 4)
    found = np.zeros((SHARDS_MIXED, windows), np.int64)
    for epoch in range(epochs):
        for window in range(windows):
            part = order._window(epoch, 0, window)
            first = int(part.first_images.min())
            shards = part.first_images // size
            pieces = part.first_images % size * windows // size
            found[shards[pieces == 5], window] += 1
            assert first >= 0
    assert found.sum() == epochs * SHARDS_MIXED
    assert_even(found, SHARDS_MIXED * (windows - 1))


def test_a_network_permutes_domains_of_any_size() -> None:
    keys = np.random.Philox(key=[1, 2]).random_raw(8)
    for count in (1, 2, 3, 5, 16, 17, 1000, 8191, 8192):
        assert sorted(permuted(np.arange(count, dtype=np.uint64), count, keys).tolist()) == list(range(count))


def assert_even(table: NDArray[np.int64], freedoms: float) -> None:
    """Chi-square test of equal counts, on both sides: too even is not random either."""
    expected = table.mean()
    share = stats.chi2.sf(((table - expected) ** 2 / expected).sum(), freedoms)
    assert 1e-4 < share < 1 - 1e-4, share


ORDER_OF_SEED_3 = [8, 1, 4, 5, 6, 9, 2, 7, 3, 11, 0, 10, 5, 11, 9, 7, 4, 0, 1, 2, 3, 8, 10, 6]
FAR_AWAY = [13708921, 12768582, 13709477, 21309320, 12768390, 2253972]
