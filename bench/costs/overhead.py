"""Share of a run that recording takes: `python bench/costs/overhead.py --help`.

Recording is everything that a run does besides its steps: log lines, the progress bar, evaluations, sample checks,
pictures, checkpoints, and the charts and the summary at its end. Runs with the preset's own intervals take turns with
runs whose intervals lie beyond their end, each in a new process. A stopwatch inside both books the parts of recording
by name; a nested part counts once, in the inner one. It shows the cost of each part in the first kind, and the
recording left in the second: any run ends with an evaluation, pictures, a checkpoint and charts.

It reports four figures:

- by stopwatch: time booked to recording, as a share of the time from the first step to the run's end;
- by difference: wall time of the first kind of run less that of the second, plus the recording left in the second. It
  includes costs that the stopwatch cannot see, such as slower steps after an evaluation emptied the caches or beside
  a thread that writes a checkpoint: the stopwatch books the thread of the steps alone;
- at intervals: the first without the recording after the last step, which is due whatever the intervals are;
- of the whole preset: if `--steps` cuts runs short, the share in a run of the preset's own number of steps, computed
  from the medians of the parts and of a step. The end of a run weighs more in a short run.
"""

import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread
from bench.measuring.temporary import temporary_directory
from gen_dist.cli import call_parsed, run_command
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.presets import get_preset

BAR = 0.03
"""Greatest acceptable share of recording in a run."""

PARTS = {
    "progress bar": "gen_dist.records.tracker:Tracker.advance",
    "logs to the host": "gen_dist.training.step_logs:StepLogs.collect",
    "means of the logs": "gen_dist.training.step_logs:StepLogs.means",
    "line of the log": "gen_dist.records.tracker:Tracker.log",
    "evaluation on the test split": "gen_dist.training.trainer:Trainer.evaluate",
    "checks of samples": "gen_dist.evaluation.sample_checks:SampleChecks.measure",
    "pictures": "gen_dist.pictures.gallery:Gallery.at_step",
    "checkpoint": "gen_dist.training.run:_Run._save",
    "charts at the end": "gen_dist.pictures.gallery:Gallery.at_end",
    "summary at the end": "gen_dist.training.run_recorder:MainRunRecorder.finish",
}
"""Parts of recording, and the function that does each."""
EVERY = {
    **dict.fromkeys(("logs to the host", "means of the logs", "line of the log"), "log_every"),
    **dict.fromkeys(("evaluation on the test split", "checks of samples"), "evaluate_every"),
    "pictures": "sample_every",
    "checkpoint": "checkpoint_every",
}
"""The interval of each part that has one; the bar moves at every step, and the others come once."""
BEGUN = "gen_dist.training.run:_Run._loop"
"""Function whose first call begins the first step. Start-up before it is measured by bench/suite/test_startup.py."""
RECORD = "gen_dist.training.run:_Run._record"
"""Function that is called whenever something is due, and once after the last step."""
WITHOUT_WAITING = "progress bar"
"""It moves at every step. Waiting for a GPU there would keep the host from preparing the next step."""


@dataclass
class Booked:
    """Times of one run by its stopwatch."""

    run_seconds: float = 0.0
    """Wall time from the first step to the end of `train`."""
    start_seconds: float = 0.0
    """Wall time of `train` before the first step."""
    steps: int = 0
    last_seconds: float = 0.0
    """Seconds of recording after the last step."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def recording_seconds(self) -> float:
        """Seconds of all parts together."""
        return sum(self.seconds.values())

    @property
    def step_seconds(self) -> float:
        """Seconds per step without recording."""
        return (self.run_seconds - self.recording_seconds) / self.steps


Pair = tuple[Booked, Booked]
"""A run with the preset's own intervals, and one with intervals beyond its end."""


def main(
    presets: tuple[str, ...] = ("vae-mnist", "dcgan-mnist"),
    data: str = "mnist5k",
    data_root: Path | None = None,
    rounds: int = 5,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Measure, print the figures and, as the last line, all of them in JSON.

    Args:
        presets: names of presets.
        data: source of images.
        data_root: directory with torchvision's MNIST, which is then the data. None: what `data` says.
        rounds: runs of each preset and kind.
        steps: optimizer steps of a run. None is what the preset says.
        seed: the first round's; rounds have consecutive ones.
        device: cpu or cuda.
        out: file for the JSON. None prints it alone.
    """
    if rounds < 1:
        raise ConfigError(f"rounds {rounds} is less than 1")
    if not presets:
        raise ConfigError("name at least one preset, such as --presets vae-mnist")
    check_out(out)
    before = conditions()
    if data_root is not None:
        data = "mnist"
    with temporary_directory() as cache:
        os.environ["GEN_DIST_CACHE"] = str(cache)  # new processes have it too: only the first run packs the images
        configs = {
            name: replace(get_preset(name), data=data, data_root=str(data_root or "data"), device=device)  # type: ignore[arg-type]
            for name in presets
        }
        if steps is not None:
            configs = {name: replace(config, steps=steps) for name, config in configs.items()}
        pairs: dict[str, list[Pair]] = {name: [] for name in presets}
        with tqdm(total=2 * rounds * len(presets), unit="run", disable=None) as bar:
            for turn in range(rounds):
                for name, config in configs.items():
                    pairs[name].append(pair_of(replace(config, seed=seed + turn), turn, bar.update))
    figures = {name: summarize(configs[name], pairs[name]) for name in presets}
    for name in presets:
        print_report(name, configs[name], figures[name])
    ran = pairs[presets[0]][0][0].conditions | {"load_average": before["load_average"]}
    runs = {name: [[asdict(run) for run in pair] for pair in pairs[name]] for name in presets}
    text = json.dumps({"figures": figures, "conditions": ran, "data": data, "runs": runs})
    print_and_write(text, out)


def pair_of(config: TrainConfig, turn: int, done: Callable[[], object]) -> Pair:
    """One run of each kind; neither always follows the other."""
    kinds = [config, with_nothing_due(config)]
    booked: dict[int, Booked] = {}
    for kind in (0, 1) if turn % 2 == 0 else (1, 0):
        booked[kind] = run_in_new_process(kinds[kind])
        done()
    return booked[0], booked[1]


def with_nothing_due(config: TrainConfig) -> TrainConfig:
    """The same run with all intervals beyond its end."""
    never = config.steps + 1
    return replace(config, log_every=never, evaluate_every=never, sample_every=never, checkpoint_every=never)


def run_in_new_process(config: TrainConfig) -> Booked:
    """A whole run under the stopwatch, in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(booked_run, config).result()
        except SystemExit:  # a signal ends this process, which would wait for the rest of the run
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def booked_run(config: TrainConfig) -> Booked:
    """A whole run under the stopwatch, in a directory that is removed afterwards."""
    from bench.measuring.finished import train_to_the_end

    booked = Booked(steps=config.steps)
    with temporary_directory() as directory, booking(booked):
        supervised = replace(config, run_dir=f"{directory}/run")
        with contextlib.redirect_stderr(io.StringIO()):  # a log file's lines; a terminal's bar would count the screen
            start = time.perf_counter()
            train_to_the_end(supervised)
            booked.run_seconds = time.perf_counter() - start - booked.start_seconds
    booked.conditions = conditions()
    return booked


@contextlib.contextmanager
def booking(booked: Booked) -> Iterator[None]:
    """Context that books the time of each part of recording, without that of nested parts."""
    made = time.perf_counter()
    thread_of_steps = threading.get_ident()
    last_step_done = False
    inner = [0.0]  # seconds of the parts within each one that is being done, the outermost first

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread_of_steps:
                return function(*args, **kwargs)
            if part != WITHOUT_WAITING:
                wait_for_device()  # what it still works at are steps
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                own = seconds - inner.pop()
                booked.seconds[part] += own
                booked.last_seconds += own if last_step_done else 0.0
                booked.calls[part] += 1
                inner[-1] += seconds

        return call

    def begun(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            booked.start_seconds = time.perf_counter() - made
            return function(*args, **kwargs)

        return call

    def noticing_the_end(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(run: Any, *args: Any) -> Any:
            nonlocal last_step_done
            last_step_done = run.step == run.config.steps
            return function(run, *args)

        return call

    with contextlib.ExitStack() as stack:
        for part, place in PARTS.items():
            stack.enter_context(replaced(place, functools.partial(timed, part)))
        stack.enter_context(replaced(RECORD, noticing_the_end))
        stack.enter_context(replaced(BEGUN, begun))
        yield


@contextlib.contextmanager
def replaced(place: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Context that replaces the function at `module:Class.method` by `by(function)`."""
    owner, _, name = place.rpartition(".")
    home = pkgutil.resolve_name(owner)
    with mock.patch.object(home, name, by(getattr(home, name))):
        yield


def wait_for_device() -> None:
    """Wait until a GPU has finished its work."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def summarize(config: TrainConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Shares and parts, each as p20, median, p80 and n."""
    usual = [pair[0] for pair in pairs]
    by_difference = [(on.run_seconds - (off.run_seconds - off.recording_seconds)) / on.run_seconds for on, off in pairs]
    parts = {}
    for part in PARTS:
        calls = usual[0].calls[part]
        of_a_call = spread([run.seconds[part] / run.calls[part] for run in usual]) if calls else None
        share = spread([run.seconds[part] / run.run_seconds for run in usual])
        parts[part] = {"calls": calls, "seconds_of_a_call": of_a_call, "share_of_the_run": share}
    step = spread([run.step_seconds for run in usual])
    of_preset = seconds_of_preset(config, parts)
    steps = get_preset(config.preset).steps
    recording = sum(of_preset.values())
    return {
        "run_seconds": spread([run.run_seconds for run in usual]),
        "start_seconds": spread([run.start_seconds for run in usual]),
        "run_seconds_with_nothing_due": spread([run.run_seconds for _, run in pairs]),
        "recording_seconds": spread([run.recording_seconds for run in usual]),
        "recording_seconds_with_nothing_due": spread([run.recording_seconds for _, run in pairs]),
        "step_seconds": step,
        "step_seconds_with_nothing_due": spread([run.step_seconds for _, run in pairs]),
        "share_by_stopwatch": spread([run.recording_seconds / run.run_seconds for run in usual]),
        "share_at_intervals": spread([(run.recording_seconds - run.last_seconds) / run.run_seconds for run in usual]),
        "share_by_difference": spread(by_difference),
        "parts": parts,
        "of_whole_preset": {
            "steps": steps,
            "seconds": of_preset,
            "share": recording / (recording + steps * step["median"]),
        },
    }


def seconds_of_preset(config: TrainConfig, parts: Mapping[str, Any]) -> dict[str, float]:
    """Cost of each part in a run of the preset's number of steps, from the medians of its calls."""
    steps = get_preset(config.preset).steps
    seconds = {}
    for part, found in parts.items():
        if part in EVERY:
            calls = math.ceil(steps / getattr(config, EVERY[part]))  # also at the last step
        else:
            calls = steps if part == "progress bar" else 1
        each = found["seconds_of_a_call"]
        seconds[part] = calls * each["median"] if each else 0.0
    return seconds


def print_report(preset: str, config: TrainConfig, found: Mapping[str, Any]) -> None:
    """Print the figures of one preset."""
    print(f"\n{preset}, {config.steps} steps of {config.global_batch_size} images")
    print(f"{'':44}{'median':>10}{'p20':>10}{'p80':>10}{'n':>4}")
    for name in ("run_seconds", "run_seconds_with_nothing_due", "recording_seconds", "start_seconds"):
        print_figure(f"{name.replace('_seconds', '').replace('_', ' ')}, s", found[name], "10.3f")
    for name in ("step_seconds", "step_seconds_with_nothing_due"):
        scaled = {key: value if key == "n" else 1e3 * value for key, value in found[name].items()}
        print_figure(f"{name.replace('_seconds', '').replace('_', ' ')}, ms", scaled, "10.3f")
    for name in ("share_by_stopwatch", "share_at_intervals", "share_by_difference"):
        print_figure(f"recording's {name.replace('_', ' ')} (bar: {BAR:.0%})", found[name], "10.2%")
    whole = found["of_whole_preset"]
    steps = whole["steps"]
    print(f"{f'of a run of {steps} steps, by the parts below':44}{whole['share']:10.2%}")
    print(f"{'part':32}{'calls':>8}{'ms a call':>12}{'p20':>9}{'p80':>9}{'share':>9}")
    for part, figure in found["parts"].items():
        each = figure["seconds_of_a_call"]
        if each:
            times = f"{1e3 * each['median']:12.3f}{1e3 * each['p20']:9.3f}{1e3 * each['p80']:9.3f}"
            print(f"  {part:30}{figure['calls']:8}{times}{figure['share_of_the_run']['median']:9.2%}")


def print_figure(label: str, figure: Mapping[str, float], form: str) -> None:
    """One line of a table."""
    print(f"{label:44}{figure['median']:{form}}{figure['p20']:{form}}{figure['p80']:{form}}{figure['n']:4}")


if __name__ == "__main__":
    run_command(lambda: call_parsed(main, sys.argv[1:], "bench/costs/overhead.py"))
