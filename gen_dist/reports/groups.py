"""Groups of runs of one config, and which group is better by a metric."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gen_dist.config import TrainConfig
from gen_dist.evaluation.guide import FITTED, base_name, is_of_pixels, is_of_run, metric_of, reference_of
from gen_dist.presets import presets
from gen_dist.records.collapse import Collapse
from gen_dist.records.readable import readable_result
from gen_dist.reports.run_record import RunRecord, decisive_fields

ABOUT_EQUAL = 0.02
"""Relative difference below which values of single runs are reported as about equal."""


@dataclass(frozen=True)
class Group:
    """Runs of one config with different seeds, or a single run."""

    label: str
    runs: Sequence[RunRecord]

    @property
    def family(self) -> str:
        """Family of its runs: `autoencoder`, `vae`, `gan` or `vae-gan`."""
        return self.runs[0].family

    @property
    def caveat(self) -> str | None:
        """Words for a group of which a run has less training than its config or its preset names; None if none has."""
        return next(filter(None, map(short_training, self.runs)), None)

    @property
    def collapses(self) -> list[Collapse]:
        """Signs of a collapse, each from the first run that has it."""
        found = [collapse for run in self.runs for collapse in run.collapses]
        return list({collapse.name: collapse for collapse in reversed(found)}.values())

    def values(self, metric: str) -> list[float]:
        """Values of one scalar metric, one for each run that has it; empty if none has."""
        found = [scalars(run).get(metric) for run in self.runs]
        return [value for value in found if value is not None]

    def reason(self, metric: str) -> str:
        """Reason why the group has no value of a metric, in one line."""
        run = self.runs[0]
        if is_of_run(metric):
            return "recorded when a run finishes" if metric == "epochs" else "not known of this run"
        if run.evaluation is None:
            return f"not evaluated yet: gen-dist evaluate {run.path}"
        kinds = (None, False), _compared(metric)  # few images of another reference are no reason
        unavailable = run.evaluation.unavailable.items()
        reasons = {base_name(name): reason for name, reason in unavailable if _compared(name) in kinds}
        if base_name(metric) in reasons:
            return reasons[base_name(metric)]
        if metric.endswith(FITTED) and (lacking := run.config.objective.lacks.get("encoder")):
            return lacking
        every = " --nll-images all" if metric_of(metric).label.endswith("all test images") else ""
        return f"not evaluated yet: gen-dist evaluate {run.path} --metrics {base_name(metric)}{every}{_options(metric)}"


def _compared(metric: str) -> tuple[str | None, bool]:
    """Reference that a metric's name has, and True if it is of samples from a fitted prior."""
    return reference_of(metric), metric.endswith(FITTED)


def _options(metric: str) -> str:
    """Further options of an evaluation that gives a metric of this name."""
    reference, is_fitted = _compared(metric)
    source = {None: "", "train": " --reference train"}.get(reference, " --reference SOURCE")
    return source + (" --prior fitted" if is_fitted else "")


def trained_share(run: RunRecord) -> float:
    """Share of the training that its config and its preset name, by steps and by images: 1.0 if it has both."""
    shares = [run.step / run.config.steps, 1.0]
    if run.config.preset in presets():
        preset = presets()[run.config.preset].config
        shares.append(run.images_seen / (preset.steps * preset.global_batch_size))
    return min(shares)


def short_training(run: RunRecord) -> str | None:
    """Words for a run with less training than its config or its preset names; None if it has all."""
    if trained_share(run) == 1.0:
        return None
    preset = presets()[run.config.preset].config if run.config.preset in presets() else run.config
    if not run.finished:
        return f"at step {run.step:,} of {run.config.steps:,}{_whole_of_preset(run.config, preset)}, not finished"
    if run.config.global_batch_size == preset.global_batch_size:
        return f"trained for {run.step:,} steps, where its preset has {preset.steps:,}"
    images = preset.steps * preset.global_batch_size
    return f"trained on {run.images_seen:,} images, where its preset has {images:,}"


def _whole_of_preset(config: TrainConfig, preset: TrainConfig) -> str:
    """Words for the steps of a preset, if they are of more images than those of a config; empty if not."""
    batch, batch_of_preset = config.global_batch_size, preset.global_batch_size
    if config.steps * batch >= preset.steps * batch_of_preset:
        return ""
    if batch == batch_of_preset:
        return f", where its preset has {preset.steps:,}"
    return f" in batches of {batch:,}, where its preset has {preset.steps:,} in batches of {batch_of_preset:,}"


def readable_values(values: Sequence[float], metric: str) -> str:
    """Format values of one metric; several runs give mean, minimum and maximum: `105.40 (105.12 to 105.93) nats`."""
    unit, texts = metric_of(metric).unit, [readable_result(value) for value in (min(values), max(values))]
    spread = f" ({texts[0]} to {texts[1]})" if texts[0] != texts[1] else ""
    return f"{readable_result(statistics.fmean(values))}{spread} {unit}".strip()


def scalars(run: RunRecord) -> dict[str, float]:
    """Scalar metrics of a run, with its training time, throughput and epochs."""
    found = {
        name: float(value)
        for name, value in (run.evaluation.metrics if run.evaluation else {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    found["training_seconds"] = run.training_seconds
    if run.images_per_second is not None:
        found["images_per_second"] = run.images_per_second
    if run.summary and run.summary.get("steps") == run.step:
        found["epochs"] = float(run.summary["epochs"])
    return found


def labels_of(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """Unique labels of the groups: the preset, with the fields that differ if presets are equal, and how much of the
    training is done if not all of it."""
    labels = []
    for group in groups:
        rivals = [other[0] for other in groups if other[0].config.preset == group[0].config.preset]
        fields = [decisive_fields(run.config) | {"trained to step": run.step} for run in rivals]
        mine = fields[rivals.index(group[0])]
        apart = [
            f"{name.split('.')[-1].replace('_', ' ')} {value}"
            for name, value in mine.items()
            if any(other.get(name) != value for other in fields)
        ]
        if (share := trained_share(group[0])) < 1.0:
            apart.append(f"{math.floor(100 * share)}% trained")
        labels.append(group[0].config.preset + (f" ({', '.join(apart)})" if apart else ""))
    return labels


def _score(group: Group, metric: str) -> float:
    """Score of the mean over a group's runs: less is better."""
    return _score_of(statistics.fmean(group.values(metric)), group, metric)


def _score_of(value: float, group: Group, metric: str) -> float:
    match metric_of(metric).better:
        case "more":
            return -value
        case "data":
            reference = data_value(group, metric)
            return abs(math.log(value / reference)) if value > 0 and reference else math.inf
        case _:
            return value


def data_value(group: Group, metric: str) -> float | None:
    """Value of the same metric for real images; None if unknown."""
    values = group.values(f"{base_name(metric)}_data")
    return values[0] if values and values[0] > 0 else None


def ranked_by(groups: Sequence[Group], metric: str) -> list[Group]:
    """Groups that have a metric, the best first; empty for a metric without a better direction."""
    if metric_of(metric).better is None:
        return []
    return sorted((group for group in groups if group.values(metric)), key=lambda group: _score(group, metric))


def are_apart(better: Group, worse: Group, metric: str) -> bool:
    """True if all runs of one group beat all of the other; single runs must differ by more than ABOUT_EQUAL."""
    if len(better.runs) == len(worse.runs) == 1:
        if metric_of(metric).better == "data":  # scores are distances in logarithms: values may lie on either side
            return _score(worse, metric) - _score(better, metric) > ABOUT_EQUAL
        first, second = better.values(metric)[0], worse.values(metric)[0]
        return abs(first - second) > ABOUT_EQUAL * max(abs(first), abs(second)) and _score(better, metric) < _score(
            worse, metric
        )
    worst = max(_score_of(value, better, metric) for value in better.values(metric))
    return worst < min(_score_of(value, worse, metric) for value in worse.values(metric))


def are_comparable(groups: Sequence[Group], metric: str) -> bool:
    """True if the groups' figures of a metric were made under equal conditions."""
    return len({condition_of(group, metric) for group in groups}) < 2


def condition_of(group: Group, metric: str) -> str:
    """Condition that must be equal for figures of a metric to compare; empty if there is none."""
    if is_of_pixels(metric):
        return _pixel_model(group, metric)
    if not is_of_run(metric) or metric == "epochs":
        return ""
    conditions = {machine_of(run) for run in group.runs}
    if metric == "training_seconds":  # part of a training is no quick one
        conditions |= {f"at step {run.step:,} of {run.config.steps:,}" for run in group.runs if not run.finished}
    return "; ".join(sorted(conditions))


def _pixel_model(group: Group, metric: str) -> str:
    """Pixel model of a likelihood: as evaluated, else as trained."""
    run = group.runs[0]
    objective = run.config.objective
    told = run.evaluation.pixels if run.evaluation else {}
    of = metric.replace("bits_per_dimension", "nll")  # the same in another unit
    trained = "binarized" if getattr(objective, "dynamic_binarization", False) else "real-valued"
    return f"{told.get(of, trained)} pixels, {getattr(objective, 'likelihood', 'bernoulli')}"


def machine_of(run: RunRecord) -> str:
    """Device, threads and processes of a run's last start."""
    environment = run.environment or {}
    gpus = [gpu["name"] for gpu in environment.get("gpus", [])]
    processes, threads = environment.get("processes", 1), environment.get("torch_threads")
    device = (
        ", ".join(gpus)
        or f"{(environment.get('cpu') or {}).get('model')}, {threads} {'thread' if threads == 1 else 'threads'}"
    )
    return f"{device}, {processes} {'process' if processes == 1 else 'processes'}"
