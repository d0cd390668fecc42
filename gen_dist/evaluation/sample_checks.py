"""Checks for a collapsed generator: the diversity of its samples, and the classes they cover.

Both are quick and rough. Samples that pass may still be poor; samples that fail are nearly equal or miss classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.data import Dataset, Split
from gen_dist.data.subsets import evenly_spaced
from gen_dist.evaluation.metrics.appearance import LARGEST_SIDE, NUMBERS_PER_PART, pair_distance_sum, pixel_points
from gen_dist.inference.model import GenerativeModel

SAMPLES = 500
SAMPLES_PER_CLASS = 20
"""Lower bound for data with many classes, so that each class has samples."""
REFERENCE_IMAGES = 5000
TEST_IMAGES = 1000
NEIGHBOURS = 5
LEAST_COARSE_SIDE = 8
FOUND_SHARE = 1 / 4
NEAR_QUANTILE = 0.95
LEAST_SURE_SHARE = 0.2
"""Share of test images whose class is sure, below which the classifier is too poor for a ratio."""


class _Classes(NamedTuple):
    """Classes of images by their neighbours."""

    found: Tensor
    """int64 [N]."""
    unanimous: Tensor
    """bool [N]: all neighbours are of one class."""
    nearest: Tensor
    """Squared distance of the nearest neighbour, [N]."""


class SampleChecks:
    """Checks of one model's samples against its data. Latents are the same each time, so that checks compare.

    A sample's class is that of most of its 5 nearest neighbours, by distance of pixels at half the resolution (16 x 16
    of images above 32 x 32), among up to 5,000 training images. Accuracy is 94.2 % on MNIST's test images, but
    30 % on CIFAR-10's, 18 % of which are classified as birds and 2 % as cars. So shares of classes are compared with
    the predictions for test images, not with their labels. A class is sure if all neighbours are of it and the nearest
    one is no farther than those of 95 % of the test images: noise and squiggles have neighbours too, of some class.
    """

    def __init__(self, model: GenerativeModel, dataset: Dataset) -> None:
        self._model = model
        self._dataset = dataset
        classes = dataset.labels.known_classes
        self._classes = classes if 2 <= classes <= 100 else None
        self._count = max(SAMPLES, SAMPLES_PER_CLASS * (self._classes or 0))

    def measure(self) -> Mapping[str, float | list[float]]:
        """The checks by name, all of them starting with `samples/`; none for a model that does not generate.

        - `diversity`: mean distance of two samples, as the root of the mean squared difference of pixels in 0..1.
        - `diversity_ratio`: the same over that of as many test images. Near 1 is healthy, near 0 is collapse.
        - `class_shares`: share of the samples in each class, in the order of the data set's class names.
        - `classes_found`: classes with at least a quarter of the share that they have of test images.
        - `sure_ratio`: share of the samples whose class is sure, over that of test images; none if a fifth of those or
          fewer are sure. Near 1 is healthy, near 0 are samples that resemble no class.
        - `class_variation`: total variation distance of these shares from those of test images, 0..1. Real images in
          place of the samples, in 10 equal classes, are about 0.07 away by chance.
        - `label_accuracy`: share of the samples in the class that was asked for. Real images reach the shares above.

        Those of classes are there for 2 to 100 classes, the last one for a conditional model. It is asked for the
        classes of training images, so in the shares that these have.
        """
        if not self._model.objective.generates:
            return {}
        labels = self._labels()
        samples = self._model.scaled_images(self._model.prior_latents(self._count), labels)
        diversity = _mean_distance(pixel_points(samples))
        real_diversity = self._real_diversity
        checks: dict[str, float | list[float]] = {"samples/diversity": diversity}
        if real_diversity > 0:  # no ratio if all test images are equal
            checks["samples/diversity_ratio"] = diversity / real_diversity
        if self._classes is None:
            return checks
        classes = self._nearest_classes(_coarse_points(samples))
        found, shares = classes.found, self._shares(classes.found)
        checks["samples/class_shares"] = shares.tolist()
        checks["samples/classes_found"] = float(((shares > 0) & (shares >= FOUND_SHARE * self._real_shares)).sum())
        near, real_sure = self._real_sureness
        if real_sure >= LEAST_SURE_SHARE:
            checks["samples/sure_ratio"] = _sure_share(classes, near) / real_sure
        checks["samples/class_variation"] = float(np.abs(shares - self._real_shares).sum() / 2)
        if labels is not None and bool((asked := labels < self._classes).any()):  # an unknown class is none to find
            right = found.cpu()[asked] == labels[asked]
            checks["samples/label_accuracy"] = float(right.double().mean())
        return checks

    def _labels(self) -> Tensor | None:
        """Labels requested from a conditional model; None for other models."""
        if not self._model.conditional:
            return None
        train = self._dataset.train
        return torch.from_numpy(train.labels[evenly_spaced(self._count, len(train.labels))])

    @functools.cached_property
    def _reference(self) -> tuple[Tensor, Tensor]:
        """Points [N, P] and labels [N] of training images, on the model's device."""
        train = self._dataset.train.sample
        places = _spread_over(train, REFERENCE_IMAGES)
        assert self._classes is not None
        places = places[train.labels[places] < self._classes]
        labels = torch.from_numpy(train.labels[places]).to(self._model.device)
        return self._points_of(train, places, _coarse_points), labels

    @functools.cached_property
    def _real_diversity(self) -> float:
        test = self._dataset.test
        return _mean_distance(self._points_of(test, _spread_over(test, self._count), pixel_points))

    @functools.cached_property
    def _real_classes(self) -> _Classes:
        test = self._dataset.test
        places = _spread_over(test, max(TEST_IMAGES, self._count))
        return self._nearest_classes(self._points_of(test, places, _coarse_points))

    @functools.cached_property
    def _real_shares(self) -> NDArray[np.float64]:
        return self._shares(self._real_classes.found)

    @functools.cached_property
    def _real_sureness(self) -> tuple[float, float]:
        """Largest squared distance of a near neighbour, and the share of test images whose class is sure."""
        nearest = self._real_classes.nearest.cpu().numpy()
        near = float(np.quantile(nearest, NEAR_QUANTILE))
        return near, _sure_share(self._real_classes, near)

    def _points_of(self, split: Split, places: NDArray[np.int64], points: Callable[[Tensor], Tensor]) -> Tensor:
        """Points [N, P] of images of a split, a few of which are in memory at once."""
        at_once = max(1, NUMBERS_PER_PART // split.images[0].size)
        parts = (split.for_model(places[first : first + at_once]) for first in range(0, len(places), at_once))
        return torch.cat([points(images.to(self._model.device)) for images in parts])

    def _shares(self, found: Tensor) -> NDArray[np.float64]:
        """Share of each class among these: [classes]."""
        assert self._classes is not None
        shares: NDArray[np.float64] = np.bincount(found.cpu().numpy(), minlength=self._classes) / len(found)
        return shares

    def _nearest_classes(self, points: Tensor) -> _Classes:
        """Class of each image by the neighbours of its point, [N, P]. Ties go to the nearer ones."""
        assert self._classes is not None
        reference, labels = self._reference
        # The sample's own norm is left out: it is the same for all of its neighbours.
        distances = torch.addmm(reference.square().sum(dim=1), points, reference.T, alpha=-2.0)
        neighbours = min(NEIGHBOURS, len(reference))
        closest = distances.topk(neighbours, dim=1, largest=False)
        nearest = labels[closest.indices]
        votes = torch.zeros(len(points), self._classes, device=points.device)
        # All that is added for nearness is less than one vote.
        for place in range(neighbours):
            votes[torch.arange(len(points), device=points.device), nearest[:, place]] += 1.0 + 0.5 ** (place + 2)
        return _Classes(
            votes.argmax(dim=1),
            (nearest == nearest[:, :1]).all(dim=1),
            closest.values[:, 0] + points.square().sum(dim=1),
        )


def _sure_share(classes: _Classes, near: float) -> float:
    """Share of the images whose class is sure."""
    return float((classes.unanimous & (classes.nearest <= near)).double().mean())


def _spread_over(split: Split, count: int) -> NDArray[np.int64]:
    """Places of up to `count` images spread over a split: many sources are in order of their classes."""
    return evenly_spaced(min(count, len(split.labels)), len(split.labels))


def _coarse_points(images: Tensor) -> Tensor:
    """Points [N, P] for finding the class of nearest neighbours: pixels at half the resolution of the other checks.

    Strokes that nearly meet do meet at it, so neighbours are of the right class more often, at a quarter of the cost.
    """
    height, width = images.shape[2:]
    largest = min(max(height, width), LARGEST_SIDE)
    return pixel_points(images, largest // 2 if largest >= 2 * LEAST_COARSE_SIDE else largest)


def _mean_distance(points: Tensor) -> float:
    """Mean distance of two different ones of the points [N, P]; 0 for a single one."""
    count = len(points)
    return float(pair_distance_sum(points, 0, count)) / (count * (count - 1)) if count > 1 else 0.0
