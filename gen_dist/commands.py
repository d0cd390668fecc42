"""The commands of `gen-dist`, on presets and on runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gen_dist.cli import preset_lines, run_command, run_subcommand, without_plugins
from gen_dist.config import DataConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.model_commands import encode as encode
from gen_dist.model_commands import export as export
from gen_dist.model_commands import fit_prior as fit_prior
from gen_dist.model_commands import invert as invert
from gen_dist.model_commands import refuse_unwritable
from gen_dist.model_commands import sample as sample
from gen_dist.model_commands import walk as walk
from gen_dist.plugins.loading import load as load_plugin
from gen_dist.startup import tell

if TYPE_CHECKING:
    from gen_dist.evaluation.record import Evaluation
    from gen_dist.training.step_times import StepTimes

_PACKING = DataConfig()


def main() -> None:
    """Entry point of `gen-dist`."""
    if sys.argv[1:2] == ["train"]:  # its options are the config's, which depend on the preset
        run_command(train)
    run_command(lambda: run_subcommand(FUNCTIONS, _words_with_plugins(), "gen-dist"))


def _words_with_plugins() -> list[str]:
    """Words of the command line, after its plug-ins are loaded: each command knows their metrics, sources and kinds."""
    words, plugins = without_plugins(sys.argv[1:])
    for plugin in plugins:
        load_plugin(plugin)
    return words


def train() -> None:
    """Train a preset, or resume its run. `gen-dist train PRESET --help` lists every option."""
    from gen_dist.launch import train as command

    command.main(sys.argv[2:], "gen-dist train")


def evaluate(
    run: tyro.conf.Positional[Path | None] = None,
    /,
    metrics: tuple[str, ...] = (),
    samples: int = 10_000,
    nll_samples: int = 5000,
    nll_images: int | Literal["all"] = 1000,
    data: str | None = None,
    data_root: str | None = None,
    features: Literal["digits", "efficientnet-lite0", "inception"] | None = None,
    reference: str = "test",
    prior: Literal["normal", "fitted"] = "normal",
    images: str | None = None,
    out: Path | None = None,
    inception_weights: Path | None = None,
    vgg_weights: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    checkpoint: Literal["newest", "best"] = "newest",
) -> None:
    """Measure a trained model against the test split and write evaluation.json in its run directory.

    Or measure images that no run of ours made, with --images and --reference.

    Args:
        run: Run directory.
        metrics: Metrics, such as fid kid nll. All that the model has if none is named.
        samples: Number of images to draw, and of walks through the latent space.
        nll_samples: Importance samples per image.
        nll_images: Number of test images for nll and perceptual distances, spread over the split, or all. It is part of
            the figure's name.
        data: The data under their present place, such as folder:/new/place, if they have moved since the run.
        data_root: Directory with the torchvision data sets, if it has moved since the run.
        features: Network whose features are compared. For 28 x 28 grey images it is digits if not given.
        reference: Images that FID, KID, precision, recall, density and coverage compare samples with: the test or train
            split of the run's data, or a source such as folder:holiday/ or cifar10. Up to 50,000 of them are used.
        prior: Distribution of the samples' latents: standard normal, or the one that gen-dist fit-prior fitted.
        images: Instead of a run's samples, images of a folder or any other source, such as parquet:PATH. Those of
            --reference decide their size and channels; it has to be a source, too.
        out: With --images, a JSON file for the figures.
        inception_weights: File with the weights of InceptionV3. Downloaded if not given.
        vgg_weights: File with torchvision's weights of VGG16, for LPIPS as the perceptual distance.
        device: Where to compute.
        checkpoint: Checkpoint to evaluate; `best` is that of --keep-best, whose figures stand in evaluation_best.json.
    """
    from gen_dist.evaluation import evaluator as evaluation
    from gen_dist.evaluation.record import EvaluationError

    if images is not None:
        if run is not None:
            raise ConfigError(f"evaluate measures {run} or --images {images}; leave one out")
        of_runs = {
            "data": data,
            "vgg_weights": vgg_weights,
            "prior": prior != "normal",
            "checkpoint": checkpoint != "newest",
        }
        if given := [name for name, value in of_runs.items() if value]:
            raise ConfigError(f"{' and '.join(given)} is for runs, not for --images; leave it out")
        return _evaluate_images(
            images,
            reference,
            metrics or None,
            samples=samples,
            data_root=data_root or "data",
            device=device,
            features=features,
            inception_weights=inception_weights,
            out=out,
        )
    if run is None:
        raise ConfigError("evaluate needs a run, as in gen-dist evaluate runs/vae-mnist, or --images and --reference")
    if out is not None:
        raise ConfigError("out is of --images; the figures of a run are in its evaluation.json")
    try:
        found = evaluation.evaluate(
            run,
            metrics or None,
            samples=samples,
            nll_samples=nll_samples,
            nll_images=None if nll_images == "all" else nll_images,
            data=data,
            data_root=data_root,
            device=device,
            features=features,
            reference=reference,
            prior=prior,
            inception_weights=inception_weights,
            vgg_weights=vgg_weights,
            checkpoint=checkpoint,
            announce=tell,
        )
    except EvaluationError as error:
        _print_figures(error.evaluation)
        raise
    _print_figures(found)


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path = Path(),
    evaluate: bool = True,
    data: str | None = None,
    data_root: str | None = None,
) -> None:
    """Compare runs, metric by metric, in a table, compare.png, compare.md and compare.json.

    Runs that differ in their seed only are one group.

    Args:
        runs: Two or more run directories, on the same data.
        out: Directory to write to.
        evaluate: First evaluate runs that have no evaluation of their newest checkpoint.
        data: The data under their present place, such as folder:/new/place, if they have moved since the run.
        data_root: Directory with the torchvision data sets, if it has moved since the run.
    """
    import json

    from gen_dist.files import write_atomically
    from gen_dist.reports.comparison import comparison_of, markdown, read_runs, table_lines
    from gen_dist.reports.comparison_picture import save_comparison

    if len(runs) < 2:
        raise ConfigError("compare needs two or more runs, as in gen-dist compare runs/vae-mnist runs/dcgan-mnist")
    try:
        out.mkdir(parents=True, exist_ok=True)  # before anything that takes minutes
    except OSError as error:
        raise ConfigError(f"{out} cannot be written to: {error.strerror}") from None
    comparison = comparison_of(
        read_runs(runs, partial(_evaluate, data=data, data_root=data_root) if evaluate else None)
    )
    print("\n".join(table_lines(comparison)))
    files = [out / f"compare.{suffix}" for suffix in ("png", "md", "json")]
    try:
        save_comparison(files[0], comparison, tell, data=data, data_root=data_root)
        write_atomically(files[1], markdown(comparison, files[0].name))
        write_atomically(files[2], json.dumps(comparison.as_json(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written to: {error.strerror}") from None
    print("\n".join(["", *map(str, files)]))


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path | None = None,
    evaluate: bool = True,
    step_times: bool = True,
    data: str | None = None,
    data_root: str | None = None,
) -> None:
    """Write one self-contained HTML file about a run, or about several runs and their comparison.

    Args:
        runs: Run directories, on the same data if there are several.
        out: HTML file to write. If not given, report.html in the first run directory.
        evaluate: First evaluate runs that have no evaluation of their newest checkpoint.
        step_times: Replay steps of each run for a few seconds, to measure where their time goes.
        data: The data under their present place, such as folder:/new/place, if they have moved since the run.
        data_root: Directory with the torchvision data sets, if it has moved since the run.
    """
    from gen_dist.records.run_paths import RunPaths
    from gen_dist.reports import write_report
    from gen_dist.reports.comparison import read_runs
    from gen_dist.training.step_times import measure_step_times

    if not runs:
        raise ConfigError("report needs a run, as in gen-dist report runs/vae-mnist")
    path = out or RunPaths(runs[0]).report
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{path} cannot be written: a report is an HTML file; name it {path.stem}.html")
    if out or path.parent.is_dir():  # a run that is not there is another error
        refuse_unwritable(path)
    read = read_runs(runs, partial(_evaluate, data=data, data_root=data_root) if evaluate else None)
    if step_times:
        tell("replaying some steps to see where their time goes (--no-step-times leaves that out)")

    def measured(run: Path) -> StepTimes | None:
        if not step_times:
            return None
        try:
            return measure_step_times(run, tell, data=data, data_root=data_root)
        except UserError as error:
            tell(f"warning: the report has no step times of {run}: {error}")
            return None

    write_report(path, read, [measured(run.path) for run in read])
    print(path)


def data(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    /,
    out: Path | None = None,
    data_root: str = "data",
    packing: tyro.conf.OmitArgPrefixes[DataConfig] = _PACKING,
) -> None:
    """Say what would be packed of a source of images, before anything is: counts, sizes, modes, classes, what is left
    out, what the images lose, and the time and bytes it takes. Nothing is written but a contact sheet.

    Args:
        source: Source of the images as --data of gen-dist train takes it, such as folder:holiday/.
        out: Contact sheet to write, with images as training would see them: .png, .jpg or .webp.
        data_root: Directory with the torchvision data sets.
        packing: How the images would be packed.
    """
    from gen_dist.data import survey_source
    from gen_dist.files import reason_of
    from gen_dist.pictures.contact_sheet import save_contact_sheet
    from gen_dist.pictures.grids import format_of

    if out:
        format_of(out)  # before anything that takes seconds
    survey = survey_source(source, data_root, packing, tell)
    print(*survey.lines(), sep="\n", flush=True)
    if survey.problem:
        raise survey.problem
    if not out:
        return
    try:
        save_contact_sheet(out, survey)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {reason_of(error)}") from None
    print(out)


def presets() -> None:
    """List the presets that `gen-dist train` knows, with their measured results on full MNIST."""
    print(preset_lines(results=True))


def launchers() -> None:
    """Print the directory with Accelerate's configs and slurm.sh."""
    import gen_dist

    print(Path(gen_dist.__path__[0]) / "launch")


def replay(
    run: tyro.conf.Positional[Path],
    /,
    step: int,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    data: str | None = None,
    data_root: str | None = None,
) -> None:
    """Run one step of a run again and print its losses. The run directory is not changed.

    Args:
        run: Run directory.
        step: Optimizer step, as in metrics.jsonl.
        device: Where to compute. The run's device if not given, or the CPU if there is no GPU.
        data: The data under their present place, such as folder:/new/place, if they have moved since the run.
        data_root: Directory with the torchvision data sets, if it has moved since the run.
    """
    from gen_dist.training.replay import replay as replay_step

    logs = replay_step(run, step, tell, device=device, data=data, data_root=data_root)
    scalars = {name: value for name, value in logs.items() if isinstance(value, float)}  # without histograms
    print(f"step {step}  " + "  ".join(f"{name} {value:.6f}" for name, value in scalars.items()))


def _evaluate_images(*sources: Any, **options: Any) -> None:
    from gen_dist.evaluation.image_sets import evaluate_images, lines_of
    from gen_dist.evaluation.record import EvaluationError

    try:
        found = evaluate_images(*sources, announce=tell, **options)
    except EvaluationError as error:
        if error.evaluation is not None and os.environ.get("RANK", "0") == "0":
            print(*lines_of(error.evaluation), sep="\n", flush=True)
        raise
    if os.environ.get("RANK", "0") == "0":
        print(*lines_of(found), sep="\n", flush=True)


def _print_figures(found: Evaluation | None) -> None:
    if found is not None and os.environ.get("RANK", "0") == "0":
        print(*found.lines(), sep="\n", flush=True)


def _evaluate(run: Path, data: str | None = None, data_root: str | None = None) -> Evaluation | None:
    from gen_dist.evaluation.evaluator import evaluate
    from gen_dist.evaluation.record import EvaluationError

    tell(f"evaluating {run}")
    try:
        return evaluate(run, data=data, data_root=data_root, announce=tell)
    except EvaluationError as error:
        tell(f"warning: {error}")
        return error.evaluation


def check(
    plugins: tyro.conf.Positional[tuple[str, ...]],
    /,
    data: tuple[str, ...] = (),
    image_size: int | str = 28,
    channels: Literal[1, 3] = 1,
    slow: bool = True,
) -> None:
    """Check the objectives, networks, metrics and sources of plug-ins in small runs; exit code 1 if a check fails.

    Args:
        plugins: Python files, or modules to import.
        data: Sources of the plug-ins with a path to read, as NAME:PATH.
        image_size: Side, or width x height as in 48x32, of the random images that objectives and networks are checked
            on.
        channels: Their channels.
        slow: Also train objectives in two processes and compiled, which takes up to a minute of one core.
    """
    if not plugins:
        raise ConfigError("check needs a plug-in, as in gen-dist check my_gan.py")
    width, height = DataConfig(image_size=image_size).size or (28, 28)
    records = [load_plugin(plugin) for plugin in plugins]
    from gen_dist.testing.plug_in import check_plugin, heading, print_row, summary

    print(heading())
    results = [
        result
        for record in records
        for result in check_plugin(record, (channels, height, width), data, slow=slow, announce=print_row)
    ]
    print(summary(results))
    if any(one.outcome == "failed" for one in results):
        raise SystemExit(1)


FUNCTIONS: list[Callable[..., None]] = [
    *(train, sample, evaluate, compare, report),
    *(export, encode, fit_prior, walk, invert, data, presets, replay, launchers, check),
]

if __name__ == "__main__":
    main()
