"""Values that change from step to step: the key of the noise, the learning rate, the weight of the average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gen_dist.config import TrainConfig


class Schedule:
    """Key of a step's noise, learning rate, and newest weight of the moving average: functions of the step alone.

    On a GPU all are tensors, even if steps are not recorded. So both kinds of steps have the same arithmetic and bits.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, in_tensors: bool) -> None:
        self._config = config
        self.rng = torch.tensor([config.seed, 0], dtype=torch.int64, device=device)
        self._step = self.rng[1]  # a view: assigning to an item copies from the host, and waits for the device
        self.learning_rate: float | Tensor = torch.zeros((), device=device) if in_tensors else 0.0
        self.newest_weight: float | Tensor = torch.zeros((), device=device) if in_tensors else 0.0

    def write(self, step: int) -> None:
        """Set all values to those of a step, counted from 0."""
        self._step.fill_(step)
        self.learning_rate = _written(self.learning_rate, learning_rate_at(self._config, step))
        if self._config.optimization.ema_decay is not None:
            self.newest_weight = _written(
                self.newest_weight, newest_weight_at(self._config.optimization.ema_decay, step)
            )


def _written(number: float | Tensor, value: float) -> float | Tensor:
    """Return the value; if `number` is a tensor, write it there and return the tensor."""
    return number.fill_(value) if isinstance(number, Tensor) else value


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then constant, or linear or cosine decay to 0."""
    optimization = config.optimization
    highest = config.learning_rate * (config.global_batch_size if optimization.rate_per_image else 1)
    if step < optimization.warmup_steps:
        return highest * (step + 1) / optimization.warmup_steps
    progress = (step - optimization.warmup_steps) / max(1, config.steps - optimization.warmup_steps)
    match optimization.decay:
        case "constant":
            return highest
        case "linear":
            return highest * (1.0 - progress)
        case "cosine":
            return highest * 0.5 * (1.0 + math.cos(math.pi * progress))


def newest_weight_at(ema_decay: float, step: int) -> float:
    """Weight of the newest weights in the moving average at a step, counted from 0: 1 minus the decay.

    The decay starts low and rises to the configured one, so that the random initial weights do not linger.
    """
    return 1.0 - min(ema_decay, (1 + step) / (10 + step))
