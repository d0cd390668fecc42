"""The cost model of a step on many workers, against answers worked out by hand."""

import pytest

from bench.measuring.spread import spread_of_ratios
from bench.scaling.cost_model import (
    Bucket,
    Cluster,
    Compute,
    Network,
    Reduction,
    all_reduce_seconds,
    communication_seconds,
    exposed_seconds,
    fit_compute,
    fit_line,
    fit_network,
    last_worth_doubling,
    step_seconds,
    strong_speedup,
    weak_speedup,
)

NETWORK = Network(latency_seconds=1e-3, bytes_per_second=1e6)


@pytest.mark.parametrize(
    ("workers", "seconds"),
    [
        (1, 0.0),  # nothing to send
        (2, 2 * 1e-3 + 4.0),  # 2 messages of 2 MB
        (4, 6 * 1e-3 + 6.0),  # 6 messages of 1 MB
    ],
)
def test_a_ring_sends_2_w_minus_1_messages_of_a_wth(workers: int, seconds: float) -> None:
    assert all_reduce_seconds(4_000_000, workers, NETWORK) == pytest.approx(seconds, rel=1e-12)


def test_a_step_is_its_compute_and_then_its_reductions() -> None:
    reductions = [Reduction(1_000_000), Reduction(500_000, per_step=0.2)]
    assert communication_seconds(reductions, 2, NETWORK) == pytest.approx(1.002 + 0.2 * 0.502)
    assert step_seconds(Compute(0.5, 0.01), reductions, NETWORK, 2, 100) == pytest.approx(1.5 + 1.1024)


def _seconds_of_bytes(count: int) -> float:
    return count / 1000


@pytest.mark.parametrize(
    ("buckets", "seconds"),
    [
        ([Bucket(2000), Bucket(1000)], 3.0),  # both wait for the end of backward
        ([Bucket(2000, 5.0), Bucket(1000, 0.5)], 0.5),  # the first is sent within, half of the second
        ([Bucket(2000, 1.0), Bucket(1000, 0.5)], 2.0),  # the second waits for the first as well
        ([Bucket(2000, 9.0), Bucket(1000, 5.0)], 0.0),
    ],
)
def test_what_outlasts_backward_counts(buckets: list[Bucket], seconds: float) -> None:
    assert exposed_seconds(buckets, _seconds_of_bytes) == pytest.approx(seconds)


def test_a_cluster_takes_the_faster_of_ring_and_tree() -> None:
    cluster = Cluster(2, 1e9, ring_seconds=(1e-6, 2e-6, 5e-6), tree_seconds=(10e-6, 1e-6, 4e-6))
    # A ring of 2 GPUs: 2 steps within a host. Of 4 on 2 hosts: 4 steps within, 2 between.
    assert cluster.all_reduce_seconds(1000, 2) == pytest.approx(1e-6 + 4e-6 + 1e-6)
    assert cluster.all_reduce_seconds(1000, 4) == pytest.approx(min(1e-6 + 8e-6 + 10e-6, 10e-6 + 2e-6 + 8e-6) + 1.5e-6)
    # A tree of 64 hosts: 2 steps within, 12 between.
    assert cluster.all_reduce_seconds(1000, 128) == pytest.approx(10e-6 + 2e-6 + 48e-6 + 2e-6 * 127 / 128)
    assert cluster.all_reduce_seconds(1000, 1) == 0


def test_speedups_of_weak_and_strong_scaling() -> None:
    compute, reductions = Compute(1.0, 0.01), [Reduction(1_000_000)]
    # One worker: 1 s + 100 images at 10 ms. Two: 1.002 s more.
    assert weak_speedup(compute, reductions, NETWORK, 1, 100) == 1
    assert weak_speedup(compute, reductions, NETWORK, 2, 100) == pytest.approx(2 * 2 / 3.002)
    assert strong_speedup(compute, reductions, NETWORK, 1, 100) == 1
    assert strong_speedup(compute, reductions, NETWORK, 2, 100) == pytest.approx(2 / 2.502)


def test_speedup_is_the_workers_where_communication_is_free() -> None:
    for speedup in (weak_speedup, strong_speedup):
        assert speedup(Compute(0.0, 0.01), [], NETWORK, 8, 64) == pytest.approx(8)


def test_doubling_stops_before_the_first_that_brings_too_little() -> None:
    assert last_worth_doubling({1: 1.0, 2: 1.9, 4: 3.0, 8: 3.5, 16: 7.0}, least_gain=1.2) == 4
    assert last_worth_doubling({1: 1.0, 2: 1.2}, least_gain=1.2) == 2
    assert last_worth_doubling({1: 1.0, 2: 0.7}, least_gain=1.2) == 1


def test_a_line_is_found_again() -> None:
    assert fit_line([1, 2, 10], [5, 7, 23]) == pytest.approx((3, 2))


def test_a_line_has_no_negative_part() -> None:
    # y = x^2 calls for an intercept below 0. With none, the slope is sum(x/y) / sum((x/y)^2) = 1.5 / 1.25.
    assert fit_line([1, 2], [1, 4]) == pytest.approx((0, 1.2))
    assert fit_line([1, 2], [4, 1]) == pytest.approx((1.25 / 1.0625, 0))


def test_constants_are_found_again_from_times() -> None:
    compute = Compute(2e-3, 3e-5)
    fitted = fit_compute({rows: compute.seconds(rows) for rows in (16, 64, 512)})
    assert (fitted.fixed_seconds, fitted.seconds_per_row) == pytest.approx((2e-3, 3e-5))
    for workers in (2, 4):
        network = fit_network({n: all_reduce_seconds(n, workers, NETWORK) for n in (4, 4096, 2**20)}, workers)
        assert (network.latency_seconds, network.bytes_per_second) == pytest.approx((1e-3, 1e6))


def test_a_machine_that_slows_down_leaves_the_ratios_equal() -> None:
    alone, joined = [1.0, 1.0, 2.0, 2.0, 1.0], [1.0, 1.0, 2.0, 2.0, 2.0]  # the machine slows down within the last round
    assert spread_of_ratios(alone, joined, 2.0) == pytest.approx({"p20": 1.8, "median": 2.0, "p80": 2.0, "n": 5})
