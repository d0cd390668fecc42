"""The trials of a sweep in Ray Tune: what each one does, when it is stopped early, and how the command follows them."""

from __future__ import annotations

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
from gen_dist.launch.cluster.mailbox import Mailbox, mailbox_here, summary_of, take_settings
from gen_dist.launch.cluster.options import WorkerOptions
from gen_dist.launch.cluster.watching import POLL_SECONDS
from gen_dist.launch.cluster.workers import Task, enter_directory, stop_event, trainer_of
from gen_dist.launch.sweep.halving import Halving
from gen_dist.launch.sweep.plan import SweepOptions
from gen_dist.launch.sweep.progress import SweepProgress
from gen_dist.launch.sweep.results import Metric, Sweep, Trial
from gen_dist.plugins.faults import told
from gen_dist.plugins.surroundings import watched
from gen_dist.training.outcome import DivergenceError
from gen_dist.training.stopping import stop_signals

_SAVE_SECONDS = 60.0
"""Time that trials have to save and stop."""
_TUNE_DIRECTORY = ".tune"
_TOKEN_RESOURCE = {"node:__internal_head__": 0.001}
"""Token request for a trial whose workers reserve their own CPUs: Tune requires a nonzero one."""
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}

_leave = threading.Event()
"""Ends all trials at once when it is set in the command's process. It is global because Tune pickles its arguments."""


@dataclass(frozen=True)
class Plan:
    """Arguments that all trials receive."""

    launch: str
    """Unique name of this start of the sweep."""
    trials: tuple[Trial, ...]
    metric: Metric
    options: SweepOptions
    working_directory: str
    mailbox: Any
    """Handle of the SweepMailbox."""


class SweepMailbox(Mailbox):
    """One mailbox of all trials. Their controllers count failures, and the output of single trials is not shown."""

    def __init__(self) -> None:
        super().__init__()
        self._failures_of_trials: dict[int, tuple[str, bool]] = {}

    def show(self, text: str) -> None:
        """Drop the text."""

    def trial_failed(self, trial: int, reason: str, diverged: bool) -> None:
        """Note why the workers of a trial failed for good, and if the loss diverged."""
        self._failures_of_trials[trial] = (reason, diverged)

    def failure_of(self, trial: int) -> tuple[str, bool] | None:
        """Return why the workers failed, and if the loss diverged; None if they did not fail."""
        return self._failures_of_trials.get(trial)


def run_trials(sweep: Sweep, options: SweepOptions) -> None:
    """Train the unsettled trials of a sweep in the cluster that this process has joined.

    SIGINT, SIGTERM and SIGHUP make all trials save and stop; a second signal ends them at once.

    Raises:
        UserError: Ray could not run it.
        KeyboardInterrupt: the sweep was stopped.
    """
    os.environ.update(_QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    mailbox = mailbox_here(SweepMailbox, sweep.trials[0].config)
    plan = Plan(uuid.uuid4().hex, tuple(sweep.trials), sweep.metric, options, os.getcwd(), mailbox)
    progress = SweepProgress(sweep, sys.stderr)
    recorder = _TrialRecorder(sweep, progress)
    tuner = _tuner(plan, sweep, recorder)
    ended: list[Exception] = []

    def fit() -> None:
        try:
            tuner.fit()
        except Exception as error:
            ended.append(error)

    def ask_to_stop() -> None:
        mailbox.ask_to_stop.remote()
        recorder.stop()
        progress.line("saving and stopping; once more ends it at once")

    _leave.clear()
    thread = threading.Thread(target=fit, name="gen_dist-tune", daemon=True)
    with stop_signals(threading.Event(), ask_to_stop) as stopping:
        thread.start()
        while thread.is_alive() and not (stopping.is_set() and recorder.is_idle(_SAVE_SECONDS)):
            thread.join(POLL_SECONDS)
        _leave.set()
        thread.join(10.0)
    progress.close()
    shutil.rmtree(sweep.path / _TUNE_DIRECTORY, ignore_errors=True)
    if stopping.is_set():
        sweep.save()
        print(f"stopped with {progress.summary()}; to go on: {resume_command()}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt
    if recorder.error or ended:
        raise recorder.error or UserError(f"Ray could not run it: {summary_of(ended[0])}")


def _tuner(plan: Plan, sweep: Sweep, recorder: _TrialRecorder) -> tune.Tuner:
    """Tune's own view of the sweep: one of its trials for each unsettled trial."""
    options = plan.options
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0)) if sweep.trials[0].config.device != "cpu" else 0
    has_workers = options.workers > 1
    own: dict[str, float] = {"CPU": options.cpus_per_worker, **({"GPU": 1} if gpus else {})}
    room = int(min(cluster["CPU"] // options.least_cpus, gpus // options.workers if gpus else math.inf))
    concurrent = max(1, min(room, options.concurrent or room))
    shutil.rmtree(sweep.path / _TUNE_DIRECTORY, ignore_errors=True)

    def trial_of_tune(parameters: dict[str, Any]) -> None:
        run_trial(plan, parameters["trial"])

    return tune.Tuner(
        tune.with_resources(trial_of_tune, _TOKEN_RESOURCE if has_workers else own),
        param_space={"trial": tune.grid_search([trial.index for trial in sweep.trials if not trial.is_settled])},
        tune_config=tune.TuneConfig(
            scheduler=_Scheduler(sweep, options),
            max_concurrent_trials=concurrent,
            reuse_actors=not has_workers,  # a process takes seconds to load torch
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(sweep.path / _TUNE_DIRECTORY),
            callbacks=[recorder],
            stop=_LeaveStopper(),
            verbose=0,
        ),
    )


class _Scheduler(FIFOScheduler):
    """Stops trials early. Results of earlier starts of the sweep count like those of this start."""

    def __init__(self, sweep: Sweep, options: SweepOptions) -> None:
        super().__init__()
        less_is_better = sweep.metric.mode == "min"
        self._halving = Halving(sweep.steps, sweep.grace_period, options.reduction_factor, less_is_better)
        for trial in sweep.trials:
            for step, value in trial.history if trial.status != "failed" else ():
                self._halving.continues(trial.index, step, value)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "ended" in result or self._halving.continues(trial.config["trial"], result["step"], result["value"]):
            return TrialScheduler.CONTINUE
        return TrialScheduler.STOP


class _LeaveStopper(tune.Stopper):
    """Ends all trials once the command leaves the sweep."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return _leave.is_set()


class _TrialRecorder(tune.Callback):
    """Records and shows the state of the trials, in the command's process."""

    def __init__(self, sweep: Sweep, progress: SweepProgress) -> None:
        self._progress = progress
        self.error: UserError | None = None
        self._sweep = sweep
        self._begun: set[int] = set()
        self._stopping_since: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune stores a copy for its own way of resuming, which we do not use

    def stop(self) -> None:
        """Note that the trials were asked to stop: a trial that starts later does nothing."""
        self._stopping_since = time.monotonic()

    def is_idle(self, seconds: float) -> bool:
        """Return True if no trial runs any more, or `seconds` have passed since they were asked to stop."""
        running = any(trial.status == "running" for trial in self._sweep.trials)
        return not running or time.monotonic() - (self._stopping_since or 0.0) > seconds

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._stopping_since is None:
            one = self._of(trial)
            one.status = "running"
            self._begun.add(one.index)
            self._progress.started(one)

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
            self._progress.evaluated(one)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        one = self._of(trial)
        if one.status == "running":
            one.status = "stopped" if not _leave.is_set() else "interrupted"
        self._end(one)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        one = self._of(trial)
        one.status, one.reason = (
            "failed",
            summary_of(trial.get_pickled_error() or RuntimeError("no process for it could start")),
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
            if trial.status == "stopped" and trial.has_finished():  # its workers finished before they learned of it
                trial.status = "finished"
            self._sweep.save()
        except UserError as error:
            self.error = self.error or error
            _leave.set()
        self._progress.ended(trial)


def run_trial(plan: Plan, index: int) -> None:
    """Train one trial from its newest checkpoint in a process of Tune, and report evaluations and how it ended."""
    if ray.get(plan.mailbox.wants_stop.remote()):
        return
    enter_directory(plan.working_directory)
    take_settings(ray.get(plan.mailbox.settings.remote()))
    trial = plan.trials[index]
    end: dict[str, Any] = {"ended": "failed", "reason": None, "diverged": False}
    try:
        trial.read(plan.metric)
        with watched():  # later trials are trained in this process, too
            (_train_here if plan.options.workers == 1 else _train_in_workers)(plan, trial)
        trial.read(plan.metric)
        end["ended"] = "finished" if trial.step == trial.config.steps else "interrupted"
    except (Exception, SystemExit) as error:  # a plug-in's SystemExit would end this process, and those after it
        if (known := told(error)) is None:
            raise
        end |= {"reason": str(known), "diverged": isinstance(error, DivergenceError)}
    last = {"value": trial.value} if end["ended"] == "finished" else {}
    tune.report({"step": trial.step, **last, **end})


def _train_here(plan: Plan, trial: Trial) -> None:
    """Train in this process."""
    from gen_dist.training.run import train
    from gen_dist.training.supervisor import Supervisor

    os.environ["GEN_DIST_THREADS"] = str(plan.options.cpus_per_worker)
    reports = _Reports(plan.metric, trial.config.steps)

    def record(step: int, metrics: Mapping[str, float | Sequence[float]], saved: Path | None) -> None:
        if report := reports.of(step, metrics):
            tune.report(report)

    with open(os.devnull, "w") as nowhere, stop_event(plan.mailbox) as stop:
        train(trial.config, supervisor=Supervisor(plan.launch, stop, record, screen=nowhere))


@dataclass(frozen=True)
class _Reports:
    """Reports to Tune, made of a run's records: all evaluations except the last one.

    Tune would end a trial that reports its last step, but the run still has to draw its last pictures then.
    """

    metric: Metric
    steps: int

    def of(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        value = self.metric.value_in(metrics)
        return None if value is None or step >= self.steps else {"step": step, "value": value}


def _train_in_workers(plan: Plan, trial: Trial) -> None:
    """Train in workers of Ray Train."""
    options = WorkerOptions(plan.options.workers, cpus_per_worker=plan.options.cpus_per_worker)
    location = str(trial.path)
    task = Task(trial.config, plan.launch, location, plan.working_directory, False, options, None, plan.mailbox)
    reports = _WorkerReports(plan, trial.index, options.max_failures)
    try:
        trainer_of(task, [reports]).fit()
    except Exception as error:
        reason, diverged = ray.get(plan.mailbox.failure_of.remote(trial.index)) or (summary_of(error), False)
        raise (DivergenceError if diverged else UserError)(reason) from None


class _WorkerReports(TuneReportCallback):
    """Forwards evaluations to Tune, and ends a run that failed for good. It runs in Ray Train's controller."""

    def __init__(self, plan: Plan, index: int, max_failures: int) -> None:
        super().__init__()
        self._reports = _Reports(plan.metric, plan.trials[index].config.steps)
        self._mailbox = plan.mailbox
        self._index = index
        self._failures_left = self._max_failures = max_failures

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._failures_left = self._max_failures
        if report := self._reports.of(metrics[0]["step"], metrics[0]):
            super().after_report(run_context, [report], None)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        errors = list(worker_exceptions.values())
        # A TakenOverError is not a refusal: other workers train in place of this group.
        refused = [one for one in errors if isinstance(one, UserError) and not isinstance(one, TakenOverError)]
        error = (refused or errors)[0]
        if self._failures_left and not refused:
            self._failures_left -= 1
            return
        ray.get(self._mailbox.trial_failed.remote(self._index, summary_of(error), isinstance(error, DivergenceError)))
        raise error  # else the controller would restart the workers without end
