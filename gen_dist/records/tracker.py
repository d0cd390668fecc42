"""The record of a run: metrics.jsonl, and the same figures on the screen and on wandb.

One process of a run holds a `Tracker`. metrics.jsonl has one JSON object a line: `step`, `images_seen`,
`images_per_second` (absent where no image was trained on since the line before), scalars such as `train/loss` and
`test/loss`, and lists of numbers such as `samples/class_shares`. JSON has no NaN and no infinity, so a number that is
not finite is written as null; pandas reads it as NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError
from gen_dist.files import write_atomically
from gen_dist.records.display import Display, brief_checks, brief_losses
from gen_dist.records.readable import readable_time
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.wandb_run import WandbRun, wandb_mode


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in file order. A torn last line, as a killed process leaves it, is left out.

    Raises:
        CheckpointError: the file cannot be read, or a line before the last is no record.
    """
    return [record for _, record in _numbered_records(path)]


def _numbered_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line, without its line end, and the record in it."""
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append((line, record))
        elif number < len(lines):
            raise CheckpointError(
                f"{path}: line {number} is no record of metrics; remove that line, or start over with --fresh"
            )
    return records


class Tracker:
    """Records and shows one run. A context manager: leaving it closes the file, the bar and wandb.

    Nothing that it shows can stop a run: a terminal that goes away or a wandb that fails only ends the showing.

    Args:
        run_path: the run's directory; made if it is missing.
        config: decides the number of steps and the wandb mode (`config.wandb`, else $WANDB_MODE, else disabled).
        start_step: steps done before. 0 starts metrics.jsonl afresh; else its lines after this step, which a run that
            was killed after its last checkpoint has written, and a torn last line are dropped.
        images_per_step: the global batch size.
        wandb_id: the run's id on wandb; the same id when resumed continues the same curves.
        stream: where to show; None is sys.stderr. A terminal gets a live bar, anything else plain lines.

    Raises:
        ConfigError: $WANDB_MODE is no mode, wandb is not installed, or mode online has no valid API key.
        CheckpointError: metrics.jsonl is damaged or cannot be written.
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
    ) -> None:
        self._steps = config.steps
        self._images_per_step = images_per_step
        self._path = RunPaths(run_path).metrics
        self._exit_code = 0
        self._display = Display(sys.stderr if stream is None else stream, config.steps)
        mode = wandb_mode(config.wandb)
        try:
            run_path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to {run_path}: {error.strerror}") from None
        # Before metrics.jsonl is touched, so that a refusal changes nothing.
        self._wandb = None if mode == "disabled" else WandbRun(mode, run_path, config, wandb_id, self.note)
        try:
            if start_step and self._path.exists():
                _drop_after(self._path, start_step)
            self._file = open(self._path, "a" if start_step else "w", encoding="utf-8")  # noqa: SIM115 (kept open)
        except (OSError, CheckpointError) as error:
            if self._wandb is not None:
                self._wandb.finish(1)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from None

        self._started = time.perf_counter()
        self._paused_seconds = 0.0
        self._pause_started: float | None = None
        self._counted_step = start_step
        self._counted_seconds = 0.0
        self._eta_origin: tuple[int, float] | None = None
        self._images_per_second: float | None = None
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
        """Say that `step` is done, for the bar between two logs. Costs well under 1 us; call it after every step.

        The clocks of throughput and ETA start at the first call, so that compiling or the first step's set-up does
        not count.
        """
        if self._eta_origin is None:
            self._eta_origin = (step, time.perf_counter())
            self._counted_step, self._counted_seconds = step, self.training_seconds
        if self._display.due():
            self._display.move(step, self._progress(step))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in this block, such as evaluating or writing a checkpoint, does not count in `images_per_second`."""
        if self._pause_started is not None:  # within another pause, which counts
            yield
            return
        self._pause_started = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - self._pause_started
            self._pause_started = None

    @property
    def training_seconds(self) -> float:
        """Wall time since this tracker was made, without pauses."""
        now = time.perf_counter() if self._pause_started is None else self._pause_started
        return now - self._started - self._paused_seconds

    def log(self, step: int, metrics: Mapping[str, float | Sequence[float]]) -> None:
        """Append one line to metrics.jsonl, show it, and send it to wandb.

        Args:
            step: optimizer steps done.
            metrics: scalars by name, as in `train/loss`, and lists, as in `samples/class_shares`.

        Raises:
            CheckpointError: metrics.jsonl cannot be written, as on a full disk.
        """
        values: dict[str, float | list[float]] = {
            name: [float(one) for one in value] if isinstance(value, Sequence) else float(value)
            for name, value in metrics.items()
        }
        rate = self._measure(step)
        record: dict[str, Any] = {"step": step, "images_seen": step * self._images_per_step}
        if rate is not None:
            self._images_per_second = rate
            values = {"images_per_second": rate, **values}
        record |= {name: _as_json(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free some space, then run the same command to go on"
            ) from None
        self._show(step, values)
        if self._wandb is not None:
            self._wandb.log(step, {"images_seen": record["images_seen"], **values})

    def sync(self) -> None:
        """Return once metrics.jsonl is on the disk: a checkpoint that survives a power cut counts on its lines.

        Raises:
            OSError: the disk fails.
        """
        os.fsync(self._file.fileno())

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Send image files to wandb by name, such as `samples`; without wandb, nothing is done."""
        if self._wandb is not None:
            self._wandb.pictures(step, pictures)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._display.line(text)

    def close(self) -> None:
        """End the bar, close metrics.jsonl and finish the wandb run. Closing twice is closing once."""
        with contextlib.suppress(OSError):  # what could not be written, log() has reported
            self._file.close()
        self._display.close()
        if self._wandb is not None:
            self._wandb.finish(self._exit_code)

    def _measure(self, step: int) -> float | None:
        """Images per second since the last measurement, pauses left out; None if no step was made."""
        images = (step - self._counted_step) * self._images_per_step
        seconds = self.training_seconds - self._counted_seconds
        if images <= 0 or seconds <= 0:
            return None
        self._counted_step, self._counted_seconds = step, self.training_seconds
        if self._eta_origin is None:
            self._eta_origin = (step, time.perf_counter())
        return round(images / seconds, 1)

    def _show(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        losses, tests = brief_losses(values, "train/"), brief_losses(values, "test/")
        checks = brief_checks(values)
        self._checks = checks or self._checks
        if losses or "images_per_second" in values:
            self._losses = losses
            self._display.progress(step, self._progress(step))
        if tests or checks:
            shown = [*(["test", *tests] if tests else []), *(["samples", *checks] if checks else [])]
            self._display.line("  ".join([f"step {step}/{self._steps}", *shown]))

    def _progress(self, step: int) -> list[str]:
        """What to show of the run's state: what a narrow terminal is to drop first comes last."""
        rate = [] if self._images_per_second is None else [f"{self._images_per_second:,.0f} images/s"]
        seconds = self._seconds_left(step)
        eta = [] if seconds is None else [f"ETA {readable_time(seconds)}"]
        return [f"step {step}/{self._steps}", *rate, *eta, *self._losses, *self._checks]

    def _seconds_left(self, step: int) -> float | None:
        """From the wall time of this process's steps, with its evaluations and checkpoints, without its start."""
        if self._eta_origin is None:
            return None
        first_step, started = self._eta_origin
        if step >= self._steps:
            return 0.0
        if step <= first_step:
            return None
        return (time.perf_counter() - started) / (step - first_step) * (self._steps - step)


def _as_json(value: float | list[float]) -> float | list[float | None] | None:
    if isinstance(value, list):
        return [one if math.isfinite(one) else None for one in value]
    return value if math.isfinite(value) else None


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of metrics.jsonl up to `step`."""
    text = "".join(line + "\n" for line, record in _numbered_records(path) if record["step"] <= step)
    write_atomically(path, text)
