"""One evaluator for VAEs and GANs: the metrics of a trained run, in evaluation.json.

Metrics are not named here. `gen_dist.evaluation.metrics` has a file for each, the plan selects those that a model and
its data have, and the context computes their shared inputs. Samples are compared with the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError, UnreadableError
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.features import FeatureName
from gen_dist.evaluation.measuring import Figures, setting_of
from gen_dist.evaluation.metric import Metric
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.nearest_pairs import draw_nearest_pairs
from gen_dist.evaluation.plan import MetricPlan, check_options
from gen_dist.evaluation.record import Evaluation, UnmeasuredError, UnwrittenError, add_evaluation, read_evaluation
from gen_dist.evaluation.reference import reference_images
from gen_dist.inference.loading import fitted_prior_of, model_of, read_same_checkpoint
from gen_dist.inference.model import PriorName
from gen_dist.objectives.evaluating import evaluating
from gen_dist.parallel.collectives import FailureVote, agree, in_main
from gen_dist.parallel.processes import settings_kept, start_processes
from gen_dist.records.readable import readable_duration
from gen_dist.records.reading import config_of_run
from gen_dist.records.run_data import open_run_data
from gen_dist.records.run_directory import wandb_id_of
from gen_dist.records.run_paths import RunPaths, WhichCheckpoint
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
    reference: str = "test",
    prior: PriorName = "normal",
    inception_weights: Path | None = None,
    vgg_weights: Path | None = None,
    checkpoint: WhichCheckpoint = "newest",
    announce: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluate a whole checkpoint of a run, and write evaluation.json in the run directory; of the best checkpoint,
    evaluation_best.json. Call it in every process.

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
        reference: images that FID, KID, precision, recall, density and coverage compare samples with: `test` or `train`
            for a split of the run's data, or a source such as folder:PATH, of which all images are taken.
        prior: distribution of the samples' latents; `fitted` is that of `gen-dist fit-prior`, for this checkpoint.
        inception_weights: file of InceptionV3's weights; None downloads them if they are missing.
        vgg_weights: torchvision's file of VGG16's weights: perceptual distances are then LPIPS. None measures them in
            features of EfficientNet-Lite0.
        checkpoint: the newest one, or the best that the run keeps.
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
    options |= {"reference": reference, "prior": prior}
    agree({name: repr(value) for name, value in options.items()}, processes)
    say = announce if processes.is_main else _silent
    read, config = read_same_checkpoint(run, say, processes, checkpoint)
    digest = read.facts["data_digest"]
    dataset = open_run_data(run, config, say, digest=digest, data=data, data_root=data_root)
    model = model_of(read, config, processes.device)
    if prior == "fitted":
        model.find_fitted_prior = partial(fitted_prior_of, model, run, checkpoint)
        model.latents(1, prior=prior)  # a missing one is refused before anything that takes minutes
    compared = reference_images(reference, dataset, data_root or config.data_root, config.packing, say)
    setting = setting_of(model, dataset, processes, asked, features, (compared, prior), inception_weights, vgg_weights)
    plan = MetricPlan(setting, asked, samples, nll_samples, nll_images)
    context = Context(
        *(model, dataset, processes, setting.network, samples, nll_samples, plan.nll_rows),
        reconstruction_network=setting.reconstruction_network,
        perceptual=setting.perceptual,
        reference=compared,
        prior=prior,
    )
    # A damaged one is refused before anything that takes minutes.
    in_main(lambda: read_evaluation(run, checkpoint), processes)
    with evaluating(model.objective):
        evaluation = _measure(run, read.step, plan, context, say, checkpoint)
    if processes.is_main:
        _send_to_wandb(run, config, evaluation, say)
    return evaluation


def _measure(
    run: Path, step: int, plan: MetricPlan, context: Context, say: Callable[[str], None], which: WhichCheckpoint
) -> Evaluation:
    """Measure the available metrics and write them, the slow ones last: an interrupted evaluation has the others.

    Raises:
        UnwrittenError: they are measured and cannot be written. The error has them.
        UnmeasuredError: the code of a metric fails. The others are written, and the error has them.
    """
    found = Figures(plan, context, FailureVote(context.processes))
    unwritten: UnwrittenError | None = None

    def write() -> Evaluation:
        nonlocal unwritten
        context.keep_reference()
        evaluation = found.evaluation(step)
        unwritten = None
        try:
            return in_main(lambda: add_evaluation(run, evaluation, say, which), context.processes)
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
    if "copies" in context and context.processes.is_main:
        draw_nearest_pairs(RunPaths(run).nearest_pairs_of(which), context, say)
    if unwritten is not None:
        raise unwritten
    if found.failed:
        failed = UnmeasuredError(found.failed[0])
        failed.evaluation = evaluation
        raise failed
    return evaluation


def _announce_times(slow: Sequence[Metric], context: Context, say: Callable[[str], None]) -> None:
    """Say what takes long, and about how long, before it starts."""
    estimates = dict(found for metric in slow if metric.estimate and (found := metric.estimate(context)))
    for what, seconds in estimates.items():
        say(f"{what}: about {readable_duration(seconds)}; the other figures are written already")


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
