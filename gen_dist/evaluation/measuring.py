"""Measurement of metrics: the networks that they need, and the figures as they are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gen_dist.data import Dataset
from gen_dist.errors import UserError
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.features import FeatureName, FeatureNetwork, feature_network, fits_digits
from gen_dist.evaluation.marginal_likelihood import is_binarized
from gen_dist.evaluation.metric import Metric, UnavailableError, Value
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.metrics.classes import accuracy
from gen_dist.evaluation.plan import MetricPlan, Setting, refused_by_digits, sides, takes_features
from gen_dist.evaluation.record import Evaluation
from gen_dist.evaluation.reference import ReferenceImages
from gen_dist.inference.model import GenerativeModel, PriorName
from gen_dist.networks import efficientnet_lite
from gen_dist.networks.perceptual import PerceptualDistance, perceptual_distance
from gen_dist.objectives.vae import Vae
from gen_dist.parallel.collectives import FailureVote
from gen_dist.parallel.processes import Processes
from gen_dist.plugins.faults import told
from gen_dist.records.environment import environment


def setting_of(
    model: GenerativeModel,
    dataset: Dataset,
    processes: Processes,
    asked: Sequence[str],
    features: FeatureName | None,
    sampling: tuple[ReferenceImages | None, PriorName],
    inception_weights: Path | None,
    vgg_weights: Path | None,
) -> Setting:
    """Model, data, and the frozen networks that the metrics asked for need; see `evaluate`.

    Raises:
        UserError: a network does not take such images, or its weights are not at hand.
    """
    needs = {need for name in asked for need in measured_metrics()[name].needs}
    if not model.objective.generates and sampling[1] == "normal":
        needs -= {"features", "digits"}
    if not model.objective.encodes:
        needs -= {"features of reconstructions", "perceptual features"}
    network = network_of(dataset, needs, features, inception_weights, processes)
    frozen = _frozen_features(needs, network, dataset, processes, vgg_weights)
    return Setting(model, dataset, network, *frozen, *sampling)


def _frozen_features(
    needs: set[str], network: FeatureNetwork | None, dataset: Dataset, processes: Processes, vgg_weights: Path | None
) -> tuple[FeatureNetwork | None, PerceptualDistance | None]:
    """Network for features of reconstructions, and the perceptual distance: each if it is needed and can be had."""
    fits = takes_features(dataset)
    has_lite0 = fits and efficientnet_lite.is_installed()
    compared, perceptual = network, None
    if compared is None and "features of reconstructions" in needs and has_lite0:
        compared = feature_network("efficientnet-lite0", processes.device)
    if "perceptual features" in needs and fits and vgg_weights is not None:
        perceptual = perceptual_distance("vgg16", vgg_weights)
    elif "perceptual features" in needs and has_lite0:
        perceptual = perceptual_distance()
    return compared, perceptual


def network_of(
    dataset: Dataset,
    needs: set[str],
    features: FeatureName | None,
    inception_weights: Path | None,
    processes: Processes,
) -> FeatureNetwork | None:
    """Network whose features of samples are compared; None if no requirement of the metrics needs one, or none fits.

    Raises:
        UserError: the network does not take such images, or its weights are not at hand.
    """
    if features == "digits" and not fits_digits(dataset.image_shape):
        raise UserError(f"features digits: {refused_by_digits(dataset)}")
    if features is not None and dataset.scale.form != "images":
        raise UserError(f"features {features} are of images, and the data are {sides(dataset)}; leave it out")
    if features == "inception" and not takes_features(dataset):
        raise UserError(f"features inception are of 1 or 3 channels, and images are {sides(dataset)}; leave it out")
    chosen = features or ("digits" if fits_digits(dataset.image_shape) else None)
    of_network = {"features", "features of reconstructions"} | ({"digits"} if chosen == "digits" else set())
    needs_features = chosen and needs & of_network
    return feature_network(chosen, processes.device, inception_weights) if chosen and needs_features else None


def _refuse_bad_values(metric: Metric, found: Any) -> None:
    """Raise UserError if a metric gives no numbers by name, or not its own."""
    if not isinstance(found, Mapping) or metric.name not in found:
        given = f"only {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise UserError(f"metric {metric.name} gives {given}; measure returns a dict with the value of {metric.name!r}")
    for name, value in found.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int | float) for one in numbers):
            kind = type(numbers[0]).__name__
            raise UserError(f"metric {metric.name} gives {name} as {kind}; make it a number with float(...)")


class Figures:
    """The figures of one evaluation, as they are measured."""

    def __init__(self, plan: MetricPlan, context: Context, vote: FailureVote) -> None:
        self._plan = plan
        self._context = context
        self._vote = vote
        self.values: dict[str, Value] = {}
        """Figures by full name."""
        self._pixels: dict[str, str] = {}
        self._intervals: dict[str, list[float]] = {}
        self._warnings: dict[str, str] = {}
        self.failed: list[str] = []
        """Lines of the metrics whose code failed."""

    def measure(self, metric: Metric) -> None:
        """Measure one metric, or note why it is not available. A collective call."""
        assert metric.measure is not None
        name = self._plan.full_name(metric)
        found: Mapping[str, Value] = {}
        known: UserError | None = None
        try:
            with self._context.stage(metric.stage or metric.name):
                found = metric.measure(self._context)
            _refuse_bad_values(metric, found)
        except UnavailableError as reason:
            self._plan.unavailable[name] = str(reason)
        except Exception as error:
            if (known := told(error)) is None:
                raise
        failed, line = self._vote.count(known)
        if failed:
            if failed < self._context.processes.world_size:  # of what it computed, some processes may lack a part
                self._context.forget_model()
            self.failed.append(str(line))
            self._plan.unavailable[name] = f"it failed ({line})"
        if name in self._plan.unavailable:
            return
        self.values |= {name if key == metric.name else key: value for key, value in found.items()}
        if interval := self._context.intervals.get(metric.name):
            self._intervals[name] = list(interval)
        if warning := self._context.warnings.get(metric.name):
            self._warnings[name] = warning
        objective = self._context.objective
        if metric.of_pixels and metric.unit == "nats" and isinstance(objective, Vae):
            drawn = is_binarized(objective) if metric.counts else objective.config.dynamic_binarization
            whole = objective.likelihood == "discretized-logistic"
            self._pixels[name] = "binarized" if drawn else objective.dtype_of_data if whole else "real-valued"

    def evaluation(self, step: int) -> Evaluation:
        """The evaluation of a checkpoint's step, with all figures so far."""
        context, network = self._context, self._context.network
        features: dict[str, Any] | None = None
        if network is not None:
            features = {"name": network.name, "digest": network.digest}
            if network.name == "digits" and "samples" in context.seconds:
                features["accuracy"] = accuracy(context)
        return Evaluation(
            checkpoint_step=step,
            preset=context.model.config.preset,
            data=context.model.config.data,
            data_digest=context.dataset.digest,
            split="test",
            features=features,
            pixels=self._pixels,
            metrics=self.values,
            unavailable=self._plan.unavailable,
            seconds=context.seconds,
            environment=environment(),
            intervals=self._intervals,
            warnings=self._warnings,
            references={} if (compared := context.compared) is None else {compared.name: compared.described},
            fitted_prior=context.model.fitted_prior.facts["sha256"] if context.prior == "fitted" else None,
        )
