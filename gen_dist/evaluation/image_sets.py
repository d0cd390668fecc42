"""Evaluation of images that no run of ours made, against those of a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

from torch import Tensor

from gen_dist.config import Capability, DataConfig, TrainConfig
from gen_dist.config.addresses import shown
from gen_dist.data import Dataset, open_dataset
from gen_dist.errors import ConfigError
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.features import FeatureName
from gen_dist.evaluation.measuring import Figures, network_of
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.plan import LEAST_SAMPLES, MetricPlan, Setting, check_names
from gen_dist.evaluation.record import Evaluation, UnmeasuredError, UnwrittenError
from gen_dist.evaluation.reference import ReferenceImages, all_images, reference_images
from gen_dist.files import reason_of
from gen_dist.parallel.collectives import FailureVote, agree, in_main
from gen_dist.parallel.processes import settings_kept, start_processes
from gen_dist.records.reading import write_object

_REASON = "there are images alone, and no model that made them"


@settings_kept()
def evaluate_images(
    images: str,
    reference: str,
    metrics: Sequence[str] | None = None,
    *,
    samples: int = 10_000,
    data_root: str = "data",
    device: Literal["cpu", "cuda"] = "cpu",
    features: FeatureName | None = None,
    inception_weights: Path | None = None,
    out: Path | None = None,
    announce: Callable[[str], None] = print,
) -> Evaluation:
    """Compare images with those of a source. Call it in every process.

    FID, KID, precision, recall, density and coverage compare with all images of the source, other metrics with its test
    split, and `memorization` asks whether the images copy its training split. What needs a model is unavailable.

    Args:
        images: source of the images, such as folder:PATH; a path alone is that of a folder.
        reference: source of the images to compare with, likewise. Its images decide size and channels.
        metrics: names of metrics; None is all.
        samples: most images that are measured, spread evenly.
        data_root: directory with torchvision's data sets.
        device: where to compute.
        features: network whose features are compared. None is `digits` for 28 x 28 grey images, else none.
        inception_weights: file of InceptionV3's weights.
        out: JSON file to write.
        announce: takes a line before work that takes long, in the main process.

    Raises:
        UserError: a source or an option cannot be used.
        UnwrittenError: the figures are measured and cannot be written. The error has them.
        UnmeasuredError: the code of a metric fails. The other figures are written, and the error has them.
    """
    asked = list(measured_metrics() if metrics is None else metrics)
    check_names(asked, samples)
    processes = start_processes(TrainConfig(device=device))
    agree({"images": images, "reference": reference, "metrics": repr(asked), "samples": repr(samples)}, processes)
    say = announce if processes.is_main else _silent
    packing = DataConfig()
    if reference in ("test", "train"):
        raise ConfigError(
            f"reference {reference} is a split of a run's data; name a source, such as folder:PATH or mnist"
        )
    data = open_dataset(_source(reference), data_root, packing, say)
    compared = all_images(data, reference, say)
    given = reference_images(_source(images), data, data_root, packing, say, most=samples)
    assert given is not None
    if given.count < LEAST_SAMPLES:
        raise ConfigError(f"images {shown(images)} are {given.count}, fewer than {LEAST_SAMPLES}; name more of them")
    model: Any = _no_model(given, data, packing)
    needs = {need for name in asked for need in measured_metrics()[name].needs}
    network = network_of(data, needs, features, inception_weights, processes)
    setting = Setting(model, data, network, reference=compared)
    plan = MetricPlan(setting, asked, given.count, 1, None)
    context = _OfImages(model, data, processes, network, given.count, 1, plan.nll_rows, reference=compared)
    context.given = given
    found = Figures(plan, context, FailureVote(processes))
    for metric in plan.available():
        found.measure(metric)
    context.keep_reference()
    evaluation = dataclasses.replace(
        found.evaluation(0), preset=shown(given.source), data=shown(compared.source), split="all"
    )
    try:
        in_main(lambda: _write(out, evaluation), processes)
    except UnwrittenError as error:
        error.evaluation = evaluation
        raise
    if found.failed:
        failed = UnmeasuredError(found.failed[0])
        failed.evaluation = evaluation
        raise failed
    return evaluation


def lines_of(evaluation: Evaluation) -> list[str]:
    """Table of an evaluation of images for the terminal."""
    head = f"{evaluation.preset}, against all images of {evaluation.data}"
    return [head, *evaluation.lines()[1:]]


class _OfImages(Context):
    """Inputs of the metrics with given images in place of samples."""

    given: ReferenceImages

    def _samples(self, first: int, last: int) -> Tensor:
        return self.given.images(first, last).to(self.processes.device)


def _no_model(given: ReferenceImages, data: Dataset, packing: DataConfig) -> SimpleNamespace:
    """Stand-in for a model, with what metrics that need none may ask of it."""
    lacks: Mapping[str, str] = {one: _REASON for one in get_args(Capability) if one != "samples"}
    objective = SimpleNamespace(lacks=lacks)
    config = SimpleNamespace(preset=given.source, data=data.digest, seed=0, packing=packing, objective=objective)
    return SimpleNamespace(config=config, objective=None, conditional=False, scale=data.scale)


def _source(name: str) -> str:
    """A source as `--data` takes it: a path alone is that of a folder."""
    return f"folder:{name}" if ":" not in name and Path(name).is_dir() else name


def _write(out: Path | None, evaluation: Evaluation) -> None:
    if out is None:
        return
    try:
        write_object(out, evaluation.fields())
    except OSError as error:
        raise UnwrittenError(f"{out} cannot be written: {reason_of(error)}") from None


def _silent(_line: str) -> None:
    pass
