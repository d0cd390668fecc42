"""Step profile: steps of a run replayed with a stopwatch between their parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gen_dist.config import TrainConfig
from gen_dist.parallel.processes import Processes
from gen_dist.records.checkpoint import checkpoint_paths, step_of
from gen_dist.records.reading import config_of_run
from gen_dist.training.replay import trainer_at

WARM_UP_STEPS = 5
MOST_STEPS = 200
LEAST_STEPS = 10
PATIENCE_SECONDS = 4.0
"""Measurement ends after this time or MOST_STEPS, but not before LEAST_STEPS."""


@dataclass(frozen=True)
class StepTimes:
    """Mean wall time of the parts of a step."""

    seconds: dict[str, float]
    """Seconds of each part, in the order of its first occurrence: `data`, `PHASE/forward` and `PHASE/backward`, or
    `PHASE/gradients` if both are one compiled graph, `PHASE/optimizer`, `moving average`, and `other`, the rest of the
    step. Phases and penalties that are not due at each step count with their share of the steps."""
    steps: int
    """Number of measured steps."""
    first_step: int
    """First measured step, counted from 1."""
    warm_up_steps: int
    """Steps before the first measured one; they do not count."""
    images_per_step: int
    threads: int
    device: str
    """Name of the measured device, e.g. `CPU`. This machine may not be the one that trained."""

    @property
    def step_seconds(self) -> float:
        """Mean wall time of a whole step."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Throughput of the measured steps, without records between them."""
        return self.images_per_step / self.step_seconds

    def method(self) -> str:
        """Method of the measurement, as text."""
        last = self.first_step + self.steps - 1
        launched = " Kernels are launched one by one; a run with CUDA graphs saves that time."
        return (
            f"Mean wall time of steps {self.first_step:,} to {last:,}, replayed in one process on this machine "
            f"({self.device}, {self.threads} {'thread' if self.threads == 1 else 'threads'}) with a stopwatch between "
            f"their parts, after {self.warm_up_steps} warm-up steps.{'' if self.device == 'CPU' else launched}"
        )


def measure_step_times(
    run_path: Path,
    announce: Callable[[str], None] = print,
    *,
    data: str | None = None,
    data_root: str | None = None,
) -> StepTimes:
    """Replay steps of a run from a checkpoint before its newest, or from its start, and time their parts.

    The run directory is not changed. On a GPU each part ends with a wait for the device, which separates the times of
    the parts. So parts that overlap in training do not overlap here. `data` and `data_root` are as for `replay`.

    Raises:
        CheckpointError: the directory has no run.
        DataError: the data of the run are not on this machine.
    """
    # A run of a GPU may be measured on a machine without one. A CUDA graph has no parts.
    config = replace(config_of_run(run_path), device="auto", cuda_graphs=False)
    newest = max(map(step_of, checkpoint_paths(run_path)), default=0)
    at_most = newest - WARM_UP_STEPS - LEAST_STEPS
    with trainer_at(run_path, config, at_most, announce, data=data, data_root=data_root) as (trainer, start):
        warm_up_steps = min(WARM_UP_STEPS, (config.steps - start) // 2)
        first = start + warm_up_steps
        for step in range(start, first):
            trainer.run_step(step)
        rounds = _steps_a_round(config)
        watch = _Stopwatch(trainer.processes.device)
        step = first
        while step < config.steps:
            trainer.run_step(step, watch.lap)
            watch.lap("other")
            step += 1
            done = step - first
            enough = done >= MOST_STEPS or (done >= LEAST_STEPS and watch.total >= PATIENCE_SECONDS)
            if enough and done % rounds == 0:
                break
        return StepTimes(
            seconds={part: seconds / (step - first) for part, seconds in watch.seconds.items()},
            steps=step - first,
            first_step=first + 1,
            warm_up_steps=warm_up_steps,
            images_per_step=config.global_batch_size,
            threads=torch.get_num_threads(),
            device=_name(trainer.processes),
        )


class _Stopwatch:
    """Stopwatch that adds the time since the last lap, or since it was made, to the named part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def lap(self, part: str) -> None:
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _steps_a_round(config: TrainConfig) -> int:
    """Period of phases and penalties in steps. A fraction of a period would miscount them."""
    return math.lcm(*config.objective.periods)


def _name(processes: Processes) -> str:
    if processes.device.type == "cuda":
        return torch.cuda.get_device_name(processes.device)
    return "CPU"
