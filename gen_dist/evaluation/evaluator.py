"""One evaluator for VAEs and GANs: the metrics of a trained run, in evaluation.json.

Metrics are not named here. `gen_dist.evaluation.metrics` has a file for each, the plan selects those that a model and
its data have, and the context computes their shared inputs. Samples are compared with the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset
from gen_dist.errors import CheckpointError, UnreadableError, UserError
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.features import FeatureName, FeatureNetwork, feature_network, fits_digits
from gen_dist.evaluation.marginal_likelihood import is_binarized
from gen_dist.evaluation.metric import Metric, UnavailableError, Value
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.metrics.classes import accuracy
from gen_dist.evaluation.plan import MetricPlan, Setting, check_options, refused_by_digits, sides
from gen_dist.evaluation.record import Evaluation, UnmeasuredError, UnwrittenError, add_evaluation, read_evaluation
from gen_dist.inference.model import GenerativeModel, WhichCheckpoint, model_of, read_same_checkpoint
from gen_dist.networks import efficientnet_lite
from gen_dist.networks.perceptual import PERCEPTUAL_CHANNELS, PerceptualDistance, perceptual_distance
from gen_dist.objectives.evaluating import evaluating
from gen_dist.objectives.vae import Vae
from gen_dist.parallel.collectives import agree, in_main
from gen_dist.parallel.processes import Processes, settings_kept, start_processes
from gen_dist.plugins.faults import told
from gen_dist.records.environment import environment
from gen_dist.records.readable import readable_duration
from gen_dist.records.reading import config_of_run
from gen_dist.records.run_data import open_run_data
from gen_dist.records.run_directory import wandb_id_of
from gen_dist.records.trackers.wandb_run import WandbRun, wandb_mode

NLL_IMAGES = 1000
"""Test images of the likelihood unless more are asked for: all 10,000 of MNIST take ten times a VAE's training."""


@settings_kept()
def evaluate(
    run: Path,
    metrics: Sequence[str] | None = None,
    *,
    samples: int = 10_000,
    nll_samples: int = 5000,
    nll_images: int | None = NLL_IMAGES,
    data: str | None = None,
    data_root: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    features: FeatureName | None = None,
    inception_weights: Path | None = None,
    vgg_weights: Path | None = None,
    checkpoint: WhichCheckpoint = "newest",
    announce: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluate a whole checkpoint of a run, and write evaluation.json in the run directory. Call it in every process.

    Existing figures of the same checkpoint and data are kept, also those that another evaluation writes meanwhile.
    Figures that rest on features are kept only if the feature network is the same.

    Args:
        run: run directory.
        metrics: names of metrics; None is all of them.
        samples: images drawn from the model, and walks through its latent space.
        nll_samples: importance samples of one image.
        nll_images: test images that nll and perceptual distances are measured on, spread over the split. None is all.
        data: where the data are now, such as folder:/new/place, if they have moved since the run.
        data_root: directory with torchvision's data sets, if it has moved since the run.
        device: where to compute.
        features: network whose features are compared. None is `digits` for 28 x 28 grey images, else none.
        inception_weights: file of InceptionV3's weights; None downloads them if they are missing.
        vgg_weights: torchvision's file of VGG16's weights: perceptual distances are then LPIPS. None measures them in
            features of EfficientNet-Lite0.
        checkpoint: the newest one, or the best that the run keeps. evaluation.json has figures of one checkpoint.
        announce: takes a line before work that takes long, in the main process.

    Raises:
        UserError: no run or no checkpoint, other data than the run was trained on, or invalid options.
        UnwrittenError: the figures are measured and cannot be written. The error has them.
        UnmeasuredError: the code of a metric fails. The other figures are written, and the error has them.
    """
    try:
        config_of_run(run)  # loads its plug-ins, which may have metrics
    except UnreadableError:
        raise  # without their names, their metrics would be left out in silence
    except CheckpointError:
        pass  # told below, after mistakes in the options
    asked = list(measured_metrics() if metrics is None else metrics)
    check_options(run, asked, samples, nll_samples, nll_images)
    processes = start_processes(TrainConfig(device=device))
    options = {"metrics": asked, "samples": samples, "nll_samples": nll_samples, "nll_images": nll_images}
    agree({name: repr(value) for name, value in options.items()}, processes)
    say = announce if processes.is_main else _silent
    read, config = read_same_checkpoint(run, say, processes, checkpoint)
    digest = read.facts["data_digest"]
    dataset = open_run_data(run, config, say, digest=digest, data=data, data_root=data_root)
    model = model_of(read, config, processes.device)
    setting = _setting(model, dataset, processes, asked, features, inception_weights, vgg_weights)
    plan = MetricPlan(setting, asked, samples, nll_samples, nll_images)
    context = Context(
        *(model, dataset, processes, setting.network, samples, nll_samples, plan.nll_rows),
        reconstruction_network=setting.reconstruction_network,
        perceptual=setting.perceptual,
    )
    in_main(lambda: read_evaluation(run), processes)  # a damaged one is refused before anything that takes minutes
    with evaluating(model.objective):
        evaluation = _measure(run, read.step, plan, context, say)
    if processes.is_main:
        _send_to_wandb(run, config, evaluation, say)
    return evaluation


def _measure(run: Path, step: int, plan: MetricPlan, context: Context, say: Callable[[str], None]) -> Evaluation:
    """Measure the available metrics and write them, the slow ones last: an interrupted evaluation has the others.

    Raises:
        UnwrittenError: they are measured and cannot be written. The error has them.
        UnmeasuredError: the code of a metric fails. The others are written, and the error has them.
    """
    found = _Figures(plan, context)
    unwritten: UnwrittenError | None = None

    def write() -> Evaluation:
        nonlocal unwritten
        context.keep_reference()
        evaluation = found.evaluation(step)
        unwritten = None
        try:
            return in_main(lambda: add_evaluation(run, evaluation, say), context.processes)
        except UnwrittenError as error:  # the slow ones are measured all the same
            error.evaluation = evaluation
            unwritten = error
            return evaluation

    for metric in plan.available():
        if not metric.takes_minutes:
            found.measure(metric)
    evaluation = write()
    if slow := [metric for metric in plan.available() if metric.takes_minutes]:
        if context.processes.is_main:
            _announce_times(slow, context, say)
        for metric in slow:
            found.measure(metric)
        evaluation = write()
    if unwritten is not None:
        raise unwritten
    if found.failed:
        failed = UnmeasuredError(found.failed[0])
        failed.evaluation = evaluation
        raise failed
    return evaluation


def _setting(
    model: GenerativeModel,
    dataset: Dataset,
    processes: Processes,
    asked: Sequence[str],
    features: FeatureName | None,
    inception_weights: Path | None,
    vgg_weights: Path | None,
) -> Setting:
    """Model, data, and the frozen networks that the metrics asked for need; see `evaluate`.

    Raises:
        UserError: a network does not take such images, or its weights are not at hand.
    """
    if features == "digits" and not fits_digits(dataset.image_shape):
        raise UserError(f"features digits: {refused_by_digits(dataset)}")
    if features == "inception" and dataset.image_shape[0] not in PERCEPTUAL_CHANNELS:
        raise UserError(f"features inception are of 1 or 3 channels, and images are {sides(dataset)}; leave it out")
    chosen = features or ("digits" if fits_digits(dataset.image_shape) else None)
    needs = {need for name in asked for need in measured_metrics()[name].needs}
    if not model.objective.generates:
        needs -= {"features", "digits"}
    if not model.objective.encodes:
        needs -= {"features of reconstructions", "perceptual features"}
    of_network = {"features", "features of reconstructions"} | ({"digits"} if chosen == "digits" else set())
    needs_features = chosen and needs & of_network
    network = feature_network(chosen, processes.device, inception_weights) if chosen and needs_features else None
    return Setting(model, dataset, network, *_frozen_features(needs, network, dataset, processes, vgg_weights))


def _frozen_features(
    needs: set[str], network: FeatureNetwork | None, dataset: Dataset, processes: Processes, vgg_weights: Path | None
) -> tuple[FeatureNetwork | None, PerceptualDistance | None]:
    """Network for features of reconstructions, and the perceptual distance: each if it is needed and can be had."""
    fits = dataset.image_shape[0] in PERCEPTUAL_CHANNELS
    has_lite0 = fits and efficientnet_lite.is_installed()
    compared, perceptual = network, None
    if compared is None and "features of reconstructions" in needs and has_lite0:
        compared = feature_network("efficientnet-lite0", processes.device)
    if "perceptual features" in needs and fits and vgg_weights is not None:
        perceptual = perceptual_distance("vgg16", vgg_weights)
    elif "perceptual features" in needs and has_lite0:
        perceptual = perceptual_distance()
    return compared, perceptual


def _announce_times(slow: Sequence[Metric], context: Context, say: Callable[[str], None]) -> None:
    """Say what takes long, and about how long, before it starts."""
    estimates = dict(found for metric in slow if metric.estimate and (found := metric.estimate(context)))
    for what, seconds in estimates.items():
        say(f"{what}: about {readable_duration(seconds)}; the other figures are written already")


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


class _Figures:
    """The figures of one evaluation, as they are measured."""

    def __init__(self, plan: MetricPlan, context: Context) -> None:
        self._plan = plan
        self._context = context
        self._values: dict[str, Value] = {}
        self._pixels: dict[str, str] = {}
        self.failed: list[str] = []
        """Lines of the metrics whose code failed."""

    def measure(self, metric: Metric) -> None:
        """Measure one metric, or note why it is not available."""
        assert metric.measure is not None
        name = self._plan.full_name(metric)
        try:
            with self._context.stage(metric.stage or metric.name):
                found: Mapping[str, Value] = metric.measure(self._context)
            _refuse_bad_values(metric, found)
        except UnavailableError as reason:
            self._plan.unavailable[name] = str(reason)
            return
        except Exception as error:
            # Other processes wait for this one within the metric: it cannot go on to the next one alone.
            if (known := told(error)) is None or self._context.processes.world_size > 1:
                raise
            self.failed.append(str(known))
            self._plan.unavailable[name] = f"it failed ({known})"
            return
        self._values |= {name if key == metric.name else key: value for key, value in found.items()}
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
            metrics=self._values,
            unavailable=self._plan.unavailable,
            seconds=context.seconds,
            environment=environment(),
        )


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
