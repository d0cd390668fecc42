"""A run in the workers of a Ray cluster: what Ray is asked for, and what each worker does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shutil
import tempfile
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
from gen_dist.launch.cluster.message_desk import DeskScreen
from gen_dist.launch.cluster.options import WorkerOptions

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


def trainer(task: Task, callbacks: list[Any]) -> TorchTrainer:
    """The run as Ray runs it, elastic if fewer workers will do.

    A failed group is always started again, which costs what was not yet saved; who looks on may end it.
    """
    options = task.options
    base, mark, query = task.place.partition("?")
    parent, _, name = base.rpartition("/")
    _forget_reports(task.place)
    for variable, seconds in _TIMES.items():
        os.environ.setdefault(variable, seconds)
    device = TrainConfig.from_json(task.config_json, "the config").device
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    least = options.min_workers or options.workers
    if 0 < gpus < least:
        raise ConfigError(f"the cluster has {gpus} GPUs for {least} workers; use fewer --workers, or --device cpu")
    scaling: dict[str, Any] = {  # Ray's annotations are of its old Train
        "num_workers": options.workers if options.min_workers is None else (options.min_workers, options.workers),
        "use_gpu": gpus > 0,
        "resources_per_worker": {"CPU": options.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
    }
    storage, failures = parent + mark + query, FailureConfig(max_failures=-1)
    loop: Any = work
    return TorchTrainer(
        loop,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend=None if gpus else "gloo"),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(name=name, storage_path=storage or "/", failure_config=failures, callbacks=callbacks),
    )


def _forget_reports(place: str) -> None:
    """Remove Ray's own list of checkpoints. The run finds the newest itself; Ray would miss those that are gone."""
    filesystem, root = pyarrow.fs.FileSystem.from_uri(place)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{root}/checkpoint_manager_snapshot.json")


def work(settings: dict[Any, Any]) -> list[str]:
    """One worker's share of a run, from the newest checkpoint. Returns what to tell the user at the end."""
    from gen_dist.training.run import train
    from gen_dist.training.supervisor import Supervisor

    task: Task = settings["task"]
    context = ray.train.get_context()
    is_main = context.get_world_rank() == 0
    with contextlib.suppress(OSError):  # another host may have no such directory
        os.chdir(task.working_directory)
    os.environ["GEN_DIST_THREADS"] = str(task.options.cpus_per_worker)
    if task.terminal_columns:
        os.environ["COLUMNS"] = str(task.terminal_columns)
    if is_main and task.desk:
        task.desk.started.remote()
    config = TrainConfig.from_json(task.config_json, "the config")
    # Fewer workers than there may be take as many images at once as ever, in more turns: memory holds no more.
    world_size = context.get_world_size()
    turns = -(-task.options.workers // world_size)
    turns = max(1, min(turns, config.global_batch_size // (world_size * config.accumulation)))
    config = dataclasses.replace(config, accumulation=config.accumulation * turns)
    with (
        _refusing(task.desk),
        _kept(task, is_main) as (directory, keep),
        told_to_stop(task.desk if is_main else None) as stop,
        _reporting() as report,
    ):

        def recorded(step: int, metrics: Mapping[str, float | Sequence[float]], saved: Path | None) -> None:
            checkpoint = keep(saved) if saved else None
            if is_main and task.desk:
                task.desk.got_on.remote()  # at once; Ray's controller hears of it in a second or two
            report({"step": step, **metrics}, checkpoint)

        def as_told(text: str) -> str:
            return text.replace(str(directory), task.place)

        screen = DeskScreen(task.desk, task.terminal_columns is not None, as_told) if task.desk else None
        supervisor = Supervisor(task.name, stop, recorded, directory, screen)
        outcome = train(config, fresh=task.fresh, supervisor=supervisor)
        keep(None)
    return [as_told(line) for line in outcome.report("the same command")] if is_main else []


@contextlib.contextmanager
def _refusing(desk: Any) -> Iterator[None]:
    """Within it, an error that another try would not mend is told to the desk, which ends the run."""
    try:
        yield
    except TakenOverError:
        raise  # no word of it: those who took over are at work
    except UserError as error:
        if desk:
            ray.get(desk.refuse.remote(str(error)))
        raise


@contextlib.contextmanager
def _kept(task: Task, is_main: bool) -> Iterator[tuple[Path, Callable[[Path | None], Checkpoint | None]]]:
    """Within it, where a worker finds its run directory, and how to keep what was saved there, where Ray can see it."""
    place = task.place
    storage: Any = ray.train.get_context().get_storage()

    def as_ray_sees_it(saved: Path | None) -> Checkpoint | None:
        path = f"{storage.experiment_fs_path}/checkpoints/{saved.name}" if saved else ""
        return Checkpoint(path, storage.storage_filesystem) if saved else None

    if "://" not in place:
        yield Path(place), as_ray_sees_it
        return
    from gen_dist.records.mirror import Mirror
    from gen_dist.records.run_paths import RunPaths

    # Under one name for all starts of a launch: a worker that Ray kills removes nothing.
    own = f"gen_dist-{task.name}-{ray.train.get_context().get_world_rank()}"
    directory = os.path.join(tempfile.gettempdir(), own)
    shutil.rmtree(directory, ignore_errors=True)
    os.mkdir(directory, mode=0o700)
    try:
        mirror = Mirror(Path(directory), place)
        if is_main:
            mirror.claim()
        mirror.fetch("" if is_main else RunPaths(Path(directory)).checkpoints.name)

        def keep(saved: Path | None) -> Checkpoint | None:
            if is_main:
                mirror.push()
            return as_ray_sees_it(saved)

        yield Path(directory), keep
    except UserError as error:  # the user knows the place, not the copy
        raise type(error)(str(error).replace(directory, place)) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _reporting() -> Iterator[Callable[[dict[str, Any], Checkpoint | None], None]]:
    """Within it, how to report to Ray; what was reported has arrived when it is left.

    From a thread, in which each report waits until Ray's controller looks for it: the training does not.
    All workers report the same in the same order.
    """
    reports: queue.SimpleQueue[tuple[dict[str, Any], Checkpoint | None] | None] = queue.SimpleQueue()

    def send() -> None:
        while (report := reports.get()) is not None:
            # One that fails, as when Ray's controller goes, is no reason to end a training that saves by itself.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.train.report(*report, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    thread = threading.Thread(target=send, name="gen_dist-report", daemon=True)
    thread.start()
    yield lambda metrics, checkpoint: reports.put((metrics, checkpoint))
    reports.put(None)
    thread.join()


@contextlib.contextmanager
def told_to_stop(desk: Any) -> Iterator[threading.Event]:
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
