"""A run in the workers of a Ray cluster: what each of them does, and how the command that started them looks on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, TakenOverError, UserError
from launch.ray_options import WorkerOptions

LOOK_SECONDS = 0.25
RESIZE_SECONDS = 15.0
"""How often Ray looks whether an elastic group could be larger; only if so is the group started anew."""

_TIMES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # also how long a report may wait to be taken
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # a minute is lost where a host has gone that Ray yet counts on
}


@dataclass(frozen=True)
class Task:
    """What all workers of a run are told."""

    config_json: str
    name: str
    """Of this launch."""
    place: str
    """Of the run directory: an absolute path that all hosts share, or a URL."""
    working_directory: str
    """Of the command: relative paths in the config are meant from there, where the hosts share it."""
    fresh: bool
    options: WorkerOptions
    terminal_columns: int | None
    """Width of the terminal that progress is shown on; None is no terminal."""
    desk: Any
    """Handle of the Desk, if there is one."""


class Desk:
    """Where workers and Ray's controller leave word for the command that started them, and it for them."""

    def __init__(self) -> None:
        self._text = ""
        self._refusal: str | None = None
        self._failures = 0
        self._wants_stop = False

    def show(self, text: str) -> None:
        """Text for the command's standard error."""
        self._text += text

    def refuse(self, reason: str) -> None:
        """An error that another try would not mend."""
        self._refusal = self._refusal or reason

    def failed(self, text: str) -> None:
        """Workers failed."""
        self._failures += 1
        self.show(text)

    def got_on(self) -> None:
        """The run got on since workers last failed."""
        self._failures = 0

    def news(self) -> tuple[str, str | None, int]:
        """Text since the last call, why the run is refused, and how often workers failed since it last got on."""
        text, self._text = self._text, ""
        return text, self._refusal, self._failures

    def ask_to_stop(self) -> None:
        """Have the run save and stop."""
        self._wants_stop = True

    def wants_stop(self) -> bool:
        """Whether the run is to save and stop."""
        return self._wants_stop


class DeskScreen(io.StringIO):
    """The command's terminal, as a stream in the main worker."""

    def __init__(self, desk: Any, terminal: bool) -> None:
        super().__init__()
        self._desk = desk
        self._terminal = terminal
        self._text = ""

    def isatty(self) -> bool:
        """Whether the command shows on a terminal."""
        return self._terminal

    def write(self, text: str) -> int:
        """Keep the text until it is flushed."""
        self._text += text
        return len(text)

    def flush(self) -> None:
        """Send the text on its way, without waiting for it."""
        if self._text:
            self._desk.show.remote(self._text)
            self._text = ""


class _Watch(UserCallback):
    """Runs in Ray's controller: tells the desk of failures."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One line; when a process dies, that the others lost it is no news."""
        reasons = {rank: _brief(error) for rank, error in sorted(worker_exceptions.items())}
        own = {rank: reason for rank, reason in reasons.items() if reason != _LOST} or reasons
        what = "; ".join(f"rank {rank}: {reason}" for rank, reason in own.items())
        self._desk.failed.remote(f"{what}; starting again from the newest checkpoint\n")


_LOST = "lost the others"


def _brief(error: Exception) -> str:
    """The sentence that matters of an error from a worker."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process or host is gone"
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    if any("gloo" in line or "NCCL" in line for line in lines):
        return _LOST
    return lines[-1] if lines else type(error).__name__


def trainer(task: Task, callbacks: list[Any]) -> TorchTrainer:
    """The run as Ray runs it, elastic if fewer workers will do.

    A failed group is always started again, which costs what was not yet saved; who looks on may end it.
    """
    options = task.options
    parent, _, name = task.place.rpartition("/")
    _forget_reports(task.place)
    for variable, seconds in _TIMES.items():
        os.environ.setdefault(variable, seconds)
    device = TrainConfig.from_json(task.config_json, "the config").device
    gpus = ray.cluster_resources().get("GPU", 0) if device != "cpu" else 0
    scaling: dict[str, Any] = {  # Ray's annotations are of its old Train
        "num_workers": options.workers if options.min_workers is None else (options.min_workers, options.workers),
        "use_gpu": gpus > 0,
        "resources_per_worker": {"CPU": options.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
    }
    failures = FailureConfig(max_failures=-1)
    loop: Any = work
    return TorchTrainer(
        loop,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend=None if gpus else "gloo"),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(name=name, storage_path=parent or "/", failure_config=failures, callbacks=callbacks),
    )


def _forget_reports(place: str) -> None:
    """Remove Ray's own list of checkpoints. The run finds the newest itself; Ray would miss those that are gone."""
    filesystem, root = pyarrow.fs.FileSystem.from_uri(place)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{root}/checkpoint_manager_snapshot.json")


def work(settings: dict[Any, Any]) -> list[str]:
    """One worker's share of a run, from the newest checkpoint. Returns what to tell the user at the end."""
    from gen_dist import run

    task: Task = settings["task"]
    context = ray.train.get_context()
    is_main = context.get_world_rank() == 0
    with contextlib.suppress(OSError):  # another host may have no such directory
        os.chdir(task.working_directory)
    os.environ["GEN_DIST_THREADS"] = str(task.options.cpus_per_worker)
    if task.terminal_columns:
        os.environ["COLUMNS"] = str(task.terminal_columns)
    config = TrainConfig.from_json(task.config_json, "the config")
    # Fewer workers than there may be take as many images at once as ever, in more turns: memory holds no more.
    turns = -(-task.options.workers // context.get_world_size())
    config = dataclasses.replace(config, accumulation=config.accumulation * turns)
    try:
        with (
            _kept(task.place, is_main) as (directory, keep),
            _told_to_stop(task.desk if is_main else None) as stop,
            _reporting() as report,
        ):

            def recorded(step: int, metrics: Mapping[str, float | Sequence[float]], saved: Path | None) -> None:
                checkpoint = keep(saved) if saved else None
                if is_main and task.desk:
                    task.desk.got_on.remote()  # at once; Ray's controller hears of it in a second or two
                report({"step": step, **metrics}, checkpoint)

            screen = DeskScreen(task.desk, task.terminal_columns is not None) if task.desk else None
            supervisor = run.Supervisor(task.name, stop, recorded, directory, screen)
            outcome = run.train(config, fresh=task.fresh, supervisor=supervisor)
            keep(None)
    except TakenOverError:
        raise  # no word of it: those who took over are at work
    except UserError as error:
        if task.desk:
            ray.get(task.desk.refuse.remote(str(error)))
        raise
    return outcome.report("the same command") if is_main else []


@contextlib.contextmanager
def _kept(place: str, is_main: bool) -> Iterator[tuple[Path, Callable[[Path | None], Checkpoint | None]]]:
    """Within it, where a worker finds its run directory, and how to keep what was saved there, where Ray can see it."""
    storage: Any = ray.train.get_context().get_storage()

    def as_ray_sees_it(saved: Path | None) -> Checkpoint | None:
        path = f"{storage.experiment_fs_path}/checkpoints/{saved.name}" if saved else ""
        return Checkpoint(path, storage.storage_filesystem) if saved else None

    if "://" not in place:
        yield Path(place), as_ray_sees_it
        return
    from gen_dist.mirror import Mirror

    with tempfile.TemporaryDirectory(prefix="gen_dist-") as directory:
        mirror = Mirror(Path(directory), place)
        mirror.fetch()

        def keep(saved: Path | None) -> Checkpoint | None:
            if is_main:
                mirror.push()
            return as_ray_sees_it(saved)

        yield Path(directory), keep


@contextlib.contextmanager
def _reporting() -> Iterator[Callable[[dict[str, Any], Checkpoint | None], None]]:
    """Within it, how to report to Ray; what was reported has arrived when it is left.

    From a thread, in which each report waits until Ray's controller looks for it: the training does not.
    All workers report the same in the same order.
    """
    reports: queue.SimpleQueue[tuple[dict[str, Any], Checkpoint | None] | None] = queue.SimpleQueue()

    def send() -> None:
        while (report := reports.get()) is not None:
            ray.train.report(*report, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    thread = threading.Thread(target=send, name="gen_dist-report", daemon=True)
    thread.start()
    yield lambda metrics, checkpoint: reports.put((metrics, checkpoint))
    reports.put(None)
    thread.join()


@contextlib.contextmanager
def _told_to_stop(desk: Any) -> Iterator[threading.Event]:
    """Within it, an event that is set once the desk wants the run to stop."""
    stop, left = threading.Event(), threading.Event()

    def ask() -> None:
        while not left.wait(1.0):
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(desk.wants_stop.remote()):
                    stop.set()
                    return

    if desk:
        threading.Thread(target=ask, name="gen_dist-stop", daemon=True).start()
    try:
        yield stop
    finally:
        left.set()


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
        run = trainer(task, [_Watch(desk)])
    except OSError as error:
        raise ConfigError(
            f"storage {place} cannot be used: {error.strerror or error}; choose another --storage"
        ) from None
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["result"] = run.fit()
        except Exception as error:
            ended["error"] = error

    thread = threading.Thread(target=fit, name="gen_dist-fit", daemon=True)
    with _signals_stop(desk):
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            text, refusal, failures = ray.get(desk.news.remote())
            sys.stderr.write(text)
            sys.stderr.flush()
            if refusal:
                raise UserError(refusal)
            if failures > options.max_failures:
                raise UserError(
                    f"workers failed {failures} times without a checkpoint in between; mend the cause, then run the "
                    f"same command to go on from the newest checkpoint in {place}"
                )
    if "error" in ended:
        raise UserError(f"Ray could not run it: {_brief(ended['error'])}")
    lines: list[str] = ended["result"].return_value
    return lines


@contextlib.contextmanager
def _signals_stop(desk: Any) -> Iterator[None]:
    first_at: float | None = None

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal first_at
        if first_at is None:
            first_at = time.monotonic()
            desk.ask_to_stop.remote()
            print("saving and stopping; once more ends it at once", file=sys.stderr, flush=True)
        elif time.monotonic() - first_at > 3.0:  # what follows sooner is the same wish, passed on by a launcher
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
