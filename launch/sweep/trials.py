"""The trials of a sweep in Ray Tune: what each does, when one is stopped early, and how the command looks on."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from gen_dist.cli import resume_command
from gen_dist.errors import TakenOverError, UserError
from gen_dist.launch.cluster.message_desk import Desk, brief
from gen_dist.launch.cluster.options import WorkerOptions
from gen_dist.launch.cluster.watching import LOOK_SECONDS
from gen_dist.launch.cluster.workers import Task, told_to_stop, trainer
from gen_dist.launch.sweep.halving import Halving
from gen_dist.launch.sweep.plan import SweepOptions
from gen_dist.launch.sweep.results import Board, Metric, Sweep, Trial
from gen_dist.training.outcome import DivergenceError
from gen_dist.training.stopping import stop_signals

_SAVE_SECONDS = 60.0
"""How long trials may take to save and stop."""
_TUNE_DIRECTORY = ".tune"
_WATCHES = {"node:__internal_head__": 0.001}
"""What a trial takes whose workers have places of their own: Tune wants something, and each CPU may be a worker's."""
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}

_leave = threading.Event()
"""Set in the command's process, it ends all trials at once. Tune pickles what it is given: no event can be in there."""


@dataclass(frozen=True)
class Plan:
    """What all trials are told."""

    launch: str
    """Name of this start of the sweep."""
    trials: tuple[Trial, ...]
    metric: Metric
    options: SweepOptions
    working_directory: str
    desk: Any
    """Handle of the SweepDesk."""


class SweepDesk(Desk):
    """A Desk of all trials. Their controllers count failures, and what single ones show is not shown."""

    def __init__(self) -> None:
        super().__init__()
        self._failures_of_trials: dict[int, tuple[str, bool]] = {}

    def show(self, text: str) -> None:
        """Nothing."""

    def trial_failed(self, trial: int, reason: str, diverged: bool) -> None:
        """The workers of a trial failed for good."""
        self._failures_of_trials[trial] = (reason, diverged)

    def failure_of(self, trial: int) -> tuple[str, bool] | None:
        """Why they did, and whether the loss diverged."""
        return self._failures_of_trials.get(trial)


def run_trials(sweep: Sweep, options: SweepOptions) -> None:
    """Train what is not yet trained of a sweep, in the cluster that this process has joined.

    SIGINT and SIGTERM have all trials save and stop; one more ends them at once.

    Raises:
        UserError: Ray could not run it.
        KeyboardInterrupt: it was stopped.
    """
    os.environ.update(_QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    node = ray.get_runtime_context().get_node_id()
    desk: Any = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node})(SweepDesk).remote()
    plan = Plan(uuid.uuid4().hex, tuple(sweep.trials), sweep.metric, options, os.getcwd(), desk)
    watch = _Watch(sweep, Board(sweep, sys.stderr))
    tuner = _tuner(plan, sweep, watch)
    ended: list[Exception] = []

    def fit() -> None:
        try:
            tuner.fit()
        except Exception as error:
            ended.append(error)

    def ask_to_stop() -> None:
        desk.ask_to_stop.remote()
        watch.stop()
        watch.board.line("saving and stopping; once more ends it at once")

    _leave.clear()
    thread = threading.Thread(target=fit, name="gen_dist-tune", daemon=True)
    with stop_signals(threading.Event(), ask_to_stop) as stopping:
        thread.start()
        while thread.is_alive() and not (stopping.is_set() and watch.is_idle(_SAVE_SECONDS)):
            thread.join(LOOK_SECONDS)
        _leave.set()
        thread.join(10.0)
    watch.board.close()
    shutil.rmtree(sweep.path / _TUNE_DIRECTORY, ignore_errors=True)
    if stopping.is_set():
        sweep.save()
        print(f"stopped with {watch.board.summary()}; to go on: {resume_command()}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt
    if watch.error or ended:
        raise watch.error or UserError(f"Ray could not run it: {brief(ended[0])}")


def _tuner(plan: Plan, sweep: Sweep, watch: _Watch) -> tune.Tuner:
    """The sweep as Tune runs it: one of Tune's trials for each that is not settled."""
    options = plan.options
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0)) if sweep.trials[0].config.device != "cpu" else 0
    together = options.workers > 1
    one: dict[str, float] = {"CPU": options.cpus_per_worker, **({"GPU": 1} if gpus else {})}
    room = int(min(cluster["CPU"] // options.least_cpus, gpus // options.workers if gpus else math.inf))
    concurrent = max(1, min(room, options.concurrent or room))
    shutil.rmtree(sweep.path / _TUNE_DIRECTORY, ignore_errors=True)

    def trial_of_tune(told: dict[str, Any]) -> None:
        run_trial(plan, told["trial"])

    return tune.Tuner(
        tune.with_resources(trial_of_tune, _WATCHES if together else one),
        param_space={"trial": tune.grid_search([trial.index for trial in sweep.trials if not trial.is_settled])},
        tune_config=tune.TuneConfig(
            scheduler=_Scheduler(sweep, options),
            max_concurrent_trials=concurrent,
            reuse_actors=not together,  # a process takes seconds to load torch
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(sweep.path / _TUNE_DIRECTORY),
            callbacks=[watch],
            stop=_Leaving(),
            verbose=0,
        ),
    )


class _Scheduler(FIFOScheduler):
    """Stops trials early. It knows what those of earlier starts of the sweep found, as if they had run beside."""

    def __init__(self, sweep: Sweep, options: SweepOptions) -> None:
        super().__init__()
        less_is_better = sweep.metric.mode == "min"
        self._halving = Halving(sweep.steps, sweep.grace_period, options.reduction_factor, less_is_better)
        for trial in sweep.trials:
            for step, value in trial.history if trial.status != "failed" else ():
                self._halving.goes_on(trial.index, step, value)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "ended" in result or self._halving.goes_on(trial.config["trial"], result["step"], result["value"]):
            return TrialScheduler.CONTINUE
        return TrialScheduler.STOP


class _Leaving(tune.Stopper):
    """Ends the sweep once the command wants to leave."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return _leave.is_set()


class _Watch(tune.Callback):
    """Notes and shows what becomes of trials, in the command's process."""

    def __init__(self, sweep: Sweep, board: Board) -> None:
        self.board = board
        self.error: UserError | None = None
        self._sweep = sweep
        self._begun: set[int] = set()
        self._stopping_since: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy, for a kind of resuming that we have no use for

    def stop(self) -> None:
        """Trials have been asked to stop: those that start from now on do nothing."""
        self._stopping_since = time.monotonic()

    def is_idle(self, seconds: float) -> bool:
        """Whether no trial is running any more, or so much time has passed since they were asked to stop."""
        running = any(trial.status == "running" for trial in self._sweep.trials)
        return not running or time.monotonic() - (self._stopping_since or 0.0) > seconds

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._stopping_since is None:
            one = self._of(trial)
            one.status = "running"
            self._begun.add(one.index)
            self.board.started(one)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        one = self._of(trial)
        one.step = max(one.step, result["step"])
        if "value" in result and result["step"] not in [step for step, _ in one.history]:
            one.history.append((result["step"], result["value"]))
        if "ended" in result:
            one.status, one.reason, one.diverged = result["ended"], result["reason"], result["diverged"]
        else:
            self.board.evaluated()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        one = self._of(trial)
        if one.status == "running":
            one.status = "stopped" if not _leave.is_set() else "interrupted"
        self._end(one)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        one = self._of(trial)
        one.status, one.reason = (
            "failed",
            brief(trial.get_pickled_error() or RuntimeError("no process for it could start")),
        )
        self._end(one)

    def _of(self, trial: Any) -> Trial:
        return self._sweep.trials[trial.config["trial"]]

    def _end(self, trial: Trial) -> None:
        if trial.index not in self._begun:
            return
        try:
            if trial.status != "failed":
                trial.read(self._sweep.metric)
            if trial.status == "stopped" and trial.has_finished():  # its workers were done before they heard of it
                trial.status = "finished"
            self._sweep.save()
        except UserError as error:
            self.error = self.error or error
            _leave.set()
        self.board.ended(trial)


def run_trial(plan: Plan, index: int) -> None:
    """One of the trials, from its newest checkpoint, in a process of Tune: it reports evaluations and how it ended."""
    if ray.get(plan.desk.wants_stop.remote()):
        return
    with contextlib.suppress(OSError):  # another host may have no such directory
        os.chdir(plan.working_directory)
    trial = plan.trials[index]
    how: dict[str, Any] = {"ended": "failed", "reason": None, "diverged": False}
    try:
        trial.read(plan.metric)
        (_train_here if plan.options.workers == 1 else _train_in_workers)(plan, trial)
        trial.read(plan.metric)
        how["ended"] = "finished" if trial.step == trial.config.steps else "interrupted"
    except UserError as error:
        how |= {"reason": str(error), "diverged": isinstance(error, DivergenceError)}
    last = {"value": trial.value} if how["ended"] == "finished" else {}
    tune.report({"step": trial.step, **last, **how})


def _train_here(plan: Plan, trial: Trial) -> None:
    """Train in this process."""
    from gen_dist.training.run import train
    from gen_dist.training.supervisor import Supervisor

    os.environ["GEN_DIST_THREADS"] = str(plan.options.cpus_per_worker)
    report = _Reports(plan.metric, trial.config.steps)

    def recorded(step: int, metrics: Mapping[str, float | Sequence[float]], saved: Path | None) -> None:
        if told := report.of(step, metrics):
            tune.report(told)

    with open(os.devnull, "w") as nowhere, told_to_stop(plan.desk) as stop:
        train(trial.config, supervisor=Supervisor(plan.launch, stop, recorded, screen=nowhere))


@dataclass(frozen=True)
class _Reports:
    """What Tune is told of a run's records: evaluations, and not the last of them.

    After that the run has yet to draw its last pictures, but Tune would stop a trial that had all its steps.
    """

    metric: Metric
    steps: int

    def of(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        value = self.metric.value_in(metrics)
        return None if value is None or step >= self.steps else {"step": step, "value": value}


def _train_in_workers(plan: Plan, trial: Trial) -> None:
    """Train in workers of Ray Train."""
    options = WorkerOptions(plan.options.workers, cpus_per_worker=plan.options.cpus_per_worker)
    config_json = trial.config.to_json()
    place = str(trial.path)
    task = Task(config_json, plan.launch, place, plan.working_directory, False, options, None, plan.desk)
    reports = _WorkerReports(plan, trial.index, options.max_failures)
    try:
        trainer(task, [reports]).fit()
    except Exception as error:
        reason, diverged = ray.get(plan.desk.failure_of.remote(trial.index)) or (brief(error), False)
        raise (DivergenceError if diverged else UserError)(reason) from None


class _WorkerReports(TuneReportCallback):
    """Runs in the controller of Ray Train: passes evaluations on to Tune, and ends a run that fails for good."""

    def __init__(self, plan: Plan, index: int, max_failures: int) -> None:
        super().__init__()
        self._reports = _Reports(plan.metric, plan.trials[index].config.steps)
        self._desk = plan.desk
        self._index = index
        self._failures_left = self._max_failures = max_failures

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._failures_left = self._max_failures
        if told := self._reports.of(metrics[0]["step"], metrics[0]):
            super().after_report(run_context, [told], None)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        errors = list(worker_exceptions.values())
        # Who was taken over is not refused: others are at work in its place.
        refused = [one for one in errors if isinstance(one, UserError) and not isinstance(one, TakenOverError)]
        error = (refused or errors)[0]
        if self._failures_left and not refused:
            self._failures_left -= 1
            return
        ray.get(self._desk.trial_failed.remote(self._index, brief(error), isinstance(error, DivergenceError)))
        raise error  # the controller would start them again and again
