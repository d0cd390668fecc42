"""The command's side of a run in Ray workers: what it shows, when it gives up, and how it stops the run."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from typing import Any, NoReturn

import ray
import ray.train

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.launch.cluster.mailbox import FailureReporter, Mailbox, News, mailbox_here, summary_of
from gen_dist.launch.cluster.options import WorkerOptions
from gen_dist.launch.cluster.workers import Task, trainer_of
from gen_dist.training.stopping import stop_signals

POLL_SECONDS = 0.25
_HEAD_SECONDS = 10.0
"""Seconds in which the thread that watches the head says that it is gone."""
_START_SECONDS = 45.0
"""Seconds without running workers after which the command says what they wait for."""


def train_in_workers(config: TrainConfig, fresh: bool, options: WorkerOptions, location: str) -> list[str]:
    """Train in workers of the cluster that this process has joined, and show their output.

    SIGINT, SIGTERM and SIGHUP save and stop the run; a second signal ends it at once.

    Returns the lines to show at the end.

    Raises:
        UserError: the run is refused, or workers failed too often without progress.
        KeyboardInterrupt: the run was ended at once.
    """
    mailbox = mailbox_here(Mailbox, config)
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80 if sys.stderr.isatty() else None
    task = Task(config, uuid.uuid4().hex, location, os.getcwd(), fresh, options, columns, mailbox)
    try:
        trainer = trainer_of(task, [FailureReporter(mailbox)])
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"storage {location} cannot be used: {reason}; choose another --storage") from None
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["result"] = trainer.fit()
        except Exception as error:
            ended["error"] = error

    def ask_to_stop() -> None:
        mailbox.ask_to_stop.remote()
        print("saving and stopping; once more ends it at once", file=sys.stderr, flush=True)

    thread = threading.Thread(target=fit, name="gen_dist-fit", daemon=True)
    idle_since = time.monotonic()
    with stop_signals(threading.Event(), ask_to_stop):
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            try:
                news: News = ray.get(mailbox.news.remote())
            except ray.exceptions.RayError as error:
                _lose_cluster(error, location)
            sys.stderr.write(news.text)
            if news.running:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > _START_SECONDS:
                idle_since = time.monotonic()
                sys.stderr.write(_missing_resources(options))
            sys.stderr.flush()
            _give_up_if_hopeless(news, options, location)
    if isinstance(ended.get("error"), ray.exceptions.RayError):
        _lose_cluster(ended["error"], location)
    if "error" in ended:
        raise UserError(f"Ray could not run it: {summary_of(ended['error'])}")
    lines: list[str] = ended["result"].return_value
    return lines


def _give_up_if_hopeless(news: News, options: WorkerOptions, location: str) -> None:
    if news.refusal:
        raise UserError(news.refusal)
    if news.failures > options.max_failures:
        raise UserError(
            f"workers failed {news.failures} times without a checkpoint in between; remove the cause, then run the "
            f"same command to resume from the newest checkpoint in {location}"
        )


def _lose_cluster(error: Exception, location: str) -> NoReturn:
    """Wait until the thread that watches the head has ended this process; if it did not, say what Ray said."""
    time.sleep(_HEAD_SECONDS)
    raise UserError(
        f"lost the cluster ({summary_of(error)}); everything that was saved is in {location}, the same command resumes"
    ) from None


def _missing_resources(options: WorkerOptions) -> str:
    free = {kind: ray.available_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}
    return (
        f"waiting for {options.least_workers} workers of {options.cpus_per_worker} CPUs; free in the cluster: "
        f"{free['CPU']:.0f} CPUs, {free['GPU']:.0f} GPUs\n"
    )
