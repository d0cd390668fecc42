"""Memorization: the share of samples that are as near to a training image as hardly any held-out image is.

How near an image is to the training images is its distance to the nearest one over the mean distance to the nearest 50
(Carlini et al. 2023, section 5.1): near 1 for an image between them, near 0 for a copy, and the same in dense and in
sparse regions, so that blurred or common samples are no copies. Held-out images say how small it is by chance, as in
the three-sample test of Meehan et al. 2020: if samples were new images of the same kind, then the number of them below
the r-th smallest of m held-out images would follow a beta-binomial distribution, whatever the data and the features.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gen_dist.data.subsets import evenly_spaced
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, UnavailableError, Value, register
from gen_dist.parallel.collectives import rows_of_all

IMAGES = 2000
"""Most samples, and most held-out images, that are compared with the training images."""
NEIGHBOURS = 50
"""As in Carlini et al."""
QUANTILE = 0.01
"""Share of the held-out images that count as near by chance."""
EQUAL = 1e-3
"""Nearness below which a held-out image is a training image itself, but for rounding."""
LEAST_HELD_OUT = 10
MOST_CHANCE = 1e-4
"""Chance of so many near samples without copies, below which a generator copies."""
LEAST_FACTOR = 3.0
"""And the least share of near samples, over that of held-out images."""
_NUMBERS_PER_PART = 2**24
_ANNOUNCED_SECONDS = 20.0


class Nearest(NamedTuple):
    """Nearest training images of images [N]."""

    nearness: Tensor
    """float64 [N]: distance to the nearest one over the mean distance to the nearest 50, 0..1."""
    places: Tensor
    """int64 [N]: place of the nearest one among the training images."""


class Verdict(NamedTuple):
    """Comparison of samples with held-out images."""

    near: Tensor
    """bool [N]: samples that are nearer than all but a hundredth of the held-out images."""
    expected: float
    """Share of samples that would be near by chance."""
    chance: float
    """Probability of at least so many near samples if these were held-out images."""

    @property
    def share(self) -> float:
        """Share of the samples that are near."""
        return float(self.near.double().mean())

    @property
    def copies(self) -> bool:
        """True if the generator copies training images."""
        return self.chance < MOST_CHANCE and self.share >= LEAST_FACTOR * self.expected


class Copies(NamedTuple):
    """Samples and their nearest training images, as `copies_of` finds them."""

    verdict: Verdict
    order: Tensor
    """int64 [N]: places of the samples, the nearest to a training image first."""
    training_rows: Tensor
    """int64 [N]: place of the nearest training image of each sample, in the order of the samples."""
    mirrored: Tensor
    """bool [N]: samples that are nearer when mirrored."""


def nearest(points: Tensor, others: Tensor, neighbours: int = NEIGHBOURS) -> Nearest:
    """Nearness of points [N, F] to others [M, F], M >= 1."""
    neighbours = min(neighbours, len(others))
    centre = others.mean(dim=0)  # rounding would swallow small distances of points that are far from the origin
    near, far = (points - centre).float(), (others - centre).float()
    squares = far.square().sum(dim=1)
    per_part = max(1, min(500, _NUMBERS_PER_PART // max(neighbours * points.shape[1], len(others))))
    parts = []
    for part in near.split(per_part):
        found = torch.addmm(squares, part, far.T, alpha=-2.0).topk(neighbours, dim=1, largest=False).indices
        exact = (part[:, None].double() - far[found].double()).square().sum(dim=2).sqrt()
        least, place = exact.min(dim=1)
        mean = exact.mean(dim=1)
        parts.append((torch.where(mean > 0, least / mean, 0.0), found.gather(1, place[:, None])[:, 0]))
    if not parts:
        return Nearest(near.new_zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64, device=near.device))
    return Nearest(*(torch.cat(column) for column in zip(*parts, strict=True)))


def verdict(samples: Tensor, held_out: Tensor) -> Verdict:
    """Compare the nearness of samples [N] with that of held-out images [M], float64, M >= 1."""
    count = len(held_out)
    rank = max(1, math.floor(QUANTILE * count))
    near = samples < held_out.kthvalue(rank).values
    return Verdict(near, rank / (count + 1), chance_of_as_many(int(near.sum()), len(samples), rank, count))


def chance_of_as_many(near: int, samples: int, rank: int, held_out: int) -> float:
    """Chance that so many samples or more are below the held-out image of a rank, if all are draws of one distribution.

    The number is beta-binomial: the share below the image of rank r of M is distributed as Beta(r, M + 1 - r).
    """
    from scipy.special import betaln, logsumexp  # scipy.stats takes a second to import

    counts, after = np.arange(near, samples + 1), held_out + 1 - rank
    ways = -np.log(samples + 1) - betaln(samples - counts + 1, counts + 1)
    chances = ways + betaln(counts + rank, samples - counts + after) - betaln(rank, after)
    return min(1.0, float(np.exp(logsumexp(chances))))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share of `count` draws (Wilson 1927)."""
    z = 1.959963984540054
    middle, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)
    return low if share > 0 else 0.0, high if share < 1 else 1.0  # where rounding would leave 1e-19


def copies_of(context: Context) -> Copies:
    """Compare samples with training images, once for the metric and its picture.

    A sample and its mirror image are both compared, and the nearer one counts; held-out images likewise.

    Raises:
        UnavailableError: nearly all test images are training images too.
    """

    def compute() -> Copies:
        count = min(IMAGES, len(context.sampled.images))
        direct = _nearest_of_all(context, context.sampled.features[:count])
        flipped = _nearest_of_all(context, _mirrored_features(context, context.sampled.images[:count]))
        closest = torch.minimum(direct.nearness, flipped.nearness)
        mirrored = flipped.nearness < direct.nearness
        held_out = _held_out_nearness(context)
        held_out = held_out[held_out > EQUAL]
        if len(held_out) < LEAST_HELD_OUT:
            raise UnavailableError(f"all but {len(held_out)} of the test images are training images, too")
        places = torch.where(mirrored, flipped.places, direct.places)
        order = closest.argsort(stable=True)
        return Copies(verdict(closest, held_out), order, places, mirrored)

    return context.once("copies", compute)


def _held_out_nearness(context: Context) -> Tensor:
    """Nearness of test images, float64 [M]: the smaller one of each and of its mirror image, from the cache."""
    training = context.training

    def compute() -> Tensor:
        count = len(context.real.images)
        rows = torch.from_numpy(evenly_spaced(min(count, IMAGES), count)).to(context.real.images.device)
        direct = _nearest_of_all(context, context.real.features[rows])
        flipped = _nearest_of_all(context, _mirrored_features(context, context.real.images[rows]))
        return torch.minimum(direct.nearness, flipped.nearness)

    return context.reference(f"nearness to {len(training.rows)} training images", compute)


def _nearest_of_all(context: Context, features: Tensor) -> Nearest:
    """Nearness of features [N, F], each process taking its share of them."""
    found = nearest(features[slice(*context.share(len(features)))], context.training.features)
    return Nearest(*(rows_of_all(column, context.processes) for column in found))


def _mirrored_features(context: Context, images: Tensor) -> Tensor:
    network = context.network
    assert network is not None
    compute = lambda first, last: (network.of_images(images[first:last].flip(-1))[0],)  # noqa: E731
    return context.rows(len(images), "mirror images", compute)[0]


def measure(context: Context) -> dict[str, Value]:
    """Share of near samples, and as `memorization_data` that of held-out images."""
    found = copies_of(context)
    share, count = found.verdict.share, len(found.order)
    low, high = context.intervals["memorization"] = share_interval(share, count)
    if found.verdict.copies:
        mirrored = float((found.mirrored & found.verdict.near).double().mean())
        images, by_chance = f"{len(context.training.rows):,} training images", f"{found.verdict.expected:.1%}"
        context.warnings["memorization"] = (
            f"it copies training images: {share:.1%} of {count:,} samples ({low:.1%} to {high:.1%}) are as near to one "
            f"of {images} as {by_chance} of held-out images are, {mirrored:.1%} as mirror images"
        )
    return {"memorization": share, "memorization_data": found.verdict.expected}


def estimate(context: Context) -> tuple[str, float] | None:
    """Announcement of the training images that are looked at, and of the time in seconds if it is long."""
    network, total = context.network, len(context.dataset.train.labels)
    assert network is not None
    count, samples = len(context.training_rows), min(IMAGES, context.samples)
    images = count + samples + min(IMAGES, len(context.dataset.test.images))
    some = context.test_batch(0, 8).images
    network.of_images(some)  # warms up
    started = time.perf_counter()
    network.of_images(some)[0][-1, -1].item()
    seconds = (time.perf_counter() - started) / len(some) * images / context.processes.world_size
    if seconds < _ANNOUNCED_SECONDS and count == total:
        return None
    of_all = "" if count == total else f" of {total:,}"
    return f"distances of {samples:,} samples from {count:,}{of_all} training images", seconds


register(
    Metric(
        name="memorization",
        label="copies of training images",
        group="features",
        better=None,  # fewer near samples than held-out images are no merit
        meaning="Share of the samples that are as near to a training image as 1 % of held-out images are.",
        needs=("samples", "features", "test images", "training images"),
        named_after="other features",
        measure=measure,
        rests_on_features=True,
        takes_minutes=True,
        estimate=estimate,
    )
)
