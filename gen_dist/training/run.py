"""A run: its directory, the loop over steps, what is recorded and when, and how it stops and goes on."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import CheckpointError, ConfigError, UserError
from gen_dist.evaluation.sample_checks import SampleChecks
from gen_dist.files import write_atomically
from gen_dist.inference.model import GenerativeModel
from gen_dist.parallel.collectives import StopVote, from_main, raise_everywhere
from gen_dist.parallel.processes import start_processes
from gen_dist.pictures.gallery import Gallery
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.records.display import brief_checks
from gen_dist.records.run_directory import Holding, hold, record_start, remove_leftovers, wandb_id_of
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.tracker import Tracker, read_metrics
from gen_dist.training.schedule import learning_rate_at
from gen_dist.training.stopping import stop_signals
from gen_dist.training.trainer import Trainer

T = TypeVar("T")


class DivergenceError(UserError):
    """The loss became NaN or infinite."""

    shared = True


@dataclass(frozen=True)
class Outcome:
    """What `train` did."""

    run_path: Path
    step: int
    finished: bool
    """Whether all steps are done; False after SIGTERM or SIGINT."""
    metrics: dict[str, Any]
    """The last value of each metric: a number, None where it was not finite, or a list of them."""
    pictures: dict[str, Path]
    is_main: bool
    """Whether this is the process that speaks to the user."""

    def report(self, command: str) -> list[str]:
        """Lines that tell a user what came out; `command` is what goes on with the run."""
        if not self.finished:
            return [f"stopped at step {self.step}, everything is saved in {self.run_path}; to go on: {command}"]
        values = [
            *(
                f"{name} {'not finite' if value is None else f'{value:.2f}'}"
                for name, value in self.metrics.items()
                if name.startswith("test/")
            ),
            *(["samples", *checks] if (checks := brief_checks(self.metrics)) else []),
        ]
        width = max(map(len, self.pictures), default=0)
        return [
            f"finished at step {self.step}: {'  '.join(values)}",
            *(f"  {name.replace('_', ' '):{width}}  {path}" for name, path in self.pictures.items()),
        ]


@dataclass(frozen=True)
class Supervisor:
    """Who started a run in processes elsewhere, such as Ray's workers, and may start it again where one of them fails.

    Every process that trains has one of its own.
    """

    name: str
    """Of this launch, the same whenever it starts the run again: it then takes the run directory over from processes
    of its own that are out of reach but not known to be dead, and `fresh` counts the first time only."""
    stop: threading.Event
    """Set in any process, it ends the run of all as SIGTERM would."""
    recorded: Callable[[int, Mapping[str, float | Sequence[float]], Path | None], None]
    """Called in every process after each evaluation or checkpoint with the step and, the sample checks in the main
    process alone, the metrics; there also with the directory of the checkpoint if one was written."""
    directory: Path | None = None
    """Where this process finds and keeps the run, if not in its config's run directory."""
    screen: TextIO | None = None
    """Where the main process shows progress; None is standard error."""


def train(
    config: TrainConfig,
    *,
    fresh: bool = False,
    say: Callable[[str], None] | None = None,
    supervisor: Supervisor | None = None,
) -> Outcome:
    """Train a config to its last step, from the newest whole checkpoint of its run directory if there is one.

    Call it in every process that a launcher started; the main one writes the run directory. SIGTERM and SIGINT save a
    checkpoint and return early.

    Args:
        config: what to run.
        fresh: remove what an earlier run wrote and start over.
        say: takes what is to be said before and after the steps, in the main process; None prints to standard error,
            or the supervisor's screen, where the progress of the steps is always shown.
        supervisor: who started these processes, if that is no launcher of theirs that waits for them.

    Raises:
        UserError: config, data or run directory cannot be used, the disk is full, or the loss diverged.
    """
    processes = start_processes(config)
    screen = supervisor.screen if supervisor else None
    announce = say or (lambda line: print(line, file=screen or sys.stderr, flush=True))
    if not processes.is_main:
        announce = _silent
    path = (supervisor.directory if supervisor else None) or config.run_path
    with hold(path, config, processes, fresh, supervisor.name if supervisor else None) as holding:
        dataset = open_dataset(config.data, config.data_root, config.packing, announce)
        trainer = Trainer(config, dataset, processes)
        try:
            return _Run(config, trainer, announce, holding, supervisor).train()
        finally:
            trainer.close()


class _Run:
    """The loop and what it has to remember between steps."""

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        announce: Callable[[str], None],
        holding: Holding,
        supervisor: Supervisor | None,
    ) -> None:
        self.config = config
        self.holding = holding
        self.supervisor = supervisor
        self.trainer = trainer
        self.processes = trainer.processes
        self.announce = announce
        self.path = holding.path
        self.step = 0
        self.training_seconds = 0.0
        self._intervals = {
            *(config.log_every, config.evaluate_every),
            *(config.sample_every, config.checkpoint_every),
        }
        self._on_device: list[dict[str, Tensor]] = []
        """Logs of steps since they were last brought to the host."""
        self._unlogged: list[dict[str, float | list[float]]] = []
        """Logs of steps since the last line in metrics.jsonl."""
        dataset = trainer.dataset
        model = GenerativeModel(trainer.best_objective, config, dataset.image_shape, dataset.class_names)
        self.gallery = Gallery(model, dataset, self.path)
        self.checks = SampleChecks(model, dataset)

    def train(self) -> Outcome:
        """Go on from where the run directory stands to the last step, or until a signal."""
        with stop_signals(self.supervisor.stop if self.supervisor else threading.Event()) as stop:
            if self.holding.fresh:  # only now that config and data are known to be good
                self._in_main(self.holding.begin)
            self._resume()
            if self.step < self.config.steps:
                if not self.holding.fresh:
                    self._in_main(self.holding.begin)
                wandb_id = self._in_main(lambda: wandb_id_of(self.path))
                tracker = self._in_main(lambda: self._open_tracker(wandb_id or ""))
                with tracker or contextlib.nullcontext():
                    self._in_main(functools.partial(self._record_start, wandb_id or ""))
                    self._loop(tracker, stop)
            return self._finish()

    def _loop(self, tracker: Tracker | None, stop: threading.Event) -> None:
        config, trainer = self.config, self.trainer
        vote = StopVote(self.processes)
        stopping = False
        while self.step < config.steps and not stopping:
            self._on_device.append(trainer.run_step(self.step))
            self.step += 1
            if tracker:
                tracker.advance(self.step)
            stopping = vote.agreed(stop.is_set())
            if stopping or any(self._is_due(every) for every in self._intervals):
                self._record(tracker, stopping)
        vote.close()
        if tracker:
            self.training_seconds += tracker.training_seconds

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _record(self, tracker: Tracker | None, stopping: bool) -> None:
        """Whatever is to be done at this step, in an order that loses nothing: the checkpoint comes last."""
        config = self.config
        self._collect()  # first of all: it waits for the device, whose work is training and not what follows
        metrics: dict[str, float | list[float]] = {}
        evaluates, saved = self._is_due(config.evaluate_every), None
        saves = stopping or self._is_due(config.checkpoint_every)
        if self._is_due(config.log_every):
            metrics |= self._training_means()
        with tracker.pause() if tracker else contextlib.nullcontext():
            if evaluates:
                tested = self.trainer.evaluate(self.trainer.dataset.test)
                metrics |= {f"test/{name}": value for name, value in tested.items()}
                metrics |= self._in_main(self.checks.measure) or {}
        if metrics:
            self._in_main(functools.partial(_log, tracker, self.step, metrics))
        with tracker.pause() if tracker else contextlib.nullcontext():
            if self._is_due(config.sample_every):
                made = self._in_main(lambda: self.gallery.at_step(self.step))
                if tracker and made:
                    tracker.pictures(self.step, made)
            if saves:
                saved = self._save(tracker)
            if self.supervisor and (evaluates or saves):
                self.supervisor.recorded(self.step, metrics, saved)

    def _in_main(self, action: Callable[[], T]) -> T | None:
        """Do what the main process alone does. An error of it ends every process, instead of leaving some waiting."""
        result: T | None = None
        error: UserError | None = None
        if self.processes.is_main:
            try:
                self.holding.assert_held()
                result = action()
            except UserError as raised:
                error = raised
            except OSError as raised:
                reason = raised.strerror or raised
                error = CheckpointError(f"cannot write to {self.path}: {reason}; mend that, then run the same command")
        raise_everywhere(error, self.processes)
        return result

    def _resume(self) -> None:
        found = checkpoints.load_newest(self.path, self.announce)
        step = found[0].step if found else 0
        newest = from_main(step, self.processes)
        if step != newest:
            raise CheckpointError(
                f"rank {self.processes.rank} sees step {step} in {self.path}, but rank 0 sees step {newest}; "
                "all processes need one directory that they share"
            )
        if not found:
            self._in_main(lambda: remove_leftovers(self.path))
            return
        checkpoint = found[0]
        if checkpoint.step > self.config.steps:
            raise ConfigError(
                f"{self.path} is already at step {checkpoint.step}, past steps {self.config.steps}; "
                f"use --steps {checkpoint.step} or more, --fresh, or another --run-dir"
            )
        self.trainer.load(checkpoint)
        self.step = checkpoint.step
        self.training_seconds = checkpoint.facts["training_seconds"]
        self._unlogged = [dict(row) for row in checkpoint.facts["unlogged"]]
        if self.step < self.config.steps:
            processes = self.processes.world_size
            by = "" if processes == checkpoint.facts["world_size"] else f", now with {processes} processes"
            self.announce(f"resuming {self.path} at step {self.step} of {self.config.steps}{by}")

    def _record_start(self, wandb_id: str) -> None:
        record_start(self.path, self.config, self.step, wandb_id, self.processes.world_size)

    def _open_tracker(self, wandb_id: str) -> Tracker:
        return Tracker(
            self.path,
            self.config,
            start_step=self.step,
            images_per_step=self.config.global_batch_size,
            wandb_id=wandb_id,
            stream=self.supervisor.screen if self.supervisor else None,
        )

    def _collect(self) -> None:
        """Bring the logs of the last steps to the host and look for divergence."""
        rows = self.trainer.average_logs(self._on_device)
        for index, row in enumerate(rows):
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise self._divergence(f"{name} is {value} at step {self.step - len(rows) + index + 1}")
        self._on_device.clear()
        self._unlogged += rows

    def _divergence(self, what: str) -> DivergenceError:
        broken = self.trainer.broken_networks()
        where = f"; the weights of {' and '.join(broken)} are broken" if broken else ""
        newest = next((str(path) for path in checkpoints.checkpoint_paths(self.path)), "none yet")
        return DivergenceError(
            f"{what}{where}; lower --learning-rate or set --clip-norm, with --fresh or another --run-dir "
            f"(newest good checkpoint: {newest})"
        )

    def _training_means(self) -> dict[str, float | list[float]]:
        """Means of the logs of all steps since they were last asked for; of histograms, which are of one phase, too."""
        means: dict[str, float | list[float]] = {}
        for name in dict.fromkeys(name for row in self._unlogged for name in row):
            values = [row[name] for row in self._unlogged if name in row]
            numbers = [value for value in values if isinstance(value, float)]
            histograms = [value for value in values if isinstance(value, list)]
            if numbers:
                means[f"train/{name}"] = math.fsum(numbers) / len(numbers)
            if histograms:
                kind = name.rpartition("scores_")[2]
                means[f"scores/{kind}"] = [math.fsum(bin) / len(histograms) for bin in zip(*histograms, strict=True)]
        self._unlogged.clear()
        return means | {"train/learning_rate": learning_rate_at(self.config, self.step - 1)}

    def _save(self, tracker: Tracker | None) -> Path | None:
        """Write a checkpoint; its directory, in the main process."""
        if self.trainer.broken_networks():  # The loss was finite before this update: it is no good state all the same.
            raise self._divergence(f"the update of step {self.step} is not finite")
        facts = {
            "preset": self.config.preset,
            "data_digest": self.trainer.dataset.digest,
            "image_shape": self.trainer.dataset.image_shape,
            "class_names": self.trainer.dataset.class_names,
            "world_size": self.processes.world_size,
            "training_seconds": self.training_seconds + (tracker.training_seconds if tracker else 0.0),
            "loss_scales": self.trainer.loss_scales(),
            "unlogged": self._unlogged,
        }
        state = Checkpoint(self.step, self.trainer.tensors(), facts)

        def save() -> Path:
            assert tracker is not None
            tracker.sync()
            return checkpoints.save(self.path, state, self.config, self.config.keep_checkpoints)

        return self._in_main(save)

    def _finish(self) -> Outcome:
        ended = self._in_main(self._write_end)
        metrics, made = from_main(ended, self.processes)
        finished = self.step == self.config.steps
        return Outcome(self.path, self.step, finished, metrics, made, self.processes.is_main)

    def _write_end(self) -> tuple[dict[str, Any], dict[str, Path]]:
        """The last value of each metric; for a finished run also its last pictures and its summary."""
        file = RunPaths(self.path).metrics
        records = read_metrics(file) if file.exists() else []
        metrics: dict[str, Any] = {}
        for record in records:
            metrics |= {key: value for key, value in record.items() if "/" in key}
        if self.step < self.config.steps:
            return metrics, {}
        made = self.gallery.at_end(records)
        for kind in ("samples", "reconstructions"):
            picture = RunPaths(self.path).picture(kind, self.step)
            if picture.exists():
                made[kind] = picture
        summary = self._summary(records, metrics, made)
        write_atomically(RunPaths(self.path).summary, json.dumps(summary, indent=2) + "\n")
        return metrics, made

    def _summary(self, records: list[dict[str, Any]], metrics: dict[str, Any], made: dict[str, Path]) -> dict[str, Any]:
        # The first test metric of an objective is the one it is judged by, and less of it is better.
        headline = next((name for name in metrics if name.startswith("test/")), "")
        tested = [record for record in records if record.get(headline) is not None]
        best = min(tested, key=lambda record: float(record[headline]), default=None)
        seconds = self.training_seconds
        images = self.step * self.config.global_batch_size
        return {
            "preset": self.config.preset,
            "steps": self.step,
            "images_seen": images,
            "epochs": images / len(self.trainer.dataset.train.images),
            "training_seconds": seconds,
            "images_per_second": images / seconds if seconds else None,
            "final": metrics,
            "best": {"step": best["step"], headline: best[headline]} if best else None,
            "pictures": {name: str(path.relative_to(self.path)) for name, path in made.items()},
        }


def _log(tracker: Tracker | None, step: int, metrics: dict[str, float | list[float]]) -> None:
    if tracker:
        tracker.log(step, metrics)


def _silent(_line: str) -> None:
    pass
