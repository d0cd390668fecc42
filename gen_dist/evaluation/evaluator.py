"""One evaluator for VAEs and GANs: what a trained run has of likelihoods, samples and latent space, in evaluation.json.

Sets of images are cut into blocks of 250 rows, and each process takes whole blocks: so a row goes through every network
in the same company whatever the number of processes, and figures agree to the rounding of a sum. Pairs of features are
shared by rows. The reference of all that compares samples with data is the test split.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from tqdm import tqdm

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, cache_directory, image_indices, open_dataset
from gen_dist.errors import UserError
from gen_dist.evaluation import metrics as measures
from gen_dist.evaluation.features import FeatureName, FeatureNetwork, feature_network, fits_digits
from gen_dist.evaluation.marginal_likelihood import is_binarized, negative_log_likelihoods
from gen_dist.evaluation.plan import METRICS, OF_LIKELIHOOD, OF_PIXELS, OF_POSTERIOR, MetricPlan, check_options, sides
from gen_dist.evaluation.record import (
    OF_CLASSES,
    OF_FEATURES,
    OF_WALKS,
    Evaluation,
    Value,
    read_evaluation,
    write_evaluation,
)
from gen_dist.files import write_atomically
from gen_dist.inference.latent_walks import on_great_circles
from gen_dist.inference.model import GenerativeModel, model_of, read_checkpoint
from gen_dist.kernels import Key, normal
from gen_dist.objectives import Batch
from gen_dist.objectives.base import unit_interval
from gen_dist.objectives.evaluating import evaluating
from gen_dist.objectives.vae import Vae
from gen_dist.parallel.collectives import from_main, raise_everywhere, rows_of_all, sum_over_processes
from gen_dist.parallel.processes import Processes, start_processes
from gen_dist.randomness import Stream
from gen_dist.records.environment import environment
from gen_dist.records.run_directory import wandb_id_of
from gen_dist.records.wandb_run import WandbRun, wandb_mode

ROWS_PER_BLOCK = 250
LEAST_ACCURACY = 0.9
"""Share of the test images whose digit the network has to tell, or else what it says of samples tells nothing."""
WALK_STEP = 1e-4
"""Of the way between two latents (Karras et al. 2019, section 4.1)."""
_REFERENCE_FORMAT = 1

T = TypeVar("T")


def evaluate(
    run: Path,
    metrics: Sequence[str] | None = None,
    *,
    samples: int = 10_000,
    nll_samples: int = 5000,
    nll_images: int | None = None,
    data_root: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    features: FeatureName | None = None,
    inception_weights: Path | None = None,
    announce: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluate the newest whole checkpoint of a run and write evaluation.json beside it. Call it in every process.

    An evaluation of the same checkpoint and data is added to, and keeps of other features nothing that rests on them;
    others are replaced.

    Args:
        run: run directory.
        metrics: names from METRICS; None is all of them.
        samples: images drawn from the model, and walks through its latent space.
        nll_samples: importance samples of one image.
        nll_images: test images that nll is measured on, spread over the split. None is all.
        data_root: directory with torchvision's data sets, where that has moved since the run.
        device: where to compute.
        features: network whose features are compared. None is `digits` for 28 x 28 grey images, else none.
        inception_weights: file of InceptionV3's weights; None downloads them where they are missing.
        announce: gets a line for what takes long, in the main process.

    Raises:
        UserError: no run or no checkpoint, other data than it was trained on, or options that cannot be.
    """
    asked = list(METRICS if metrics is None else metrics)
    check_options(run, asked, samples, nll_samples, nll_images)
    processes = start_processes(TrainConfig(device=device))
    say = announce if processes.is_main else _silent
    checkpoint, config = read_checkpoint(run, say)
    dataset = open_dataset(config.data, data_root or config.data_root, config.packing, say)
    if dataset.digest != checkpoint.facts["data_digest"]:
        raise UserError(
            f"the data of {config.data} are not those that {run} was trained on (another digest); put the old data "
            "back, or name their directory by --data-root"
        )
    model = model_of(checkpoint, config, processes.device)
    needs_features = bool({*asked} & {*OF_FEATURES, *OF_CLASSES, *OF_WALKS}) and model.objective.generates
    chosen = features or ("digits" if fits_digits(dataset.image_shape) else None)
    if features == "digits" and not fits_digits(dataset.image_shape):
        raise UserError(f"features digits are of 1 x 28 x 28 images, not of {sides(dataset)}; use --features inception")
    network = feature_network(chosen, processes.device, inception_weights) if needs_features and chosen else None
    plan = MetricPlan(model, dataset, network, asked, samples, nll_samples, nll_images)
    found = _Evaluator(model, dataset, processes, network, plan)
    before = _in_main(lambda: read_evaluation(run), processes)

    def write() -> Evaluation:
        evaluation = found.result(checkpoint.step, before)
        _in_main(lambda: write_evaluation(run, evaluation), processes)
        return evaluation

    with evaluating(model.objective):
        found.measure_samples_and_posterior()
        evaluation = write()
        if plan.wants(*OF_LIKELIHOOD):  # minutes: who does not wait for it has the others
            found.measure_likelihood()
            evaluation = write()
    if processes.is_main:
        _send_to_wandb(run, config, evaluation, say)
    return evaluation


def _in_main(action: Callable[[], T], processes: Processes) -> T:
    """What the main process alone does, and its result in all. An error of it is raised in all."""
    result, error = None, None
    if processes.is_main:
        try:
            result = action()
        except UserError as raised:
            error = raised
    raise_everywhere(error, processes)
    return from_main(result, processes)


class _Reference(NamedTuple):
    """What is computed once of a data set's test split [N, ...], and kept in the cache."""

    sharpness: Tensor
    """float64 []."""
    diversity: Tensor
    """float64 []."""
    features: Tensor | None = None
    """float32 [N, F]."""
    classes: Tensor | None = None
    """int64 [N], what the network takes the images for."""
    radii: Tensor | None = None
    """float64 [N]."""
    kernel_sum: Tensor | None = None
    """float64 []."""


class _Evaluator:
    """The stages of one evaluation. All processes go through them together."""

    def __init__(
        self,
        model: GenerativeModel,
        dataset: Dataset,
        processes: Processes,
        network: FeatureNetwork | None,
        plan: MetricPlan,
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._processes = processes
        self._network = network
        self._plan = plan
        self._rng = torch.tensor([model.config.seed, 0], dtype=torch.int64, device=processes.device)
        self._accuracy: float | None = None
        self._values: dict[str, Value] = {}
        self._seconds: dict[str, float] = {}
        self._pixels: dict[str, str] = {}

    def measure_samples_and_posterior(self) -> None:
        """Measure what is asked for and available, but for the likelihood."""
        if self._plan.wants(*OF_FEATURES, *OF_PIXELS, *OF_CLASSES):
            self._measure_samples()
        if self._plan.wants(*OF_WALKS):
            with self._stage("walks"):
                self._measure_walks()
        if self._plan.wants(*OF_POSTERIOR):
            with self._stage("posterior"):
                self._measure_posterior()

    def result(self, step: int, before: Evaluation | None) -> Evaluation:
        """The evaluation, added to one of the same checkpoint and data."""
        values = {name: value for name, value in self._values.items() if self._plan.is_asked(name)}
        features: dict[str, Any] | None = None
        if self._network is not None:
            features = {"name": self._network.name, "digest": self._network.digest}
            if self._accuracy is not None:
                features["accuracy"] = self._accuracy
        return Evaluation(
            checkpoint_step=step,
            preset=self._model.config.preset,
            data=self._model.config.data,
            data_digest=self._dataset.digest,
            split="test",
            features=features,
            pixels=self._pixels,
            metrics=values,
            unavailable=self._plan.unavailable,
            seconds=self._seconds,
            environment=environment(),
        ).added_to(before)

    def _found(self, **values: Value) -> None:
        """Note metrics, by the names that they are asked for."""
        self._values |= {self._plan.full_name(name): value for name, value in values.items()}

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - started, 3)

    def _of_rows(self, count: int, what: str, compute: Callable[[int, int], tuple[Tensor, ...]]) -> list[Tensor]:
        """What `compute(first, last)` gives for the rows of each block, [last - first, ...] each, of all `count` rows.

        Each process computes its blocks, and every process gets all rows, on the model's device.
        """
        blocks = -(-count // ROWS_PER_BLOCK)
        mine = range(*self._share(blocks))
        shown = tqdm(mine, desc=what, unit="block", leave=False, disable=not self._processes.is_main or None)
        parts = [compute(block * ROWS_PER_BLOCK, min((block + 1) * ROWS_PER_BLOCK, count)) for block in shown] or [
            tuple(rows[:0] for rows in compute(0, 1))
        ]  # more processes than blocks: the shapes alone
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        return [rows_of_all(column, self._processes) for column in columns]

    def _share(self, count: int) -> tuple[int, int]:
        """First and last but one of this process's share of `count` things."""
        rank, world_size = self._processes.rank, self._processes.world_size
        return -(-count * rank // world_size), -(-count * (rank + 1) // world_size)

    def _summed(self, value: Tensor) -> Tensor:
        return sum_over_processes(value)

    def _test_batch(self, first: int, last: int) -> Batch:
        test = self._dataset.test
        images, labels = (torch.from_numpy(array[first:last]) for array in (test.images, test.labels))
        device = self._processes.device
        return Batch(images.to(device), labels.to(device), self._rng, first)

    def _measure_posterior(self) -> None:
        objective = self._model.objective

        def compute(first: int, last: int) -> tuple[Tensor, ...]:
            batch = self._test_batch(first, last)
            means, _ = objective.encode(batch.images)
            reconstructed = objective.pixels(objective.decode(means)).double()
            errors = (reconstructed - unit_interval(batch.images)).square().flatten(1).sum(dim=1)
            if not isinstance(objective, Vae):
                return means, errors
            nll, kl = objective.nll_and_kl(
                objective.targets(batch, Stream.TEST_BINARIZATION), batch, Stream.TEST_LATENTS
            )
            return means, errors, (nll + kl).double()

        means, errors, *elbos = self._of_rows(len(self._dataset.test.images), "posterior", compute)
        self._found(reconstruction_error=float(errors.mean()))
        if self._plan.wants("active_units"):
            self._found(active_units=measures.active_units(means))
        if isinstance(objective, Vae) and self._plan.wants("negative_elbo"):
            self._found(negative_elbo=float(elbos[0].mean()))
            binarized = objective.config.dynamic_binarization
            self._pixels["negative_elbo"] = "binarized" if binarized else "real-valued"

    def _measure_samples(self) -> None:
        with self._stage("reference"):
            reference = self._reference()
        self._check_classes(reference)
        with self._stage("samples"):
            images, sharpness, *seen = self._of_rows(
                self._plan.samples, "samples", lambda first, last: self._look(self._sampled(first, last))
            )
        data_sharpness, data_diversity = float(reference.sharpness), float(reference.diversity)
        if self._plan.wants("sharpness"):
            self._found(sharpness=float(sharpness.mean()), sharpness_data=data_sharpness)
        if self._plan.wants("diversity"):
            with self._stage("diversity"):
                diversity = float(self._mean_distance(images))
            self._found(diversity=diversity, diversity_data=data_diversity)
        if self._plan.wants(*OF_FEATURES):
            self._compare(reference, seen[0])
        if self._plan.wants(*OF_CLASSES):
            self._count_classes(reference, seen[1])

    def _check_classes(self, reference: _Reference) -> None:
        """Note how well the network tells the classes of the data; if that is not well, metrics of classes go."""
        if reference.classes is None:
            return
        labels = torch.from_numpy(self._dataset.test.labels).to(reference.classes.device)
        self._accuracy = float((reference.classes == labels).double().mean())
        if self._accuracy < LEAST_ACCURACY:
            reason = f"the digit network is right for {self._accuracy:.0%} of the test images: they are no digits"
            self._plan.give_up(OF_CLASSES, reason)

    def _look(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images uint8 [B, C, H, W] themselves, sharpness float64 [B], features and classes where there are any."""
        seen: list[Tensor] = []
        if self._network is not None:
            seen = [tensor for tensor in self._network.of_images(images) if tensor is not None]
        return images, measures.laplacian_variances(images), *seen

    def _sampled(self, first: int, last: int) -> Tensor:
        latents = self._model.prior_latents(last - first, first_row=first)
        return self._model.images(latents, self._labels(first, last))

    def _labels(self, first: int, last: int) -> Tensor | None:
        """What a conditional model is asked for: the classes of test images in keyed order, so in their shares."""
        if not self._model.conditional:
            return None
        labels = self._dataset.test.labels
        return torch.from_numpy(labels[image_indices(len(labels), 0, 0, 1, first, last - first)])

    def _mean_distance(self, images: Tensor) -> Tensor:
        points, count = measures.pixel_points(images), len(images)
        return self._summed(measures.pair_distance_sum(points, *self._share(count))) / (count * (count - 1))

    def _compare(self, reference: _Reference, features: Tensor) -> None:
        assert reference.features is not None and reference.radii is not None and reference.kernel_sum is not None
        first, last = self._share(len(features))
        if self._plan.wants("fid"):
            with self._stage("fid"):
                moments = measures.moments(reference.features), measures.moments(features)
                self._found(fid=measures.frechet_distance(*moments))
        if self._plan.wants("kid"):
            with self._stage("kid"):
                mine = features[first:last]
                within = self._summed(measures.self_kernel_sum(mine, features))
                between = self._summed(measures.kernel_sum(mine, reference.features))
                counts = len(reference.features), len(features)
                distance = measures.squared_mmd(reference.kernel_sum, within, between, counts)
                self._found(kid=distance)
        if self._plan.wants("precision", "recall", "density", "coverage"):
            with self._stage("neighbours"):
                radii = rows_of_all(measures.neighbour_radii(features, first, last), self._processes)
                real = slice(*self._share(len(reference.features)))
                mine_of_real = reference.features[real], reference.radii[real]
                counted = measures.ball_counts(*mine_of_real, features, radii)
                counted = measures.BallCounts(*(self._summed(value) for value in counted))
                four = counted.metrics(len(reference.features))
                self._found(**four)

    def _count_classes(self, reference: _Reference, classes: Tensor) -> None:
        assert reference.classes is not None
        shares, real = (np.bincount(found.cpu().numpy(), minlength=10) for found in (classes, reference.classes))
        shares, real = shares / shares.sum(), real / real.sum()
        self._found(
            classes=int(((shares > 0) & (shares >= real / 4)).sum()),
            class_shares=shares.tolist(),
            class_variation=float(np.abs(shares - real).sum() / 2),
        )
        labels = self._labels(0, self._plan.samples)
        if labels is not None:
            self._found(label_accuracy=float((classes.cpu() == labels).double().mean()))

    def _reference(self) -> _Reference:
        """Of the test split; from the cache of the main process, where it is kept once computed."""
        network = None if self._network is None else self._network.digest
        key = json.dumps([_REFERENCE_FORMAT, self._dataset.digest, "test", network, measures.NEIGHBOURS])
        name = f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        file = cache_directory(self._model.config.packing) / name
        kept = _in_main(lambda: _read_reference(file), self._processes)
        device = self._processes.device
        if kept is not None:
            return _Reference(**{name: tensor.to(device) for name, tensor in kept.items()})
        count = len(self._dataset.test.images)

        def compute(first: int, last: int) -> tuple[Tensor, ...]:
            return self._look(self._test_batch(first, last).images)

        images, sharpness, *seen = self._of_rows(count, "test images", compute)
        of_features = {}
        if seen:
            radii = measures.neighbour_radii(seen[0], *self._share(count))
            kernel_sum = measures.self_kernel_sum(seen[0][slice(*self._share(count))], seen[0])
            of_features = {
                "features": seen[0],
                "radii": rows_of_all(radii, self._processes),
                "kernel_sum": self._summed(kernel_sum),
                **({"classes": seen[1]} if len(seen) > 1 else {}),
            }
        reference = _Reference(sharpness.mean(), self._mean_distance(images), **of_features)
        if self._processes.is_main:
            tensors = {name: tensor for name, tensor in reference._asdict().items() if tensor is not None}
            with contextlib.suppress(OSError):  # a cache that is shared read-only
                write_atomically(file, save_tensors({name: tensor.cpu() for name, tensor in tensors.items()}))
        return reference

    def _measure_walks(self) -> None:
        """Perceptual path length (Karras et al. 2019, eq. 2), in features of unrounded images."""
        model, network = self._model, self._network
        assert network is not None and network.of_intensities is not None
        of_intensities, width = network.of_intensities, model.objective.latent_dim
        key = torch.tensor([0, 0])  # as samples: on the CPU, whatever the device

        def compute(first: int, last: int) -> tuple[Tensor]:
            draws = normal(Key(key, Stream.WALKS, first), last - first, 2 * width + 1)
            starts, ends = draws[:, :width].numpy(), draws[:, width:-1].numpy()
            parts = torch.special.ndtr(draws[:, -1:].double()).numpy()  # uniform in 0..1
            walks = on_great_circles(starts, ends, np.concatenate([parts, parts + WALK_STEP], axis=1))
            labels = self._labels(first, last)
            twice = None if labels is None else labels.repeat_interleave(2)
            intensities = model.objective.pixels(model.decode(torch.from_numpy(walks), twice))
            here, there = of_intensities(intensities).double().unflatten(0, (-1, 2)).unbind(dim=1)
            return ((here - there).square().sum(dim=1) / WALK_STEP**2,)

        (lengths,) = self._of_rows(self._plan.samples, "walks", compute)
        self._found(path_length=float(lengths.mean()))

    def measure_likelihood(self) -> None:
        """Measure the likelihood by importance sampling."""
        with self._stage("likelihood"):
            self._measure_likelihood()

    def _measure_likelihood(self) -> None:
        objective = self._model.objective
        assert isinstance(objective, Vae)
        rows = self._plan.nll_rows.tolist()
        # Minutes: shown in logs as well, now and then.
        shown = tqdm(
            rows[slice(*self._share(len(rows)))],
            desc=f"nll of {self._plan.nll_samples} samples",
            unit="image",
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            leave=False,
            disable=not self._processes.is_main,
        )
        total = torch.zeros((), dtype=torch.float64, device=self._rng.device)
        for row in shown:
            # By its place in the split: the same image has the same noise, whatever others are chosen.
            batch = self._test_batch(row, row + 1)
            total += negative_log_likelihoods(objective, batch, self._plan.nll_samples)[0]
        nll = float(self._summed(total)) / len(rows)
        self._found(nll=nll)
        self._pixels[self._plan.full_name("nll")] = "binarized" if is_binarized(objective) else "real-valued"
        if self._plan.wants("bits_per_dimension"):
            bits = measures.bits_per_dimension(nll, self._dataset.image_shape)
            self._found(bits_per_dimension=bits)


def _read_reference(file: Path) -> dict[str, Tensor] | None:
    with contextlib.suppress(OSError, SafetensorError):
        return load_tensors(file.read_bytes())
    return None


def _send_to_wandb(run: Path, config: TrainConfig, evaluation: Evaluation, say: Callable[[str], None]) -> None:
    """Put the metrics into the summary of the run on wandb, if it is there."""
    mode = wandb_mode(config.wandb)
    if mode == "disabled" or not (run / "wandb").is_dir():
        return
    tracked = WandbRun(mode, run, config, wandb_id_of(run), say)
    tracked.summarize({f"evaluation/{name}": value for name, value in evaluation.metrics.items()})
    tracked.finish(0)


def _silent(_line: str) -> None:
    pass
