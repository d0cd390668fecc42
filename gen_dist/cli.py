"""Command lines: `launch/train.py PRESET ...` and `gen-dist COMMAND ...`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import tyro

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.presets import DESCRIPTIONS, PRESETS, get_preset

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A command has no options but those of the config."""


_TRAIN_USAGE = """usage: {prog} PRESET [--option value ...] [--fresh]
       {prog} --config FILE [--option value ...] [--fresh]

Train a preset, or the config that a run wrote to its config.json.
The same command resumes a run; --fresh starts it over.

presets:
{presets}

{prog} PRESET --help lists every option with its meaning and default."""


def parse_train(arguments: Sequence[str], prog: str, more: T) -> tuple[TrainConfig, bool, T]:
    """The config to train, whether to start over, and more options of the command.

    Args:
        arguments: words of the command line.
        prog: the command, for help and errors.
        more: a dataclass of further options, with their defaults.

    Raises:
        ConfigError: an unknown preset or option, or a value that cannot be.
        SystemExit: after printing help.
    """
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_TRAIN_USAGE.format(prog=prog, presets=preset_lines()))
        raise SystemExit(0 if words else 2)
    if words[0].startswith("--config="):
        words[:1] = words[0].split("=", maxsplit=1)
    if words[0] == "--config":
        if len(words) < 2 or not words[1]:
            raise ConfigError("--config needs a file, such as runs/vae-mnist/config.json")
        source, default, words = words[1], _read_config(Path(words[1])), words[2:]
    elif words[0].startswith("-"):
        raise ConfigError(f"the preset comes first, as in {prog} vae-mnist --steps 5")
    else:
        source, default, words = words[0], get_preset(words[0]), words[1:]

    flat = tyro.conf.OmitArgPrefixes
    start_over = tyro.conf.arg(help="Remove what an earlier run wrote to the run directory and start over.")
    options_of_both = dataclasses.make_dataclass(
        "Options",
        [
            ("more", flat[type(more)]),
            ("config", flat[tyro.conf.AvoidSubcommands[TrainConfig]]),
            ("fresh", Annotated[tyro.conf.FlagCreatePairsOff[bool], start_over], False),
        ],
    )
    options = _with_short_errors(
        lambda: tyro.cli(options_of_both, args=words, prog=f"{prog} {source}", default=options_of_both(more, default))
    )
    return options.config, options.fresh, options.more


def _read_config(path: Path) -> TrainConfig:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"config file {path} cannot be read: {reason}") from None
    return TrainConfig.from_json(text, str(path))


def resume_command() -> str:
    """The command line that goes on with the run that this process was started for."""
    words = [word for word in sys.argv if word != "--fresh"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return f"the same accelerate launch command with {shlex.join(words)}"
    return shlex.join(["python", *words])


def preset_lines() -> str:
    """One line a preset: its name and what it is."""
    width = max(map(len, PRESETS))
    return "\n".join(f"  {name:{width}}  {DESCRIPTIONS[name]}" for name in PRESETS)


def _with_short_errors(parse: Callable[[], T]) -> T:
    """Parse with tyro; its framed error becomes one line."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"[\u2500-\u257f]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()))
        raise ConfigError(_one_line(text)) from None


def _one_line(error: str) -> str:
    """The sentence that matters of tyro's framed error, without the option's own help text."""
    text = " ".join(error.split())
    text = re.sub(r"^(Value error|Parsing error|Unrecognized options|Missing \S+) ", "", text)
    text = re.sub(r" Argument helptext:.*?(?= For full helptext)", "", text)
    text = re.sub(r"( Perhaps you meant:)(.*?)(?= For full helptext)", _option_names, text)
    return re.sub(r" For full helptext, (see|run) (.*)$", r"; see \2", text)


def _option_names(match: re.Match[str]) -> str:
    return f"{match[1]} {', '.join(re.findall(r'--[a-z-]+', match[2]))}"


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run a command and end the process; a user's error gives one line on standard error and exit code 2."""
    exit_code = _exit_code_of(command)
    # Who joined other processes has loaded this module; the rest need not wait for torch.
    if parallel := sys.modules.get("gen_dist.parallel"):
        parallel.end_process(exit_code)
    sys.exit(exit_code)


def _exit_code_of(command: Callable[[], None]) -> int:
    try:
        command()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or not error.shared:
            where = f"rank {rank}: " if rank != "0" else ""
            print(f"{where}error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells count a command that Ctrl-C ended
    except BrokenPipeError:
        # The reader went away (as `| head` does): no error of ours. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def main() -> None:
    """Entry point of `gen-dist`."""
    functions = [sample, evaluate, compare, report, export, presets, replay]
    run_command(lambda: run_subcommand(functions, sys.argv[1:], "gen-dist"))


def run_subcommand(functions: Sequence[Callable[..., None]], words: Sequence[str], prog: str) -> None:
    """Run the function that the first word names, its arguments parsed from the others.

    Raises:
        ConfigError: an unknown command or option, or a value that cannot be.
        SystemExit: after printing help.
    """
    if not words:
        words = ["--help"]
    commands = {function.__name__: _deferred(function) for function in functions}
    # Parsing gives the call to make: made within, what the command itself prints would count as a parsing error.
    _with_short_errors(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=words, prog=prog))()


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    @functools.wraps(function)
    def call_later(*values: object, **named: object) -> Callable[[], None]:
        return functools.partial(function, *values, **named)

    return call_later


def sample(
    run: tyro.conf.Positional[Path],
    /,
    count: int = 64,
    out: Path = Path("samples.png"),
    columns: int = 8,
    labels: tuple[int, ...] = (),
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Draw new images from a trained model into one picture.

    Args:
        run: Run directory, or one checkpoint in it.
        count: Number of images.
        out: PNG file to write.
        columns: Images a row.
        labels: Classes that a conditional model is to show, by number, in turn. All of them if none is named.
        seed: Key of the latents: the same seed gives the same images.
        device: Where to compute.
    """
    import torch

    from gen_dist.model import load
    from gen_dist.pictures import save_grid

    if columns < 1:
        raise ConfigError(f"columns {columns} is less than 1")
    model = load(run, device=device)
    asked = torch.tensor([labels[place % len(labels)] for place in range(count)]) if labels else None
    images = model.sample(count, asked, seed)
    try:
        save_grid(out, images.cpu().numpy(), columns)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
    print(out)


def export(
    run: tyro.conf.Positional[Path],
    /,
    format: Literal["safetensors", "onnx", "torch-export"],
    out: Path | None = None,
    parts: tuple[Literal["decoder", "encoder"], ...] = (),
) -> None:
    """Write the decoder or generator of a trained model, and its encoder, for other programs to use.

    Args:
        run: Run directory, or one checkpoint in it.
        format: Plain weights (safetensors), or whole programs for any number of images (onnx, torch-export).
        out: Directory to write. None is export-FORMAT in the run directory.
        parts: What to write. All that the model has if none is named.
    """
    from gen_dist.export import export as write_export

    print(write_export(run, format, out, parts, lambda line: print(line, file=sys.stderr)))


def evaluate(
    run: tyro.conf.Positional[Path],
    /,
    metrics: tuple[str, ...] = (),
    samples: int = 10_000,
    nll_samples: int = 5000,
    nll_images: int | None = None,
    data_root: str | None = None,
    features: Literal["digits", "inception"] | None = None,
    inception_weights: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Measure a trained model against the test split, into evaluation.json of its run directory.

    Args:
        run: Run directory; its newest whole checkpoint is evaluated.
        metrics: What to measure, such as fid kid nll. All that the model has if none is named.
        samples: Images to draw, and walks through the latent space.
        nll_samples: Importance samples of one image.
        nll_images: Test images that nll is measured on, spread over the split. All of them if not given.
        data_root: Directory with the torchvision data sets, if it has moved since the run.
        features: Network whose features are compared; digits for 28 x 28 grey images if not given.
        inception_weights: File of InceptionV3's weights; downloaded if not given.
        device: Where to compute.
    """
    from gen_dist import evaluation

    found = evaluation.evaluate(
        run,
        metrics or None,
        samples=samples,
        nll_samples=nll_samples,
        nll_images=nll_images,
        data_root=data_root,
        device=device,
        features=features,
        inception_weights=inception_weights,
        announce=lambda line: print(line, file=sys.stderr),
    )
    if os.environ.get("RANK", "0") == "0":
        print(*found.lines(), sep="\n")


def presets() -> None:
    """List the presets that launch/train.py knows."""
    print(preset_lines())


def replay(run: tyro.conf.Positional[Path], /, step: int) -> None:
    """Run one step of a run again and print its losses; the run directory stays as it is.

    Args:
        run: Run directory.
        step: Optimizer step, as in metrics.jsonl.
    """
    from gen_dist.replay import replay as replay_step

    logs = replay_step(run, step)
    scalars = {name: value for name, value in logs.items() if isinstance(value, float)}  # the others are histograms
    print(f"step {step}  " + "  ".join(f"{name} {value:.6f}" for name, value in scalars.items()))


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path = Path(),
    evaluate: bool = True,
) -> None:
    """Tell which of some runs is better at what: a table, compare.png, compare.md and compare.json.

    Runs of one config with different seeds are taken together.

    Args:
        runs: Two run directories or more, on the same data.
        out: Directory to write to.
        evaluate: Evaluate those runs first that have no evaluation of their newest checkpoint.
    """
    import json

    from gen_dist.atomic_files import write_atomically
    from gen_dist.comparison import comparison_of, markdown, read_runs, table_lines
    from gen_dist.comparison_picture import save_comparison

    if len(runs) < 2:
        raise ConfigError("compare needs two runs or more, as in gen-dist compare runs/vae-mnist runs/dcgan-mnist")
    comparison = comparison_of(read_runs(runs, _evaluate if evaluate else None))
    print("\n".join(table_lines(comparison)))
    files = [out / f"compare.{suffix}" for suffix in ("png", "md", "json")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_comparison(files[0], comparison, _to_stderr)
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
) -> None:
    """Write one HTML file about a run, or about several with their comparison first. It needs nothing else.

    Args:
        runs: Run directories; several are to be on the same data.
        out: HTML file to write. None is report.html in the first run.
        evaluate: Evaluate those runs first that have no evaluation of their newest checkpoint.
        step_times: Replay steps of each run for some seconds, to tell where their time goes.
    """
    from gen_dist.comparison import read_runs
    from gen_dist.report import write_report
    from gen_dist.step_times import measure_step_times

    if not runs:
        raise ConfigError("report needs a run, as in gen-dist report runs/vae-mnist")
    path = out or runs[0] / "report.html"
    read = read_runs(runs, _evaluate if evaluate else None)
    if step_times:
        _to_stderr("replaying some steps to see where their time goes (--no-step-times leaves that out)")
    write_report(path, read, [measure_step_times(run.path, _to_stderr) if step_times else None for run in read])
    print(path)


def _evaluate(run: Path) -> None:
    from gen_dist.evaluation import evaluate

    _to_stderr(f"evaluating {run}")
    evaluate(run, announce=_to_stderr)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
