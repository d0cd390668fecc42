"""Inputs of the metrics: a model's samples, the test split and their features, each computed once, when needed.

Sets of images are cut into blocks of 250 rows, fewer of large images, and each process takes whole blocks. A row thus
goes through every network together with the same others whatever the number of processes, and figures agree to the
rounding of a sum.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gen_dist.data import Dataset, cache_directory, image_indices
from gen_dist.data.subsets import evenly_spaced
from gen_dist.evaluation.features import FeatureNetwork
from gen_dist.evaluation.kept import KeptTensors
from gen_dist.evaluation.reference import ReferenceImages
from gen_dist.inference.model import GenerativeModel, PriorName
from gen_dist.networks.perceptual import PerceptualDistance
from gen_dist.objectives import Batch
from gen_dist.objectives.evaluating import rows_per_pass
from gen_dist.parallel.collectives import from_main, rows_of_all, sum_over_processes
from gen_dist.parallel.processes import Processes

ROWS_PER_BLOCK = 250
TRAINING_IMAGES = 50_000
"""Training images that are looked at, spread over the split: it may be larger than memory."""
_SECONDS_BETWEEN_LOGS = 20.0
"""Seconds after which a log, which has no bar that moves, shows how far the work is."""

T = TypeVar("T")


class Images(NamedTuple):
    """Images [N, ...] with their features and classes. Every process has all rows."""

    images: Tensor
    """uint8 [N, C, H, W], or float32 in 0..255 for values other than 8-bit ones: the model's range, unrounded."""
    features: Tensor
    """float32 [N, F]; F is 0 without a feature network."""
    classes: Tensor | None
    """int64 [N], predicted by the network; None if it has no classifier."""


class TrainingImages(NamedTuple):
    """Some of the training images, or all of them."""

    rows: NDArray[Any]
    """Places in `dataset.train.sample`, int64 [N]."""
    features: Tensor
    """float32 [N, F]. Every process has all rows."""


class Context:
    """Model, test data and the results computed from both.

    Methods that compute on rows or sums are collective calls: all processes make them together.
    """

    def __init__(
        self,
        model: GenerativeModel,
        dataset: Dataset,
        processes: Processes,
        network: FeatureNetwork | None,
        samples: int,
        nll_samples: int,
        nll_rows: NDArray[Any],
        *,
        reconstruction_network: FeatureNetwork | None = None,
        perceptual: PerceptualDistance | None = None,
        reference: ReferenceImages | None = None,
        with_intervals: bool = True,
        prior: PriorName = "normal",
    ) -> None:
        """See `gen_dist.evaluation.evaluator.evaluate`.

        Args:
            model: the model.
            dataset: the data that it was trained on.
            processes: processes that share the work.
            network: network whose features of samples and test images are compared, if any.
            samples: number of samples.
            nll_samples: importance samples of one image.
            nll_rows: places of the chosen test images in their split, int64.
            reconstruction_network: network whose features of reconstructions are compared: `network`, or
                EfficientNet-Lite0 for images that `network` is not there for.
            perceptual: distance of images from their reconstructions.
            reference: images that samples are compared with; None is the test split.
            with_intervals: compute confidence intervals, too.
            prior: distribution that the samples' latents are drawn from.
        """
        self.model = model
        self.objective = model.objective
        self.dataset = dataset
        self.processes = processes
        self.network = network
        self.reconstruction_network = reconstruction_network or network
        self.perceptual = perceptual
        self.with_intervals = with_intervals
        self.prior: PriorName = prior
        self.samples = samples
        self.nll_samples = nll_samples
        self.nll_rows = nll_rows
        self.rng = torch.tensor([model.config.seed, 0], dtype=torch.int64, device=processes.device)
        self.seconds: dict[str, float] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        """95 % confidence intervals of figures, by the metric's name; metrics add theirs."""
        self.warnings: dict[str, str] = {}
        """Findings on the model, as clauses, by the metric's name, for the console, the report and the card."""
        self._once: dict[str, Any] = {}
        self._kept: dict[str, KeptTensors] = {}
        self.compared = reference

    # ------------------------------------------------------------------------------------------------------ images

    @functools.cached_property
    def sampled(self) -> Images:
        """The model's samples."""
        with self.stage("samples"):
            return Images(*self._seen(self.samples, "samples", self._samples))

    @functools.cached_property
    def real(self) -> Images:
        """The images of the test split. Their features and classes are kept in the cache."""
        count = len(self.dataset.test.images)
        # Some rows at a time: values other than 8-bit ones are scaled in float64.
        rows = (slice(first, first + ROWS_PER_BLOCK) for first in range(0, count, ROWS_PER_BLOCK))
        images = torch.cat([self.dataset.test.for_model(some).to(self.processes.device) for some in rows])
        if self.network is None:
            return Images(images, images.new_empty((count, 0), dtype=torch.float32), None)

        def compute() -> dict[str, Tensor]:
            _, features, classes = self._seen(count, "test images", lambda f, last: self.test_batch(f, last).images)
            return {"features": features} | ({} if classes is None else {"classes": classes})

        found = self.references("features", compute)
        return Images(images, found["features"], found.get("classes"))

    @functools.cached_property
    def compared_features(self) -> Tensor:
        """Features of the images that samples are compared with, float32 [N, F]. Every process has all rows."""
        compared, network = self.compared, self.network
        if compared is None:
            return self.real.features
        if compared.name == "train" and compared.count == len(self.training_rows):
            return self.training.features
        assert network is not None

        def compute(first: int, last: int) -> tuple[Tensor]:
            return (network.of_images(compared.images(first, last).to(self.processes.device))[0],)

        count = compared.count
        return self.compared_reference("features", lambda: self.rows(count, "reference images", compute)[0])

    @functools.cached_property
    def training_rows(self) -> NDArray[Any]:
        """Places in `dataset.train.sample` of the training images that are looked at, int64 [N]."""
        count = len(self.dataset.train.sample.labels)
        return evenly_spaced(min(count, TRAINING_IMAGES), count)

    @functools.cached_property
    def training(self) -> TrainingImages:
        """Features of up to `TRAINING_IMAGES` training images, spread over the split. They are kept in the cache."""
        train, network, rows = self.dataset.train.sample, self.network, self.training_rows
        assert network is not None

        def compute(first: int, last: int) -> tuple[Tensor]:
            return (network.of_images(train.for_model(rows[first:last]).to(self.processes.device))[0],)

        name = f"features of {len(rows)}"
        found = self.references(name, lambda: {name: self.rows(len(rows), "training images", compute)[0]}, "train")
        return TrainingImages(rows, found[name])

    def test_batch(self, first: int, last: int) -> Batch:
        """A range of rows of the test split. Noise is keyed by the place in the split."""
        test, device = self.dataset.test, self.processes.device
        images, labels = test.for_model(slice(first, last)), torch.from_numpy(test.labels[first:last])
        return Batch(images.to(device), labels.to(device), self.rng, first)

    def labels(self, first: int, last: int) -> Tensor | None:
        """Labels for samples of a conditional model: test labels in keyed order. None for other models."""
        if not self.model.conditional:
            return None
        labels = self.dataset.test.labels
        return torch.from_numpy(labels[image_indices(len(labels), 0, 0, 1, first, last - first)])

    def _samples(self, first: int, last: int) -> Tensor:
        latents = self.model.latents(last - first, first_row=first, prior=self.prior)
        return self.model.scaled_images(latents, self.labels(first, last))

    def _seen(
        self, count: int, what: str, images_of: Callable[[int, int], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, features and classes of `count` rows."""

        def compute(first: int, last: int) -> tuple[Tensor, ...]:
            images = images_of(first, last)
            if self.network is None:
                return images, images.new_empty((len(images), 0), dtype=torch.float32)
            return images, *(tensor for tensor in self.network.of_images(images) if tensor is not None)

        images, features, *classes = self.rows(count, what, compute)
        return images, features, classes[0] if classes else None

    # --------------------------------------------------------------------------------------------------- computing

    def rows(self, count: int, what: str, compute: Callable[[int, int], tuple[Tensor, ...]]) -> list[Tensor]:
        """Compute tensors of `count` rows, split over processes; every process gets all rows on the model's device.

        Args:
            count: number of rows.
            what: shown beside the progress bar.
            compute: function of the range [first, last) of a block to tensors [last - first, ...].
        """
        size = self._rows_per_block(count, compute)
        mine = range(*self.share(-(-count // size)))
        shown = self.in_logs(mine, what, "block", after=0.0 if sys.stderr.isatty() else _SECONDS_BETWEEN_LOGS)
        parts = [compute(block * size, min((block + 1) * size, count)) for block in shown] or [
            tuple(rows[:0] for rows in compute(0, 1))
        ]  # more processes than blocks: the shapes alone
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        return [rows_of_all(column, self.processes) for column in columns]

    def _rows_per_block(self, count: int, compute: Callable[[int, int], object]) -> int:
        """Rows of a block of `rows`, as the main process measures them."""
        most, numbers = max(1, min(count, ROWS_PER_BLOCK)), math.prod(self.dataset.image_shape)
        return from_main(rows_per_pass(most, numbers, lambda: compute(0, 1)), self.processes)

    def in_logs(self, items: Iterable[T], what: str, unit: str, after: float = 5.0) -> Iterable[T]:
        """Items with a progress bar of the main process that logs show as well, at a longer interval.

        Args:
            items: parts of the work.
            what: shown beside the bar.
            unit: name of a part.
            after: seconds of work before the bar shows.
        """
        return tqdm(
            items,
            desc=what,
            unit=unit,
            delay=after,
            mininterval=0.5 if sys.stderr.isatty() else _SECONDS_BETWEEN_LOGS,
            leave=False,
            disable=not self.processes.is_main,
        )

    def share(self, count: int) -> tuple[int, int]:
        """Range [first, last) of this process's share of `count` items."""
        rank, world_size = self.processes.rank, self.processes.world_size
        return -(-count * rank // world_size), -(-count * (rank + 1) // world_size)

    def summed(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        return sum_over_processes(value)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Result of `compute`, cached under a name for all metrics that use it."""
        if name not in self._once:
            self._once[name] = compute()
        found: T = self._once[name]
        return found

    def __contains__(self, name: str) -> bool:
        """True if `once` has a result of this name."""
        return name in self._once

    def replace(self, name: str, result: object) -> None:
        """Make `once` return this result, for checks of metrics on images that are known."""
        self._once[name] = result

    def reference(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor of the test split, from the cache or computed."""
        return self.references(name, lambda: {name: compute()})[name]

    def references(self, name: str, compute: Callable[[], dict[str, Tensor]], of: str = "test") -> dict[str, Tensor]:
        """Tensors of a split by name. `compute` is called if the cache lacks `name`."""
        return self._kept_tensors(self.dataset.digest, of, name, compute)

    def compared_reference(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor of the images that samples are compared with, from the cache or computed."""
        if self.compared is None:
            return self.reference(name, compute)
        return self._kept_tensors(self.compared.digest, self.compared.which, name, lambda: {name: compute()})[name]

    def _kept_tensors(
        self, digest: str, which: str, name: str, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        place = f"{digest} {which}"
        if place not in self._kept:
            network = None if self.network is None else self.network.digest
            cache = cache_directory(self.model.config.packing)
            self._kept[place] = KeptTensors(cache, digest, which, network, self.processes)

        def timed() -> dict[str, Tensor]:
            with self.stage("reference"):
                return compute()

        return self._kept[place].get(name, timed)

    def keep_reference(self) -> None:
        """Write new tensors of the data to the cache, unless it is read-only."""
        for kept in self._kept.values():
            kept.keep()

    def forget_model(self) -> None:
        """Drop what rests on the model's weights, and the images of the test split, before they are measured again."""
        self._once.clear()
        self.warnings.clear()
        for name in ("sampled", "real"):
            self.__dict__.pop(name, None)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to `seconds`, excluding nested stages."""
        before = sum(self.seconds.values())
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        nested = sum(self.seconds.values()) - before
        self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed - nested, 3)
