"""Records that the main process of a run writes and shows. In all other processes the recorder does nothing.

So the training loop is the same in every process, without a check for the main one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from gen_dist.errors import CheckpointError
from gen_dist.evaluation.sample_checks import SampleChecks
from gen_dist.inference.model import GenerativeModel
from gen_dist.parallel.collectives import errors_shared
from gen_dist.parallel.processes import Processes
from gen_dist.pictures.gallery import Gallery
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.records.metrics_file import METRICS, metrics_of_run
from gen_dist.records.reading import write_object
from gen_dist.records.removal import remove_left_overs
from gen_dist.records.run_directory import Holding, record_start, remove_leftovers, wandb_id_of
from gen_dist.records.run_mark import note_checkpoint
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.summary import last_values, summary_of
from gen_dist.records.tracker import Tracker
from gen_dist.records.trackers.base import Values
from gen_dist.training.machine_use import MachineUse
from gen_dist.training.trainer import Trainer

Metrics = Mapping[str, float | list[float]]
OnLog = Callable[[int, Values], object]
"""A callback that takes a step and its figures."""
Ending = tuple[dict[str, Any], dict[str, Path], list[str]]
"""Last value of each metric, the final pictures, and a line for each collapse that holds."""


class RunRecorder:
    """The recorder of every process but the main one: a context manager that does nothing."""

    def __init__(self, path: Path, processes: Processes) -> None:
        self.path = path
        self._processes = processes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Context manager in which the main process may write. If that fails, all processes raise its error.

        A collective call: every process has to enter it.
        """
        with errors_shared(self._processes):
            try:
                yield
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(
                    f"cannot write to {self.path}: {reason}; fix that, then run the same command"
                ) from None

    @property
    def training_seconds(self) -> float:
        """0.0: only the main process measures time."""
        return 0.0

    def claim(self) -> None:
        """Do nothing."""

    def remove_leftovers(self) -> None:
        """Do nothing."""

    def begin(self, step: int) -> None:
        """Do nothing."""

    def advance(self, step: int) -> None:
        """Do nothing."""

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Context manager that does nothing."""
        return contextlib.nullcontext()

    def check_samples(self) -> Metrics:
        """Return no metrics."""
        return {}

    def log(self, step: int, metrics: Metrics) -> None:
        """Do nothing."""

    def pictures(self, step: int) -> None:
        """Do nothing."""

    def checkpoint(self, checkpoint: Checkpoint) -> Path | None:
        """Return None."""
        return None

    def finish(self, step: int, training_seconds: float) -> Ending | None:
        """Return None; `from_main` brings the ending of the main process."""
        return None


class MainRunRecorder(RunRecorder):
    """The recorder of the main process: a context manager that closes metrics.jsonl, progress bar and trackers."""

    def __init__(self, trainer: Trainer, holding: Holding, screen: TextIO | None, on_log: OnLog | None = None) -> None:
        super().__init__(holding.path, trainer.processes)
        self._config = trainer.config
        self._trainer = trainer
        self._holding = holding
        self._screen = screen
        self._on_log = on_log
        self._paths = RunPaths(holding.path)
        dataset = trainer.dataset
        model = GenerativeModel(
            *(trainer.best_objective, trainer.config, dataset.image_shape, dataset.labels, dataset.scale)
        )
        self._gallery = Gallery(model, dataset, holding.path)
        self._checks = SampleChecks(model, dataset)
        self._tracker: Tracker | None = None
        self._seconds = 0.0

    def claim(self) -> None:
        """Claim the run directory for this process; `--fresh` removes the previous run here."""
        self._holding.begin()

    def remove_leftovers(self) -> None:
        """Remove the files of a run that ended before its first checkpoint."""
        remove_leftovers(self.path)

    def begin(self, step: int) -> None:
        """Open metrics.jsonl, progress bar and trackers, and record that training starts at this step."""
        wandb_id = wandb_id_of(self.path)
        use = MachineUse(self._trainer, lambda line: self._open_tracker.note(line), first_step=step)
        self._tracker = Tracker(
            self.path,
            self._config,
            start_step=step,
            images_per_step=self._config.global_batch_size,
            wandb_id=wandb_id,
            stream=self._screen,
            on_log=self._on_log,
            use=use.figures,
        )
        # After the tracker, which may refuse to start: a refusal must not change the directory.
        record_start(self.path, self._config, step, wandb_id, self._processes.world_size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker:
            self._seconds = self._tracker.training_seconds
            self._tracker.__exit__(kind, error, trace)
            self._tracker = None

    @property
    def training_seconds(self) -> float:
        """Wall time of the steps of this start, without the time within `pause`."""
        return self._tracker.training_seconds if self._tracker else self._seconds

    def advance(self, step: int) -> None:
        """Move the progress bar after a step."""
        self._open_tracker.advance(step)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Context manager whose time does not count as training time."""
        return self._open_tracker.pause()

    def check_samples(self) -> Metrics:
        """Check samples of the model for collapse; metrics `samples/NAME`."""
        return self._checks.measure()

    def log(self, step: int, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl, and show it."""
        self._holding.assert_held()
        self._open_tracker.log(step, metrics)

    def pictures(self, step: int) -> None:
        """Draw samples and reconstructions."""
        self._holding.assert_held()
        if made := self._gallery.at_step(step):
            self._open_tracker.pictures(step, made)

    def checkpoint(self, checkpoint: Checkpoint) -> Path | None:
        """Write a checkpoint and remove old ones; returns its directory."""
        self._holding.assert_held()
        self._open_tracker.sync()
        facts = {**checkpoint.facts, METRICS: self._open_tracker.recorded()}
        checkpoint = dataclasses.replace(checkpoint, facts=facts)
        saved = checkpoints.save(self.path, checkpoint, self._config, self._config.keep_checkpoints)
        note_checkpoint(self.path)
        return saved

    def finish(self, step: int, training_seconds: float) -> Ending | None:
        """Return the last metrics; after the last step, draw the final pictures and write summary.json."""
        self._holding.assert_held()
        remove_left_overs(self.path)
        checkpoints.keep_newest(self.path, step, self._config.keep_checkpoints)
        records = metrics_of_run(self.path)
        if step < self._config.steps:
            return last_values(records), {}, []
        pictures = self._gallery.at_end(records)
        for series in self._paths.picture_series:
            if (last := self._paths.picture(series, step)).exists():
                pictures[series] = last
        summary = summary_of(
            self._config,
            records,
            step=step,
            train_images=len(self._trainer.dataset.train.images),
            training_seconds=training_seconds,
            pictures={name: path.relative_to(self.path) for name, path in pictures.items()},
        )
        write_object(self._paths.summary, summary)
        return last_values(records), pictures, summary["collapses"]

    @property
    def _open_tracker(self) -> Tracker:
        assert self._tracker, "begin() comes first"
        return self._tracker
