"""Values that change from step to step: the key of the noise, the learning rate, the weight of the average, and what a
config schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gen_dist.config import ScheduleConfig, TrainConfig


class Schedule:
    """Key of a step's noise, learning rate, and newest weight of the moving average: functions of the step alone.

    On a GPU all are tensors, even if steps are not recorded. So both kinds of steps have the same arithmetic and bits.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, in_tensors: bool) -> None:
        self._config = config
        self._scheduled = config.schedule != ScheduleConfig()
        self.rng = torch.tensor([config.seed, 0], dtype=torch.int64, device=device)
        self._step = self.rng[1]  # a view: assigning to an item copies from the host, and waits for the device
        self.learning_rate: float | Tensor = torch.zeros((), device=device) if in_tensors else 0.0
        self.newest_weight: float | Tensor = torch.zeros((), device=device) if in_tensors else 0.0
        self.beta2: float | Tensor | None = None
        """Adam's second decay rate; None if it is not scheduled."""
        if config.schedule.final_beta2 is not None:
            self.beta2 = torch.zeros((), device=device) if in_tensors else 0.0
        # Tensors everywhere: a number that changes would compile a phase again at each step.
        self.of_objective = {
            name: torch.zeros((), device=device) for name in config.schedule.of_objective(config.objective, 0.0)
        }
        """Scheduled options of the objective, by name; see `Batch.scheduled`."""

    @property
    def rates(self) -> tuple[float | Tensor, float | Tensor | None]:
        """Learning rate, and Adam's second decay rate."""
        return self.learning_rate, self.beta2

    def at(self, step: int) -> Schedule:
        """Itself, with all values set to those of a step, counted from 0."""
        config = self._config
        self._step.fill_(step)
        self.learning_rate = _written(self.learning_rate, learning_rate_at(config, step))
        if config.optimization.ema_decay is not None:
            self.newest_weight = _written(self.newest_weight, newest_weight_at(config.optimization.ema_decay, step))
        if self._scheduled:
            self._write_scheduled(config.schedule, progress_at(config, step))
        return self

    def _write_scheduled(self, schedule: ScheduleConfig, progress: float) -> None:
        config = self._config
        if (newest_weight := schedule.newest_weight(config.global_batch_size, progress)) is not None:
            self.newest_weight = _written(self.newest_weight, newest_weight)
        if self.beta2 is not None:
            self.beta2 = _written(self.beta2, schedule.beta2(config.optimization, progress) or 0.0)
        for name, value in schedule.of_objective(config.objective, progress).items():
            self.of_objective[name].fill_(value)


def _written(number: float | Tensor, value: float) -> float | Tensor:
    """Return the value; if `number` is a tensor, write it there and return the tensor."""
    return number.fill_(value) if isinstance(number, Tensor) else value


def progress_at(config: TrainConfig, step: int) -> float:
    """Part of the way of scheduled values to their final ones at a step, counted from 0."""
    batch = config.global_batch_size
    return config.schedule.progress(step * batch, config.steps * batch)


def logged_at(config: TrainConfig, step: int) -> dict[str, float]:
    """The learning rate and other scheduled values of a step, counted from 0, by their names in metrics.jsonl."""
    schedule, progress = config.schedule, progress_at(config, step)
    beta2 = schedule.beta2(config.optimization, progress)
    values = {"learning_rate": learning_rate_at(config, step), **schedule.of_objective(config.objective, progress)}
    return values if beta2 is None else {**values, "beta2": beta2}


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then constant, scheduled, or decay to 0."""
    optimization = config.optimization
    factor = config.global_batch_size if optimization.rate_per_image else 1
    highest = config.learning_rate * factor
    if step < optimization.warmup_steps:
        return highest * (step + 1) / optimization.warmup_steps
    progress = (step - optimization.warmup_steps) / max(1, config.steps - optimization.warmup_steps)
    match optimization.decay:
        case "constant":
            if config.schedule.final_learning_rate is None:
                return highest
            return config.schedule.learning_rate(config.learning_rate, progress_at(config, step)) * factor
        case "linear":
            return highest * (1.0 - progress)
        case "cosine":
            return highest * 0.5 * (1.0 + math.cos(math.pi * progress))


def newest_weight_at(ema_decay: float, step: int) -> float:
    """Weight of the newest weights in the moving average at a step, counted from 0: 1 minus the decay.

    The decay starts low and rises to the configured one, so that the random initial weights do not linger.
    """
    return 1.0 - min(ema_decay, (1 + step) / (10 + step))
