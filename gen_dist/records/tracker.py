"""The figures of a run in metrics.jsonl, on the screen and with trackers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError
from gen_dist.records.collapse import CollapseWatch
from gen_dist.records.display import Display, brief_checks, brief_losses, brief_measured, brief_use
from gen_dist.records.metrics_file import MetricsFile, metrics_of_run
from gen_dist.records.readable import readable_time
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.trackers import open_trackers
from gen_dist.records.trackers.base import RunToTrack, Values
from gen_dist.records.training_clock import TrainingClock


class Tracker:
    """Writes and shows the figures of one run, in one of its processes.

    A context manager: leaving it closes the file, the progress bar and the trackers. Showing cannot stop a run: if the
    terminal goes away or a tracker fails, only the showing ends.
    """

    def __init__(
        self,
        run_path: Path,
        config: TrainConfig,
        *,
        start_step: int,
        images_per_step: int,
        wandb_id: str,
        stream: TextIO | None = None,
        on_log: Callable[[int, Values], object] | None = None,
        use: Callable[[int, float], Mapping[str, float]] | None = None,
    ) -> None:
        """Open metrics.jsonl, the progress bar and the trackers.

        Args:
            run_path: the run directory, which is made if it is missing.
            config: sets the number of steps and the trackers (`config.track`, and `config.wandb`, else $WANDB_MODE).
            start_step: steps done before. 0 empties metrics.jsonl; see `MetricsFile` for the rest.
            images_per_step: the global batch size.
            wandb_id: identity of the run with trackers. A resumed run with the same id continues the same curves.
            stream: where to show progress, None for sys.stderr. A terminal gets a live bar, anything else plain lines.
            on_log: a callback, called with each step and its figures.
            use: function from the steps done and the images a second since its last call to figures of the machine's
                use, such as `peak_memory_mib`.

        Raises:
            ConfigError: $WANDB_MODE is not a mode, a tracker is unknown or not installed, or wandb has no valid key.
            CheckpointError: metrics.jsonl is damaged or cannot be written.
        """
        self._steps = config.steps
        self._objective = config.objective
        self._images_per_step = images_per_step
        self._exit_code = 0
        self._display = Display(sys.stderr if stream is None else stream, config.steps)
        try:
            run_path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to {run_path}: {error.strerror}") from None
        # Before metrics.jsonl is touched: a refusal of a tracker changes nothing.
        self._trackers = open_trackers(RunToTrack(run_path, config, wandb_id, start_step, self.note), on_log)
        try:
            self._file = MetricsFile(RunPaths(run_path).metrics, start_step)
        except CheckpointError:
            for one in self._trackers:
                one.finish(1)
            raise
        self._collapse = CollapseWatch(config.steps, metrics_of_run(run_path) if start_step else ())
        self._clock = TrainingClock(start_step, config.steps, images_per_step)
        self._images_per_second: float | None = None
        self._use_of = use
        self._use: Mapping[str, float] = {}
        self._losses: list[str] = []
        self._checks: list[str] = []
        self._display.start(start_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit_code = 0 if kind is None else 1
        self.close()

    def advance(self, step: int) -> None:
        """Note that `step` is done, for the clock and for the bar between two logs.

        Call it after every step: it costs well under 1 us. The clock starts at the first call.
        """
        self._clock.advance(step)
        if self._display.due():
            self._display.move(step, self._progress(step))

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Stop the clock within this block, e.g. while evaluating or writing a checkpoint."""
        return self._clock.pause()

    @property
    def training_seconds(self) -> float:
        """Wall time since this tracker was made, without pauses."""
        return self._clock.seconds

    def log(self, step: int, metrics: Mapping[str, float | Sequence[float]]) -> None:
        """Append one line to metrics.jsonl, show it, and send it to the trackers.

        Args:
            step: optimizer steps done.
            metrics: scalars by name, such as `train/loss`, and lists, such as `samples/class_shares`.

        Raises:
            CheckpointError: metrics.jsonl cannot be written, e.g. because the disk is full.
        """
        values: dict[str, float | list[float]] = {
            name: [float(one) for one in value] if isinstance(value, Sequence) else float(value)
            for name, value in metrics.items()
        }
        rate = self._clock.images_per_second(step)
        if rate is not None:
            self._images_per_second = rate
            self._use = self._use_of(step, rate) if self._use_of else {}
            values = {"images_per_second": rate, **self._use, **values}
        images_seen = step * self._images_per_step
        self._file.append({"step": step, "images_seen": images_seen, **values})
        self._show(step, values)
        for line in self._collapse.see({"step": step, **values}):
            self.note(line)
        for one in self._trackers:
            one.log(step, {"images_seen": images_seen, **values})

    def recorded(self) -> dict[str, Any]:
        """Size and digest of metrics.jsonl, for a checkpoint; see `metrics_damage`."""
        return self._file.recorded()

    def sync(self) -> None:
        """Force metrics.jsonl to disk.

        Raises:
            OSError: the disk fails.
        """
        self._file.sync()

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Send image files to the trackers by name, such as `samples`."""
        for one in self._trackers:
            one.pictures(step, pictures)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._display.line(text)

    def close(self) -> None:
        """End the bar, close metrics.jsonl and finish the trackers. A second call does nothing."""
        self._file.close()
        self._display.close()
        for one in self._trackers:
            one.finish(self._exit_code)

    def _show(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        losses, tests = (brief_losses(values, split, self._objective) for split in ("train/", "test/"))
        checks, measured = brief_checks(values), brief_measured(values)
        self._checks = checks or self._checks
        if losses or "images_per_second" in values:
            self._losses = losses
            self._display.progress(step, self._progress(step))
        if tests or checks or measured:
            shown = [*(["test", *tests] if tests else []), *(["samples", *checks] if checks else []), *measured]
            self._display.line("  ".join([f"step {step}/{self._steps}", *shown]))

    def _progress(self, step: int) -> list[str]:
        """State of the run in parts. A narrow terminal drops the last ones first."""
        rate = [] if self._images_per_second is None else [f"{self._images_per_second:,.0f} images/s"]
        seconds = self._clock.seconds_left(step)
        eta = [] if seconds is None else [f"ETA {readable_time(seconds)}"]
        return [f"step {step}/{self._steps}", *rate, *eta, *self._losses, *self._checks, *brief_use(self._use)]
