"""A sweep from its command line to its summary: options, trials, the best config. This file does not import Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from filelock import FileLock, Timeout

from gen_dist.cli import NoOptions, parse_train, without_plugins
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, DamagedError, UserError
from gen_dist.launch.cluster.options import run_location
from gen_dist.launch.sweep.halving import grace_period_of
from gen_dist.launch.sweep.results import Mode, Sweep, choose_metric, make_trials, readable_metric
from gen_dist.launch.sweep.space import (
    draw_trials,
    lines_about_roles,
    parse_space,
    train_command,
    trial_configs,
    with_values,
)
from gen_dist.plugins.faults import told
from gen_dist.plugins.loading import changed_files
from gen_dist.records.reading import OBJECT, TEXT, list_of, read_object
from gen_dist.records.run_paths import RunPaths
from gen_dist.startup import tell

_FILES = ("sweep.json", "sweep.csv", "sweep.png")


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep: what to search, when to stop trials, and where they run."""

    space: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUES ...")
    ] = ()
    """Fields of the config to search, by their names in config.json or as an option, and their values:
    learning_rate=log:1e-4:1e-2 (uniform on a logarithmic scale), objective.beta=uniform:0.5:4,
    network.latent_dim=int:2:64 (log:2:64 prefers small ones), optimizer=adam,adamw (choices). If a field takes several
    values, + joins the parts of a choice: hidden_sizes=400+200,200, betas=0.9+0.98,0.5+0.999. `none` leaves a field
    empty."""
    trials: int = 8
    """Number of trials, drawn from the space by --seed. A larger number later keeps the first trials as they are."""
    metric: str | None = None
    """Metric that ranks the trials, by its name in metrics.jsonl or the end of it: test/nll, diversity_ratio, or one of
    --evaluate-metrics, such as fid. None is the first test metric of the objective. A GAN has none."""
    mode: Mode | None = None
    """Direction in which the metric is better. None is the metric's own direction."""
    grace_period: int | None = None
    """Steps before a trial may be stopped early; the number of steps switches early stopping off. Trials are evaluated
    at least this often. None is evaluate_every, or a ninth of the steps if that is less and not within the warm-up."""
    reduction_factor: float = 3.0
    """Factor between the steps at which trials may be stopped; one of so many trials continues there. With 3, the best
    third of the trials so far continues (ASHA, Li et al. 2020)."""
    concurrent: int | None = None
    """Trials at once. None is as many as the CPUs or GPUs allow."""
    workers: int = 1
    """Processes that train a trial together, one per GPU where there are GPUs."""
    cpus_per_worker: int = 1
    """CPUs that each worker reserves; also its number of threads."""
    storage: str | None = None
    """Parent of the sweep's directory; all hosts must share it. None is the parent of the run directory. The sweep's
    directory is named after the run directory: runs/PRESET-sweep, or NAME-sweep for --run-dir NAME."""
    address: str | None = None
    """HOST:PORT of the head of a running cluster. None starts a cluster on this host, for this command alone."""

    def __post_init__(self) -> None:
        for name in ("trials", "grace_period", "concurrent", "workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value} is less than 1")
        if not 1 < self.reduction_factor < float("inf"):
            raise ConfigError(f"reduction_factor {self.reduction_factor} is not more than 1")

    @property
    def least_cpus(self) -> int:
        """CPUs that the cluster must have for a trial to start."""
        return self.workers * self.cpus_per_worker


@contextlib.contextmanager
def plan_sweep(config: TrainConfig, fresh: bool, options: SweepOptions) -> Iterator[Sweep]:
    """Hold the directory of a sweep, and give the sweep with its trials drawn, checked and read from disk.

    Raises:
        UserError: the space or a config drawn from it is invalid, or the directory holds another sweep or is in use.
    """
    space = parse_space([word for words in options.space for word in words], config)
    metric = choose_metric(config, options.metric, options.mode)
    grace_period = grace_period_of(config, options.grace_period)
    every = min(config.evaluate_every, grace_period)
    draws = draw_trials(space, config.seed, options.trials)
    configs = trial_configs(dataclasses.replace(config, evaluate_every=every), draws)
    for line in lines_about_roles(space, configs[0]):
        tell(line)
    path = _sweep_path(config, options.storage)
    sweep = Sweep(path, space, metric, config.steps, grace_period, make_trials(path, draws, configs))
    lock = FileLock(path / ".lock")
    try:
        _refuse_foreign(path, fresh)
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        if fresh:
            _remove(path)
        _refuse_other_configs(sweep)
        sweep.read()
        sweep.save()
        yield sweep
    except Timeout:
        raise ConfigError(f"another sweep is running in {path}; wait for it or choose another --run-dir") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written to: {error.strerror or error}; choose another --storage") from None
    finally:
        lock.release()


def _sweep_path(config: TrainConfig, storage: str | None) -> Path:
    if storage and "://" in storage:
        raise ConfigError(f"a sweep needs a directory, not {storage}; name one that all hosts share")
    path = Path(run_location(config, storage))
    return path.with_name(f"{path.name}-sweep")


def _refuse_foreign(path: Path, fresh: bool) -> None:
    """Raise ConfigError if a directory is not a sweep but has files that a sweep would overwrite or remove."""
    try:
        read_object(path / _FILES[0], {"metric": TEXT, "trials": list_of(OBJECT)}, "")
    except FileNotFoundError:
        taken = [name for name in _FILES if os.path.lexists(path / name)]
    except DamagedError:
        taken = [_FILES[0]] if fresh else []  # otherwise reading it is refused, and nothing overwritten
    else:
        return
    if taken:
        raise ConfigError(
            f"{path} is not a sweep but has {', '.join(taken)}, which a sweep there would overwrite; choose another "
            "--run-dir, or move that away"
        )


def _refuse_other_configs(sweep: Sweep) -> None:
    started = [trial for trial in sweep.trials if RunPaths(trial.path).config.exists()]
    if started:
        from gen_dist.records.run_directory import refuse_other_config  # it loads torch

        for trial in started:
            refuse_other_config(trial.path, trial.config)


def _remove(path: Path) -> None:
    """Remove the files of an earlier sweep, and nothing else."""
    from gen_dist.records.run_mark import is_run, start_over

    for run in path.glob("trial_*"):
        if is_run(run):
            start_over(run)
    for name in _FILES:
        (path / name).unlink(missing_ok=True)


def command_source(words: Sequence[str]) -> list[str]:
    """Words of a command line that name the preset or config file, and plug-ins."""
    others, plugins = without_plugins(words)
    named = [word for plugin in plugins for word in ("--plugin", plugin)]
    return [*(others[:2] if others[0] == "--config" else others[:1]), *named]


def best_command(sweep: Sweep, config: TrainConfig, source: Sequence[str]) -> str | None:
    """Command that trains the best config again, in its own run directory; None if no trial finished.

    Args:
        sweep: the finished sweep.
        config: the config whose fields it searched.
        source: words that name the preset or config file.
    """
    if not sweep.best:
        return None
    words, _ = without_plugins(source)  # loaded, from files that may have changed since
    base, _, _ = parse_train(words, "gen-dist train", NoOptions())
    run_dir = config.run_path.with_name(f"{config.run_path.name}-best")
    best = dataclasses.replace(with_values(config, sweep.best.values), run_dir=str(run_dir))
    return train_command(source, base, best)


def show_trials(sweep: Sweep) -> str:
    """Print the table and write table and picture, also for a stopped sweep, and return the line about the files."""
    from gen_dist.launch.sweep.plot import save_plot

    sweep.save()
    sweep.save_table()
    drawn = any(trial.value is not None and trial.status != "failed" for trial in sweep.trials)
    if drawn:
        save_plot(sweep.path / "sweep.png", sweep)
    print(*sweep.table(), sep="\n", flush=True)
    return f"table in {sweep.path / 'sweep.csv'}" + (f", picture in {sweep.path / 'sweep.png'}" if drawn else "")


def tell_stopped(sweep: Sweep) -> None:
    """Show the trials of a sweep that Ctrl-C stopped. A file that cannot be written is one line, and does not hide the
    stop.
    """
    try:
        print(show_trials(sweep), flush=True)
    except (UserError, OSError) as error:
        if not (known := told(error)):
            raise
        tell(f"warning: the trials cannot be shown: {known}")


def conclude(sweep: Sweep, config: TrainConfig, source: Sequence[str]) -> None:
    """Print the table, write table and picture, and say how to train the best config.

    Raises:
        UserError: no trial finished.
    """
    files = show_trials(sweep)
    if not sweep.best:
        reasons = [trial.short_reason for trial in sweep.ranked if trial.reason]
        raise UserError(f"no trial finished; {reasons[0] if reasons else 'all were stopped early'}")
    stopped = sum(trial.status == "stopped" for trial in sweep.trials)
    every = sweep.steps * len(sweep.trials)
    saved = sweep.saved_steps()
    print(
        f"early stopping ended {stopped} of {len(sweep.trials)} trials: {saved:,} of {every:,} steps saved "
        f"({saved / every:.0%})",
        f"best: trial {sweep.best.index}, {sweep.metric.name} {readable_metric(sweep.best.value or 0.0)}, model in "
        f"{sweep.best.path}",
        f"  {best_command(sweep, config, source)}",
        files,
        sep="\n",
        flush=True,
    )
    for place in changed_files(config.plugins):
        tell(f"warning: plug-in {place} has changed since the sweep began; its trials have the code of before")
