"""A run in the workers of a Ray cluster: what Ray is asked for, and what each worker does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, TakenOverError, UserError
from gen_dist.files import temporary_directory
from gen_dist.launch.cluster.mailbox import RemoteScreen, take_settings
from gen_dist.launch.cluster.options import WorkerOptions
from gen_dist.plugins.faults import PluginFault, told

_RESIZE_SECONDS = 15.0
"""Period in which Ray checks if an elastic group could be larger. It restarts the group only if so."""

_RAY_SECONDS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a report also waits this long to be taken
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # Ray's minute is lost if it still counts on a host that is gone
}


@dataclass(frozen=True)
class Task:
    """Arguments that all workers of a run receive."""

    config: TrainConfig
    """It carries its plug-ins along: see TrainConfig.__reduce__."""
    name: str
    """Unique name of this launch."""
    location: str
    """Run directory: an absolute path that all hosts share, or a URL."""
    working_directory: str
    """Working directory of the command: relative paths in the config start there, if the hosts share it."""
    fresh: bool
    options: WorkerOptions
    terminal_columns: int | None
    """Width of the terminal that shows progress; None without a terminal."""
    mailbox: Any
    """Handle of the Mailbox."""


def trainer_of(task: Task, callbacks: list[Any]) -> TorchTrainer:
    """Ray's trainer of the run, elastic if the run may have fewer workers.

    Ray always restarts a failed group, which then repeats the steps after the newest checkpoint. The callbacks or the
    command end the run.
    """
    options = task.options
    _forget_reports(task.location)
    for variable, seconds in _RAY_SECONDS.items():
        os.environ.setdefault(variable, seconds)
    device = task.config.device
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    least = options.least_workers
    if 0 < gpus < least:
        raise ConfigError(f"the cluster has {gpus} GPUs for {least} workers; use fewer --workers, or --device cpu")
    scaling: dict[str, Any] = {  # Ray's annotations are those of its old Train
        "num_workers": options.workers if options.min_workers is None else (options.min_workers, options.workers),
        "use_gpu": gpus > 0,
        "resources_per_worker": {"CPU": options.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        "elastic_resize_monitor_interval_s": _RESIZE_SECONDS,
    }
    loop: Any = work
    return TorchTrainer(
        loop,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend=None if gpus else "gloo"),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            failure_config=FailureConfig(max_failures=-1), callbacks=callbacks, **_storage_of(task.location)
        ),
    )


def _storage_of(location: str) -> dict[str, Any]:
    """Place where Ray keeps the run, as options of its RunConfig. Ray appends the name to the storage's path."""
    if "://" in location:
        base, mark, query = location.partition("?")
        parent, _, name = base.rpartition("/")
        return {"name": name, "storage_path": parent + mark + query}
    path = Path(location)
    # A path is not a URL: as one, letters beyond ASCII would be refused, and a % be an escape.
    storage: dict[str, Any] = {"storage_filesystem": pyarrow.fs.LocalFileSystem()}
    # Ray also names its reservation of resources so, in ASCII alone.
    if not path.name.isascii():
        return {"name": ".", "storage_path": str(path), **storage}
    return {"name": path.name, "storage_path": str(path.parent), **storage}


def _forget_reports(location: str) -> None:
    """Remove Ray's own list of checkpoints: the run finds the newest itself, and Ray would miss deleted ones."""
    snapshot = "checkpoint_manager_snapshot.json"
    with contextlib.suppress(FileNotFoundError):
        if "://" in location:
            filesystem, root = pyarrow.fs.FileSystem.from_uri(location)
            filesystem.delete_file(f"{root}/{snapshot}")
        else:
            os.unlink(Path(location) / snapshot)


def work(settings: dict[Any, Any]) -> list[str]:
    """Train as one worker of a run, from the newest checkpoint. Returns the lines to show at the end."""
    from gen_dist.training.run import train
    from gen_dist.training.supervisor import Supervisor

    task: Task = settings["task"]
    context = ray.train.get_context()
    is_main = context.get_world_rank() == 0
    enter_directory(task.working_directory)
    os.environ["GEN_DIST_THREADS"] = str(task.options.cpus_per_worker)
    take_settings(ray.get(task.mailbox.settings.remote()))
    if task.terminal_columns:
        os.environ["COLUMNS"] = str(task.terminal_columns)
    if is_main:
        task.mailbox.started.remote()
    config = _config_for(task, context.get_world_size())
    with (
        _refusals_reported(task.mailbox),
        _run_directory(task, is_main) as (directory, keep),
        stop_event(task.mailbox) as stop,
        _reports() as report,
    ):

        def record(step: int, metrics: Mapping[str, float | Sequence[float]], saved: Path | None) -> None:
            checkpoint = keep(saved) if saved else None
            if is_main:
                task.mailbox.made_progress.remote()  # at once; Ray's controller learns of it a second or two later
            report({"step": step, **metrics}, checkpoint)

        def for_user(text: str) -> str:
            return text.replace(str(directory), task.location)

        screen = RemoteScreen(task.mailbox, task.terminal_columns is not None, for_user)
        supervisor = Supervisor(task.name, stop, record, directory, screen)
        outcome = train(config, fresh=task.fresh, supervisor=supervisor)
        keep(None)
    return [for_user(line) for line in outcome.report("the same command")] if is_main else []


def enter_directory(path: str) -> None:
    """Change to the command's working directory, unless this host does not have it."""
    with contextlib.suppress(OSError):
        os.chdir(path)


def _config_for(task: Task, world_size: int) -> TrainConfig:
    """Config of a group of this size. A smaller group accumulates more often, so that memory holds the images.

    With shards it computes more of them instead, which have the same size.
    """
    config = task.config
    if config.shards:
        return config
    turns = -(-task.options.workers // world_size)
    turns = max(1, min(turns, config.global_batch_size // (world_size * config.accumulation)))
    return dataclasses.replace(config, accumulation=config.accumulation * turns)


@contextlib.contextmanager
def _refusals_reported(mailbox: Any) -> Iterator[None]:
    """Report errors that another try would not fix to the mailbox, so that the command ends the run."""
    try:
        yield
    except TakenOverError:
        raise  # not reported: the workers that took over are training
    except (Exception, SystemExit) as error:
        known = told(error)
        # Not what the machine refused, such as a peer that is gone: another try may go on without it.
        if known is error or isinstance(known, PluginFault):
            ray.get(mailbox.refuse.remote(str(known)))
        if known is not None and isinstance(error, SystemExit):  # Ray would take it for the end of the work
            raise known from error
        raise


@contextlib.contextmanager
def _run_directory(task: Task, is_main: bool) -> Iterator[tuple[Path, Callable[[Path | None], Checkpoint | None]]]:
    """Give the worker's run directory, and a function that stores a saved checkpoint and returns Ray's name of it.

    At a URL the directory is a local copy, which the main worker pushes. None stores what changed besides checkpoints.
    """
    storage: Any = ray.train.get_context().get_storage()

    def name_for_ray(saved: Path | None) -> Checkpoint | None:
        path = f"{storage.experiment_fs_path}/checkpoints/{saved.name}" if saved else ""
        return Checkpoint(path, storage.storage_filesystem) if saved else None

    if "://" not in task.location:
        yield Path(task.location), name_for_ray
        return
    from gen_dist.records.mirror import Mirror

    with temporary_directory("mirror") as directory:  # the next start removes that of a worker that Ray killed
        try:
            mirror = Mirror(directory, task.location)
            if is_main:
                mirror.claim()
            mirror.fetch("" if is_main else "checkpoints")

            def push(saved: Path | None) -> Checkpoint | None:
                if is_main:
                    mirror.push()
                return name_for_ray(saved)

            yield directory, push
        except UserError as error:  # the user knows the URL, not the copy
            raise type(error)(str(error).replace(str(directory), task.location)) from None


@contextlib.contextmanager
def _reports() -> Iterator[Callable[[dict[str, Any], Checkpoint | None], None]]:
    """Give a function that reports to Ray; all reports have arrived when the block ends.

    A thread sends them: each one waits until Ray's controller looks for it, and the training must not wait.
    All workers report the same in the same order.
    """
    reports: queue.SimpleQueue[tuple[dict[str, Any], Checkpoint | None] | None] = queue.SimpleQueue()

    def send() -> None:
        while (report := reports.get()) is not None:
            # A failed report, e.g. when Ray's controller dies, does not end a training that saves by itself.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.train.report(*report, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    thread = threading.Thread(target=send, name="gen_dist-report", daemon=True)
    thread.start()
    yield lambda metrics, checkpoint: reports.put((metrics, checkpoint))
    reports.put(None)
    thread.join()


@contextlib.contextmanager
def stop_event(mailbox: Any) -> Iterator[threading.Event]:
    """Give an event that is set once the command asks the run to stop."""
    stop, left = threading.Event(), threading.Event()

    def ask() -> None:
        while not left.wait(1.0):
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(mailbox.wants_stop.remote()):
                    stop.set()
                    return

    threading.Thread(target=ask, name="gen_dist-stop", daemon=True).start()
    try:
        yield stop
    finally:
        left.set()
