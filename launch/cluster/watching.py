"""How a command looks on while workers train for it: what it shows, when it gives up, how it is stopped."""

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
from gen_dist.launch.cluster.message_desk import Desk, Watch, brief
from gen_dist.launch.cluster.options import WorkerOptions
from gen_dist.launch.cluster.workers import Task, trainer
from gen_dist.training.stopping import stop_signals

LOOK_SECONDS = 0.25
_HEAD_SECONDS = 10.0
_WAIT_SECONDS = 45.0
"""Workers may take so long to start before it is said what they wait for, and again."""


def train_in_workers(config: TrainConfig, fresh: bool, options: WorkerOptions, place: str) -> list[str]:
    """Train in the workers of the cluster that this process has joined, and show what they do.

    SIGINT and SIGTERM save and stop the run; one more ends it at once.

    Returns what to tell the user at the end.

    Raises:
        UserError: the run is refused, or workers failed again and again without getting on.
        KeyboardInterrupt: it was ended at once.
    """
    node = ray.get_runtime_context().get_node_id()
    # The desk stands here, not on a host that may be cut off.
    desk: Any = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node})(Desk).remote()
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80 if sys.stderr.isatty() else None
    task = Task(config.to_json(), uuid.uuid4().hex, place, os.getcwd(), fresh, options, columns, desk)
    try:
        run = trainer(task, [Watch(desk)])
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"storage {place} cannot be used: {reason}; choose another --storage") from None
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["result"] = run.fit()
        except Exception as error:
            ended["error"] = error

    def ask_to_stop() -> None:
        desk.ask_to_stop.remote()
        print("saving and stopping; once more ends it at once", file=sys.stderr, flush=True)

    thread = threading.Thread(target=fit, name="gen_dist-fit", daemon=True)
    idle_since = time.monotonic()
    with stop_signals(threading.Event(), ask_to_stop):
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            try:
                text, refusal, failures, running = ray.get(desk.news.remote())
            except ray.exceptions.RayError as error:
                _lose_cluster(error, place)
            if running:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > _WAIT_SECONDS:
                idle_since = time.monotonic()
                text += _what_is_missing(options)
            sys.stderr.write(text)
            sys.stderr.flush()
            if refusal:
                raise UserError(refusal)
            if failures > options.max_failures:
                raise UserError(
                    f"workers failed {failures} times without a checkpoint in between; mend the cause, then run the "
                    f"same command to go on from the newest checkpoint in {place}"
                )
    if isinstance(ended.get("error"), ray.exceptions.RayError):
        _lose_cluster(ended["error"], place)
    if "error" in ended:
        raise UserError(f"Ray could not run it: {brief(ended['error'])}")
    lines: list[str] = ended["result"].return_value
    return lines


def _lose_cluster(error: Exception, place: str) -> NoReturn:
    """Give who watches the head the time to say that it is gone; if it is not, say what Ray said."""
    time.sleep(_HEAD_SECONDS)
    raise UserError(
        f"lost the cluster ({brief(error)}); what was saved is in {place}, the same command goes on"
    ) from None


def _what_is_missing(options: WorkerOptions) -> str:
    free = {kind: ray.available_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}
    return (
        f"waiting for {options.min_workers or options.workers} workers of {options.cpus_per_worker} CPUs; free in the "
        f"cluster: {free['CPU']:.0f} CPUs, {free['GPU']:.0f} GPUs\n"
    )
