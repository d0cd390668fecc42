"""Checks of metrics: the entry, and its figures of a small model, of the data themselves and of noise."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from gen_dist.config import DataConfig, VaeConfig
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import ConfigError
from gen_dist.evaluation.context import Context, Images
from gen_dist.evaluation.features import feature_network
from gen_dist.evaluation.metric import GROUPS, Metric, UnavailableError, Value
from gen_dist.evaluation.metrics import all_metrics
from gen_dist.evaluation.plan import REQUIREMENTS, Setting
from gen_dist.evaluation.reconstructing import reconstructed
from gen_dist.files import temporary_directory
from gen_dist.inference.model import GenerativeModel
from gen_dist.networks import efficientnet_lite
from gen_dist.networks.perceptual import perceptual_distance
from gen_dist.objectives.evaluating import evaluating
from gen_dist.objectives.phase import unit_interval
from gen_dist.testing.report import Announce, Check, Failure, Result, Skipped, nobody, raise_failures, run_checks
from gen_dist.testing.trial import ALONE, ObjectiveTrial

SAMPLES = 12
IMPORTANCE_SAMPLES = 4


class MetricTrial:
    """A metric, and a small VAE on 12 test images of 1 x 28 x 28 to measure it on."""

    def __init__(self, metric: Metric, folder: Path) -> None:
        self.metric = metric
        self.folder = folder

    @functools.cached_property
    def model(self) -> GenerativeModel:
        """A VAE after a few steps."""
        trial = ObjectiveTrial(VaeConfig())
        config = replace(trial.config, packing=DataConfig(cache_dir=str(self.folder)))
        self.dataset = trial.dataset
        return GenerativeModel(trial.trained.best_objective, config, trial.image_shape, trial.dataset.class_names)

    def context(self) -> Context:
        """New inputs of the metric."""
        model, network = self.model, feature_network("digits", ALONE.device)
        rows = evenly_spaced(4, len(self.dataset.test.images))
        perceptual = perceptual_distance() if efficientnet_lite.is_installed() else None
        return Context(model, self.dataset, ALONE, network, SAMPLES, IMPORTANCE_SAMPLES, rows, perceptual=perceptual)

    def measure(self, context: Context) -> Mapping[str, Value]:
        """Values by name.

        Raises:
            Skipped: the metric is not measured, or not available for this model and these data.
        """
        if self.metric.measure is None:
            raise Skipped("it is a figure of the run, which is not measured")
        setting = Setting(self.model, self.dataset, context.network, context.reconstruction_network, context.perceptual)
        for need in self.metric.needs:
            if reason := REQUIREMENTS[need](setting):
                raise Skipped(reason)
        try:
            with evaluating(self.model.objective):
                return self.metric.measure(context)
        except UnavailableError as reason:
            raise Skipped(str(reason)) from None

    def measured_on(self, images: torch.Tensor) -> Value:
        """Its value if the model's samples and reconstructions were these images, uint8 [N, 1, 28, 28]."""
        context = self.context()
        assert context.network is not None
        context.__dict__["sampled"] = Images(images, *context.network.of_images(images))
        if "encoder" in self.metric.needs:
            with evaluating(self.model.objective):
                found = reconstructed(context)
            errors = unit_interval(images).double() - unit_interval(context.real.images).double()
            squares = errors.square().flatten(1).sum(dim=1)
            context.replace("reconstructions", found._replace(images=images, errors=squares))
        return self.measure(context)[self.metric.name]


def check_its_entry_is_complete(trial: MetricTrial) -> None:
    """Group, requirements, label and meaning are there, and requirements that are not met are told as a clause."""
    metric = trial.metric
    if metric.group not in GROUPS:
        raise Failure(f"group {metric.group!r} is not one of {', '.join(GROUPS)}")
    if unknown := [need for need in metric.needs if need not in REQUIREMENTS]:
        raise Failure(f"needs {unknown[0]!r}, which is not one of {', '.join(REQUIREMENTS)}")
    if not metric.label or not metric.meaning:
        raise Failure("it has no label or no meaning; both stand in reports")


def check_its_values_are_numbers(trial: MetricTrial) -> None:
    """Its figures are finite and named as the metric, or `NAME_...`."""
    found = trial.measure(trial.context())
    name = trial.metric.name
    if name not in found:
        raise Failure(f"it gives {', '.join(found) or 'nothing'}, not {name}")
    for key, value in found.items():
        if key != name and not key.startswith(f"{name}_"):
            raise Failure(f"it gives {key}; further figures are named {name}_..., such as {name}_data")
        if not all(math.isfinite(one) for one in (value if isinstance(value, list) else [value])):
            raise Failure(f"{key} is {value}; raise UnavailableError with the reason where there is no value")


def check_two_measurements_are_equal(trial: MetricTrial) -> None:
    """Two measurements of one model agree bit for bit, whatever torch's generator holds."""
    first = trial.measure(trial.context())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        second = trial.measure(trial.context())
    if first != second:
        raise Failure(f"it is {first} and then {second}; key its draws by context.rng")


def check_its_direction_is_right(trial: MetricTrial) -> None:
    """The test images themselves are no worse than noise, by the declared direction."""
    of_images = "samples" in trial.metric.needs or trial.metric.group == "reconstruction"
    if trial.metric.better not in ("less", "more") or not of_images:
        raise Skipped("it does not rank samples or reconstructions")
    trial.measure(trial.context())
    images = torch.from_numpy(trial.dataset.test.images[:])
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    of_data, of_noise = trial.measured_on(images), trial.measured_on(noise)
    if isinstance(of_data, list) or isinstance(of_noise, list) or of_data == of_noise:
        raise Skipped("it does not look at images")
    if (of_data < of_noise) != (trial.metric.better == "less"):
        raise Failure(
            f"{trial.metric.better} is better, but it is {of_data:.4g} for the test images and {of_noise:.4g} for noise"
        )


METRIC_CHECKS = (
    Check(check_its_entry_is_complete),
    Check(check_its_values_are_numbers, ("its entry is complete",)),
    Check(check_two_measurements_are_equal, ("its entry is complete", "its values are numbers")),
    Check(
        check_its_direction_is_right,
        ("its entry is complete", "its values are numbers", "two measurements are equal"),
    ),
)


def check_metric(metric: Metric | str, *, announce: Announce = nobody) -> list[Result]:
    """Check a metric, given as its entry or by its name.

    Raises:
        ConfigError: no metric has the name.
        Failure: a line for each check that failed.
    """
    if isinstance(metric, str):
        if metric not in all_metrics():
            raise ConfigError(f"unknown metric {metric!r}; there are {', '.join(all_metrics())}")
        metric = all_metrics()[metric]
    with temporary_directory("check") as folder:
        results = run_checks(metric.name, METRIC_CHECKS, MetricTrial(metric, folder), announce)
    raise_failures(results)
    return results
