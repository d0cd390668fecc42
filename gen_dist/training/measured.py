"""Metrics of the evaluator, measured at the evaluations while a run trains (`--evaluate-metrics`)."""

from __future__ import annotations

import time
from collections.abc import Callable

from gen_dist.config.recorded import MEASURED
from gen_dist.errors import ConfigError
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.measuring import Figures, setting_of
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.plan import MetricPlan, check_names
from gen_dist.inference.model import GenerativeModel
from gen_dist.objectives.evaluating import evaluating
from gen_dist.parallel.collectives import FailureVote
from gen_dist.records.readable import readable_duration
from gen_dist.training.trainer import Trainer

Metrics = dict[str, float | list[float]]


class MeasuredMetrics:
    """Metrics that `gen-dist evaluate` knows, of one model that trains. All calls are collective.

    Their figures are those of `gen-dist evaluate --samples` of the same number, at the same step: of the averaged
    weights, in float32, with the same keyed latents. They have no intervals.
    """

    def __init__(self, trainer: Trainer, announce: Callable[[str], None]) -> None:
        """
        Args:
            trainer: of the run.
            announce: takes a line on what is not available, and one on the time that the first evaluation took.

        Raises:
            ConfigError: a metric is unknown, has no direction for `keep_best`, or the model does not have any.
            UserError: weights of a feature network are not at hand.
        """
        config, dataset = trainer.config, trainer.dataset
        asked = list(config.evaluate_metrics)
        check_names(asked, config.evaluate_samples)
        if slow := [name for name in asked if measured_metrics()[name].counts == "importance samples"]:
            raise ConfigError(
                f"evaluate_metrics {slow[0]} takes minutes; measure it by gen-dist evaluate after training"
            )
        model = GenerativeModel(trainer.best_objective, config, dataset.image_shape, dataset.labels, dataset.scale)
        processes = trainer.processes
        setting = setting_of(
            *(model, dataset, processes, asked),
            features=config.evaluate_features,
            sampling=(None, "normal"),
            inception_weights=None,
            vgg_weights=None,
        )
        self._plan = MetricPlan(setting, asked, config.evaluate_samples, 1, None)
        self._context = Context(
            *(model, dataset, processes, setting.network, config.evaluate_samples, 1, self._plan.nll_rows),
            reconstruction_network=setting.reconstruction_network,
            perceptual=setting.perceptual,
            with_intervals=False,
        )
        self._vote = FailureVote(processes)
        self._announce, self._told_time = announce, False
        self._told_missing: set[str] = set()
        self._tell_missing()
        self._refuse_kept(config.keep_best)

    def _tell_missing(self) -> None:
        """Say once which metrics there are not, and why."""
        for name, reason in self._plan.unavailable.items():
            if name not in self._told_missing:
                self._announce(f"evaluations have no {name}: {reason}")
        self._told_missing = set(self._plan.unavailable)

    def _refuse_kept(self, keep_best: str | None) -> None:
        if keep_best is None or not keep_best.startswith(MEASURED):
            return
        name = keep_best.removeprefix(MEASURED)
        metric = measured_metrics()[name]
        if metric.better not in ("less", "more"):
            raise ConfigError(f"keep_best {name}: no value of it is the best; name a metric that is to be less or more")
        if metric not in self._plan.available():
            reason = self._plan.unavailable[self._plan.full_name(metric)]
            raise ConfigError(f"keep_best {name} cannot be measured: {reason}")

    @property
    def more_is_better(self) -> frozenset[str]:
        """Names of the metrics of which more is better."""
        return frozenset(name for name, metric in measured_metrics().items() if metric.better == "more")

    def key_of(self, keep_best: str) -> str:
        """Name in metrics.jsonl of a metric of `keep_best`: `evaluation/fid_1k` of `evaluation/fid`."""
        if not keep_best.startswith(MEASURED):
            return keep_best
        return MEASURED + self._plan.full_name(measured_metrics()[keep_best.removeprefix(MEASURED)])

    def measure(self) -> Metrics:
        """Figures by their names in metrics.jsonl, `evaluation/fid_1k`, of the present weights."""
        started = time.perf_counter()
        found = Figures(self._plan, self._context, self._vote)
        self._context.forget_model()
        with evaluating(self._context.objective):
            for metric in self._plan.available():
                found.measure(metric)
        self._context.keep_reference()
        self._tell_missing()
        for name, line in self._context.warnings.items():
            self._announce(f"warning: {name}: {line}")
        if not self._told_time:
            self._told_time = True
            seconds = readable_duration(time.perf_counter() - started)
            names = " ".join(self._context.model.config.evaluate_metrics)
            self._announce(f"measuring {names} took {seconds}, and will at each evaluation (--evaluate-every)")
        return {f"{MEASURED}{name}": value for name, value in found.values.items()}
