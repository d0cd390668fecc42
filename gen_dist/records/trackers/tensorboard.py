"""Curves, histograms and pictures of a run for TensorBoard: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen_dist.records.run_paths import RunPaths
from gen_dist.records.trackers.base import RunToTrack, RunTracker, Values, histogram, missing_package, register


class TensorBoard(RunTracker):
    """Writes event files. TensorBoard hides what an earlier start wrote of the steps that are taken again."""

    def __init__(self, run: RunToTrack) -> None:
        """Open a new event file in the run directory.

        Raises:
            ConfigError: tensorboardX is not installed.
        """
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError:
            raise missing_package("tensorboard", "tensorboardX") from None
        directory = RunPaths(run.path).tensorboard
        directory.mkdir(exist_ok=True)
        self._event: Any = Event
        self._summary: Any = summary
        # Not its SummaryWriter, whose thread loses at a kill what has been flushed. Files are named by the second: two
        # starts in one would overwrite each other.
        suffix = f".{run.start_step:08d}.{os.getpid()}"
        self._writer: Any = EventsWriter(str(directory / "events"), suffix)
        self._writer.write_event(Event(step=run.start_step + 1, session_log=SessionLog(status=SessionLog.START)))
        # Markdown shows four spaces as code.
        config = "".join(f"    {line}\n" for line in run.config.to_json().splitlines())
        self._write(run.start_step, summary.text("config", config))
        self._writer.flush()

    def log(self, step: int, values: Values) -> None:
        """See RunTracker."""
        for name, value in values.items():
            if isinstance(value, float | int):
                self._write(step, self._summary.scalar(name, value))
            elif value:
                self._write(step, self._histogram(name, *histogram(name, value)))
        self._writer.flush()

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """See RunTracker."""
        for name, path in pictures.items():
            with Image.open(path) as image:
                self._write(step, self._summary.image(name, np.asarray(image.convert("RGB")), dataformats="HWC"))
        self._writer.flush()

    def finish(self, exit_code: int) -> None:
        """See RunTracker."""
        self._writer.close()

    def _write(self, step: int, summary: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def _histogram(self, name: str, heights: list[float], edges: list[float]) -> Any:
        centres = np.array(edges[1:]) / 2 + np.array(edges[:-1]) / 2
        return self._summary.histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(heights),
            sum=float(np.dot(heights, centres)),
            sum_squares=float(np.dot(heights, centres**2)),
            # A bin is given by its upper limit; the first one ends where ours begin.
            bucket_limits=edges,
            bucket_counts=[0.0, *heights],
        )


register("tensorboard", TensorBoard)
