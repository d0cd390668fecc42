"""The run directory: one process trains in it at a time, with one config from start to end.

Two things keep other processes out. The first is a lock, which the system releases when its process dies. The second
is the mark of the holder, for a process that is unreachable and may be alive: the same launch, started again, may
ignore its lock and write a new mark. The old process finds the new mark before it writes anything more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError, ConfigError, DamagedError, TakenOverError
from gen_dist.files import file_lock, read_regular, reason_of, write_atomically
from gen_dist.parallel.collectives import errors_shared, from_main
from gen_dist.parallel.processes import Processes
from gen_dist.plugins.loading import contents_of
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.environment import ENVIRONMENT_SHAPE, environment
from gen_dist.records.reading import read_config, read_file, read_object, write_object
from gen_dist.records.run_mark import (
    RunMark,
    is_run,
    mark_of,
    refuse_foreign,
    refuse_lost_checkpoints,
    start_over,
    write_mark,
)
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.trackers import wanted_trackers
from gen_dist.records.trackers.wandb_run import id_of_agent

_BEGUN = "begun"

_FREE_FIELDS = {
    *("preset", "data_root", "packing", "run_dir", "accumulation", "precision", "compile", "cuda_graphs", "device"),
    *("auto_accumulation", "split_state", "keep_best", "plugins", "accept_changed_plugins", "start_digest"),
    *("checkpoint_every", "keep_checkpoints", "sample_every", "evaluate_every", "log_every", "wandb", "track"),
    *("evaluate_metrics", "evaluate_samples", "evaluate_features"),
}
"""Config fields that may change when a run is resumed. They do not decide what a step computes, except for rounding
and, on another kind of device, other draws of the same noise. The digest of the packed data shows if those changed."""


class Holding:
    """A run directory that processes hold while they train in it."""

    def __init__(self, path: Path, fresh: bool, mark: str) -> None:
        """Write nothing before `begin`.

        Args:
            path: the directory.
            fresh: remove the files of the previous run when training begins.
            mark: name of the launch and of this start of it.
        """
        self.path = path
        self.fresh = fresh
        self._holder_file = RunPaths(path).holder
        self._mark = mark
        self._has_begun = False

    def begin(self) -> None:
        """Write the marks, after which no other start may write, and remove the previous run if that is wanted.

        Call it when nothing can be refused any more: a refusal changes nothing.

        Raises:
            CheckpointError: the previous run cannot be removed.
            OSError: the disk is full or cannot be written to.
        """
        # The mark comes first: from here on, the directory is known to be ours.
        if mark_of(self.path) is None:
            # One of an old version that gets here had a checkpoint, or its remains would have been removed before.
            write_mark(self.path, RunMark(uuid.uuid4().hex, has_checkpoint=is_run(self.path)))
        if self.fresh:
            write_atomically(self._holder_file, f"{self._mark}\n")
            start_over(self.path)
        write_atomically(self._holder_file, f"{self._mark} {_BEGUN}\n")
        self._has_begun = True

    def assert_held(self) -> None:
        """Raise TakenOverError if a later start has claimed this directory, e.g. while this host was unreachable."""
        if not self._has_begun:
            return
        try:
            if read_regular(self._holder_file).startswith(self._mark.encode()):
                return
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"run directory {self.path} cannot be read: {reason}; fix that first") from None
        raise TakenOverError(f"another process has taken over {self.path}; this one stops")


@contextlib.contextmanager
def hold(
    path: Path,
    config: TrainConfig,
    processes: Processes,
    fresh: bool,
    holder: str | None = None,
    announce: Callable[[str], None] = print,
) -> Iterator[Holding]:
    """Within it, the main process holds a run directory. Nothing is removed yet, fresh or not.

    Args:
        path: the directory.
        config: of the run to train there.
        processes: processes that train.
        fresh: start over. It has no effect if the last holder was the same launch and it began to train.
        holder: name of a launch that may start several times. None stands for a launch that starts once.
        announce: takes a line if the file system has no locks.

    Raises:
        ConfigError: the directory cannot be written to, another process trains in it, it is not a run but has files
            that a run would overwrite, or it holds a run of another config that is not to be started over. Raised in
            every process.
        CheckpointError: the run had checkpoints that are gone, or its files are damaged or cannot be read just now.
    """
    with contextlib.ExitStack() as stack:
        holding = None
        with errors_shared(processes):
            if processes.is_main:
                holding = _take(path, config, fresh, holder, stack, announce)
        fresh = from_main(holding.fresh if holding else None, processes) or False
        yield holding or Holding(path, fresh, "")


def _take(
    path: Path,
    config: TrainConfig,
    fresh: bool,
    holder: str | None,
    stack: contextlib.ExitStack,
    announce: Callable[[str], None],
) -> Holding:
    name, mark = holder or uuid.uuid4().hex, uuid.uuid4().hex
    paths = RunPaths(path)
    try:
        wanted_trackers(config)
        refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        last_holder, *words = _words_of(paths.holder)
        held = stack.enter_context(file_lock(paths.lock, announce))
        if not held and last_holder != name:
            raise ConfigError(f"another process is training in {path}; wait for it or choose another --run-dir")
        holding = Holding(path, fresh and not (last_holder == name and _BEGUN in words), f"{name} {mark}")
        if not holding.fresh:
            refuse_lost_checkpoints(path)
            refuse_other_config(path, config)
        return holding
    except OSError as error:
        raise ConfigError(
            f"run directory {path} cannot be written to: {reason_of(error)}; choose another --run-dir"
        ) from None


def _words_of(path: Path) -> list[str]:
    """Words of the holder file: name of the launch, mark of its start, and `begun`."""
    with contextlib.suppress(FileNotFoundError):
        return read_file(path).decode(errors="replace").split() or [""]
    return [""]


def record_start(path: Path, config: TrainConfig, step: int, wandb_id: str, processes: int) -> None:
    """Record that training starts at `step`: config, environment and wandb id.

    Call it when nothing can be refused any more: a refusal changes nothing. environment.json describes the last start,
    and under `earlier` those before it.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    paths = RunPaths(path)
    for name, content in contents_of(config.plugins).items():
        paths.plugins.mkdir(exist_ok=True)
        write_atomically(paths.plugins / name, content)
    write_atomically(paths.config, config.to_json())
    write_atomically(paths.wandb_id, wandb_id)
    starts: list[dict[str, Any]] = [{"from_step": step, "processes": processes, **environment()}]
    with contextlib.suppress(FileNotFoundError, DamagedError):
        last = read_object(paths.environment, ENVIRONMENT_SHAPE, "remove it")
        starts += [last, *(last.pop("earlier", None) or [])]
    last, *earlier = starts
    write_object(paths.environment, {**last, "earlier": earlier})


def wandb_id_of(path: Path) -> str:
    """Id of a run on wandb; if the run has none yet, that of the agent that started it, or a new one.

    Raises:
        CheckpointError: the file cannot be read just now, or has no id in it.
    """
    file = RunPaths(path).wandb_id
    try:
        found = read_file(file).decode(errors="replace").strip()
    except FileNotFoundError:
        return id_of_agent() or uuid.uuid4().hex[:12]
    if not re.fullmatch(r"[\w-]{1,128}", found, re.ASCII):
        raise DamagedError(f"{file} is damaged: it has no id of wandb; remove it for a new one")
    return found


def remove_leftovers(path: Path) -> None:
    """Remove the files of a run that ended before its first checkpoint: the next start begins anew.

    A directory without a run of ours belongs to the user; nothing there is touched.

    Raises:
        CheckpointError: they cannot be removed.
    """
    if is_run(path):
        start_over(path)


def refuse_other_config(path: Path, config: TrainConfig) -> None:
    """Raise ConfigError if the run in a directory has checkpoints and cannot be resumed with this config."""
    saved = checkpoints.checkpoint_paths(path)
    if not saved:
        return
    file = RunPaths(path).config
    try:
        started = read_config(file)
    except FileNotFoundError:
        raise DamagedError(f"{path} has checkpoints but no config.json; copy {saved[0] / file.name} there") from None
    if not config.accept_changed_plugins:
        _refuse_changed_plugins(path, started, config)
    # With a decay or a schedule over the whole run, the values of every step depend on the number of steps.
    depends = config.optimization.decay != "constant" or config.schedule.spans_the_run
    free = _FREE_FIELDS | (set() if depends else {"steps"})
    # Data at a path may have moved; the digest shows whether they are the same. A data set has one name for ever.
    free |= {"data"} if ":" in started.data and ":" in config.data else set()
    names = [field.name for field in dataclasses.fields(config)]
    changed = [name for name in names if name not in free and getattr(started, name) != getattr(config, name)]
    if changed:
        changes = [_change(name, getattr(started, name), getattr(config, name)) for name in changed]
        if "steps" in changed:
            changes.append(f"with {_spanning_option(config)}, the values of a step depend on the number of steps")
        further = ""
        if changed == ["steps"] and config.steps > started.steps:
            further = f", where --from {path} goes on from its weights"
            if config.optimization.decay == "constant":
                further += "; with --schedule-images a run may go on for more steps"
        # A preset of another version may have other values. The run's own config has those that it began with.
        of_run = shlex.join(["--config", str(file), *([] if started.run_path == path else ["--run-dir", str(path)])])
        raise ConfigError(
            f"{path} holds a run of another config ({'; '.join(changes)}); give it the same options, go on with "
            f"{of_run} in place of the preset, start over with --fresh, or choose another --run-dir{further}"
        )


def _spanning_option(config: TrainConfig) -> str:
    """Option by which the values of a step depend on the number of steps of the run."""
    if config.optimization.decay != "constant":
        return f"--decay {config.optimization.decay}"
    schedule = vars(config.schedule).items()
    name, final = next((name, value) for name, value in schedule if name.startswith("final_") and value is not None)
    return f"--{name.replace('_', '-')} {final} over the whole run"


def _change(name: str, before: Any, now: Any) -> str:
    """Words for a field that has changed; of a part of the config, its fields that have."""
    if not dataclasses.is_dataclass(before) or type(before) is not type(now):
        return f"{name} {before!r} -> {now!r}"
    names = [field.name for field in dataclasses.fields(before)]
    changed = [one for one in names if getattr(before, one) != getattr(now, one)]
    was, is_now = (", ".join(f"{one}={getattr(part, one)!r}" for one in changed) for part in (before, now))
    return f"{name} {was} -> {is_now}"


def _refuse_changed_plugins(path: Path, started: TrainConfig, config: TrainConfig) -> None:
    digests = {plugin.name: plugin.sha256 for plugin in config.plugins}
    for plugin in started.plugins:
        now = digests.get(plugin.name, plugin.sha256)
        if now != plugin.sha256:
            copy = RunPaths(path).plugins / plugin.name
            kept = f" (a copy of it is {copy})" if copy.exists() else ""
            raise ConfigError(
                f"plug-in {plugin.name} has changed since {path} was trained with it (SHA-256 {plugin.sha256[:12]} -> "
                f"{now[:12]}); put its old code back{kept}, go on with the changed code with --accept-changed-plugins, "
                "start over with --fresh, or choose another --run-dir"
            )
