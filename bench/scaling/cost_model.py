"""Cost of a step on W workers that average gradients by ring all-reduce: pure functions, seconds and bytes.

t(W) = compute(rows of one worker) + sum over all-reduces of [2 (W - 1) latency + 2 (W - 1) / W * bytes / bandwidth]

A message of n bytes costs latency + n / bandwidth (the alpha-beta model; Thakur, Rabenseifner & Gropp 2005, section 3).
The ring sends 2 (W - 1) messages of n / W bytes one after another, and no all-reduce does with fewer bytes (Patarasuk &
Yuan 2009). That is the step where gradients are sent after backward, as between CPUs. Where buckets are sent during it,
as between GPUs, each waits for its gradients and for the bucket before it, and only what outlasts backward counts. That
sending takes nothing from computing is an assumption: on CPUs its threads need the same cores. Workers are assumed to
be equally fast, unless the compute is that of the slowest (`seconds_of_slowest`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Network:
    """Constants of sending a message from one worker to the next."""

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Compute:
    """Seconds of one worker's step without communication: affine in its images."""

    fixed_seconds: float
    seconds_per_row: float

    def seconds(self, rows: float) -> float:
        """Seconds of a step on so many images."""
        return self.fixed_seconds + self.seconds_per_row * rows


@dataclass(frozen=True)
class Reduction:
    """One of the all-reduces of a step."""

    bytes: int
    per_step: float = 1.0
    """Occurrences a step: less than 1 where a phase's turn does not come at every step."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that one all-reduce averages, of a phase whose buckets are sent in order."""

    bytes: int
    lead_seconds: float = 0.0
    """Seconds of backward that are left when its gradients are computed."""


@dataclass(frozen=True)
class Cluster:
    """Hosts of several GPUs, and NCCL's constants: its model of the time of an all-reduce, ring or tree.

    NCCL's tuning model (src/graph/tuning.cc; Hu et al. 2025, "Demystifying NCCL"): a base latency, one for each step
    within a host and between hosts, and the bytes over the bandwidth of the bus. A ring over W workers on H hosts takes
    2 (W - 1) steps, 2 (H - 1) of them between hosts; a double binary tree 2 (W / H - 1) within and 2 log2(H) between.
    """

    gpus_per_host: int = 8
    bytes_per_second: float = 0.92 * 400e9
    """Bandwidth of the bus: of NVLink 4, 450 GB/s each way, and 8 InfiniBand cards of 400 Gbit/s a host the smaller, by
    NCCL's share of 0.92 for headers."""
    ring_seconds: tuple[float, float, float] = (8.4e-6, 3.4e-6, 14e-6)
    """Base, step within a host, step between hosts, of rings with the protocol Simple."""
    tree_seconds: tuple[float, float, float] = (14e-6, 1.25e-6, 8.5e-6)
    """The same of trees with the protocol LL128."""

    def all_reduce_seconds(self, count: int, workers: int) -> float:
        """Seconds of an all-reduce of `count` bytes, by the faster algorithm. Workers fill hosts."""
        if workers == 1:
            return 0.0
        hosts = -(-workers // self.gpus_per_host)
        transfer = 2 * (workers - 1) / workers * count / self.bytes_per_second
        base, within, between = self.ring_seconds
        ring = base + 2 * (workers - hosts) * within + 2 * (hosts - 1) * between + transfer
        base, within, between = self.tree_seconds
        tree = base + 2 * (workers // hosts - 1) * within + 2 * math.log2(hosts) * between + transfer
        return min(ring, tree)


def exposed_seconds(buckets: Sequence[Bucket], all_reduce: Callable[[int], float]) -> float:
    """Seconds by which the all-reduces of a phase outlast its backward pass.

    Args:
        buckets: in the order in which they are sent.
        all_reduce: seconds of an all-reduce of so many bytes.
    """
    end = -math.inf
    for bucket in buckets:
        end = max(end, -bucket.lead_seconds) + all_reduce(bucket.bytes)
    return max(0.0, end)


def all_reduce_seconds(count: int, workers: int, network: Network) -> float:
    """Seconds of a ring all-reduce of `count` bytes (Patarasuk & Yuan 2009)."""
    messages = 2 * (workers - 1)
    return messages * (network.latency_seconds + count / workers / network.bytes_per_second)


def seconds_of_slowest(stretches: Sequence[Sequence[float]]) -> float:
    """Seconds of workers that wait for each other after each stretch of their work.

    Args:
        stretches: seconds of each stretch for every worker, all as many.
    """
    return sum(max(of_all) for of_all in zip(*stretches, strict=True))


def communication_seconds(reductions: Sequence[Reduction], workers: int, network: Network) -> float:
    """Mean seconds of a step's all-reduces, one after another."""
    return sum(each.per_step * all_reduce_seconds(each.bytes, workers, network) for each in reductions)


def step_seconds(
    compute: Compute, reductions: Sequence[Reduction], network: Network, workers: int, rows: float
) -> float:
    """Seconds of a step on so many workers with `rows` images each."""
    return compute.seconds(rows) + communication_seconds(reductions, workers, network)


def weak_speedup(
    compute: Compute, reductions: Sequence[Reduction], network: Network, workers: int, rows: float
) -> float:
    """Images per second on so many workers over those on one, each with `rows` images."""
    return workers * compute.seconds(rows) / step_seconds(compute, reductions, network, workers, rows)


def strong_speedup(
    compute: Compute, reductions: Sequence[Reduction], network: Network, workers: int, global_rows: float
) -> float:
    """Images per second on so many workers over those on one, with `global_rows` images for all of them together."""
    share = global_rows / workers
    return compute.seconds(global_rows) / step_seconds(compute, reductions, network, workers, share)


def last_worth_doubling(speedups: Mapping[int, float], least_gain: float) -> int:
    """Workers after the last doubling, from one on, that multiplies the images per second by `least_gain` or more.

    Args:
        speedups: by numbers of workers 1, 2, 4, ... without a gap.
        least_gain: what a doubling has to bring, 1 to 2.
    """
    workers = 1
    while 2 * workers in speedups and speedups[2 * workers] >= least_gain * speedups[workers]:
        workers *= 2
    return workers


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of a line, neither below 0, with the least sum of squared relative errors of y > 0.

    Relative, because times from microseconds to seconds are all known to some per cent.
    """
    values, targets = np.asarray(x, np.float64), np.asarray(y, np.float64)
    design = np.stack([1 / targets, values / targets], axis=1)
    intercept, slope = np.linalg.lstsq(design, np.ones(len(targets)))[0].tolist()
    if intercept < 0:
        return 0.0, float(design[:, 1].sum() / (design[:, 1] ** 2).sum())
    if slope < 0:
        return float(design[:, 0].sum() / (design[:, 0] ** 2).sum()), 0.0
    return intercept, slope


def fit_compute(seconds_by_rows: Mapping[int, float]) -> Compute:
    """Constants of a step from the seconds that it takes on several numbers of images."""
    return Compute(*fit_line(list(seconds_by_rows), list(seconds_by_rows.values())))


def fit_network(seconds_by_bytes: Mapping[int, float], workers: int) -> Network:
    """Constants of the network from the seconds of all-reduces of several sizes over `workers`."""
    intercept, slope = fit_line(list(seconds_by_bytes), list(seconds_by_bytes.values()))
    messages = 2 * (workers - 1)
    return Network(intercept / messages, messages / workers / slope if slope else float("inf"))
