"""The time that training takes: throughput, and the time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class TrainingClock:
    """Wall time of the steps of one process, without pauses such as evaluation and checkpoints."""

    def __init__(self, start_step: int, steps: int, images_per_step: int) -> None:
        """Start the clock.

        Args:
            start_step: steps done before.
            steps: steps of the whole run.
            images_per_step: the global batch size.
        """
        self._steps = steps
        self._images_per_step = images_per_step
        self._started = time.perf_counter()
        self._paused_seconds = 0.0
        self._pause_started: float | None = None
        self._measured_step = start_step
        self._measured_seconds = 0.0
        self._first: tuple[int, float] | None = None
        """The first step that was done, and when."""

    @property
    def seconds(self) -> float:
        """Wall time since this clock was made, without pauses."""
        now = time.perf_counter() if self._pause_started is None else self._pause_started
        return now - self._started - self._paused_seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock within this block. A pause within a pause counts once."""
        if self._pause_started is not None:
            yield
            return
        self._pause_started = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - self._pause_started
            self._pause_started = None

    def advance(self, step: int) -> None:
        """Note that a step is done. The first call starts the measurements: compiling and set-up do not count."""
        if self._first is None:
            self._first = (step, time.perf_counter())
            self._measured_step, self._measured_seconds = step, self.seconds

    def images_per_second(self, step: int) -> float | None:
        """Measure the throughput since the last measurement, to a tenth; None if no step was done since."""
        images = (step - self._measured_step) * self._images_per_step
        seconds = self.seconds - self._measured_seconds
        if images <= 0 or seconds <= 0:
            return None
        self._measured_step, self._measured_seconds = step, self.seconds
        if self._first is None:
            self._first = (step, time.perf_counter())
        return round(images / seconds, 1)

    def seconds_left(self, step: int) -> float | None:
        """Estimate the time to the last step, pauses included; None before a second step is done."""
        if self._first is None:
            return None
        first_step, started = self._first
        if step >= self._steps:
            return 0.0
        if step <= first_step:
            return None
        return (time.perf_counter() - started) / (step - first_step) * (self._steps - step)
